"""Load a llama.cpp library in a process of its own and report what it is: build verification and `doctor` use it.

    probe(directory)       # Probe(abi=1, patch_id="0a1b...", devices=(FoundDevice(...),), ...)

A library can be broken in ways that end a process (an instruction this CPU lacks, a driver that aborts), and a
process can load only one llama.cpp. So the child does the loading, through the same import everybody uses, which
resolves every function of the binding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ggufloop.backend import process
from ggufloop.errors import BackendError

_CHILD = """
import ctypes, json, os, sys
sys.path[0] = sys.argv[1]
import ggufloop.backend.library  # it knows where a binding is that came along
from llama_cpp import llama_cpp as low
import llama_cpp
lib, out = low._lib, {"binding": llama_cpp.__version__, "abi": None, "patch_id": None}
if hasattr(lib, "llama_loop_abi"):
    lib.llama_loop_patch_id.restype = ctypes.c_char_p
    out["abi"], out["patch_id"] = lib.llama_loop_abi(), lib.llama_loop_patch_id().decode()
low.llama_backend_init()
ggml = ctypes.CDLL(os.path.join(os.environ["LLAMA_CPP_LIB_PATH"], "ggml.dll")) if sys.platform == "win32" else lib
base = ctypes.CDLL(os.path.join(os.environ["LLAMA_CPP_LIB_PATH"], "ggml-base.dll")) if sys.platform == "win32" else lib
ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
ggml.ggml_backend_dev_get.argtypes, ggml.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
for name in ("name", "description"):
    f = getattr(base, "ggml_backend_dev_" + name)
    f.argtypes, f.restype = [ctypes.c_void_p], ctypes.c_char_p
memory = base.ggml_backend_dev_memory
memory.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)]
memory.restype = None
out["devices"] = []
for i in range(ggml.ggml_backend_dev_count()):
    dev, free, total = ggml.ggml_backend_dev_get(i), ctypes.c_size_t(), ctypes.c_size_t()
    memory(dev, free, total)
    out["devices"].append([base.ggml_backend_dev_name(dev).decode(errors="replace"),
                           base.ggml_backend_dev_description(dev).decode(errors="replace").strip(), total.value])
print("\\n" + json.dumps(out))
"""


@dataclass(frozen=True)
class FoundDevice:
    """A device the library can compute on. memory: bytes in all, 0 where the library does not say."""

    name: str
    description: str
    memory: int


@dataclass(frozen=True)
class Probe:
    """What a library says about itself. abi and patch_id are None for an unpatched one."""

    binding: str
    abi: int | None
    patch_id: str | None
    devices: tuple[FoundDevice, ...]


def probe(directory: Path, timeout: float = 120) -> Probe:
    """Load the library in `directory` with the installed binding. Raises BackendError if that fails in any way."""
    ended = process.run(_CHILD, timeout=timeout, env={"LLAMA_CPP_LIB_PATH": str(directory)})
    if ended.status is None:
        raise BackendError(f"the library in {directory} did not load within {timeout:.0f} s.", "")
    how = process.ending(ended.status)
    if ended.crashed:
        raise BackendError(f"loading the library in {directory} ended with {how}.", "run: ggufloop build --force")
    if ended.status:
        words = ended.errors.strip().splitlines() or [how]
        raise BackendError(f"the library in {directory} does not load: {words[-1]}", "run: ggufloop build --force")
    data = json.loads(ended.out.splitlines()[-1])
    devices = tuple(FoundDevice(*row) for row in data.pop("devices"))
    return Probe(devices=devices, **data)
