"""Which llama.cpp library this process runs: the pinned source, the patch, the built libraries, and `activate`.

    backend.activate()                # before anything imports llama_cpp; ggufloop.engine does it
    backend.activate(stock=True)      # the unpatched library, for comparisons; one process has one library

Libraries live in <cache>/backends/<backend>-<key>/, each with a manifest.json that says what it is. Choosing one reads
only manifests: the newest that carries this version's patch and is known to compute right on this CPU, where
`ggufloop build` makes a library the newest even if it only found it. The key, which needs the compiler's word, is not
computed here. A library nobody verified on this CPU (a home folder shared by machines, a folder given by hand) is
verified once, by verify.py, before it is used; <cache>/verified remembers that it was right.
A wheel made by scripts/make_wheel.py brings a library and the binding along, in BUNDLED. That library is used where the
cache holds none that fits; bundled.py puts it there first.

Environment: GGUFLOOP_BACKEND limits the choice to one backend (cpu, cuda, ...); GGUFLOOP_LIB_DIR and
GGUFLOOP_STOCK_LIB_DIR name a folder outright, for those who build llama.cpp themselves.
This module never imports llama_cpp: the library is loaded by that import, so the choice has to come first.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import mmap
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import get_type_hints

from ggufloop import reading
from ggufloop.errors import BackendError, nearest
from ggufloop.files import PACKAGE, cache_dir, shipped

BINDING = "llama-cpp-python"
BINDING_VERSION = "0.3.36"
SDIST = f"llama_cpp_python-{BINDING_VERSION}.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_CPP_COMMIT = "0c1e57098"

NAMES = ("cpu", "cuda", "metal", "vulkan", "hip")
MANIFEST = "manifest.json"
LOOP_SYMBOL = b"llama_loop_abi"

BUNDLED = PACKAGE / "bundled"
"""What a wheel brings along: a library in parts, its manifest, and the binding. Not there in other installations."""

if BUNDLED.is_dir():
    sys.path.insert(0, str(BUNDLED / "binding"))  # before one of another version, which is left as it is

SPIN_COUNT = 1000
"""Rounds a thread of libgomp spins at a barrier before it sleeps; its own default is 300,000.

Where other work wants the cores, a thread that spins keeps the one it waits for from running. `python
scripts/bench_loaded.py` measures it and chose this number: of those that cost a quiet machine nothing to be seen, it
keeps the most on a busy one. Two threads beside two busy loops on two cores kept 0.41 of their quiet 137 t/s, 0.36 in
the worst of 10 runs; at libgomp's default 0.25, and 0.3 t/s in the worst. At 100 and below a quiet machine lost 40 %.
"""

_VARIABLES = {False: "GGUFLOOP_LIB_DIR", True: "GGUFLOOP_STOCK_LIB_DIR"}

_active: Backend | None = None


@dataclass(frozen=True)
class Backend:
    """A built llama.cpp library. What a manifest does not say (a folder given by hand) is an empty string."""

    directory: Path
    name: str  # one of NAMES
    stock: bool
    patch_id: str  # "" for stock
    key: str
    programs: tuple[str, ...]  # llama.cpp's own that are beside it
    binding: str  # version of llama-cpp-python whose source it was built from
    cpu: str  # cpu_id() of the machine it was built on
    compiler: str
    verified: str = ""  # cpu_id() of the machine it was found to compute right on
    gave_up: str = ""  # what the build had to leave out for that, and why
    programs_id: str = ""  # programs_id() of the patch they were built from, "" for stock
    variant: str = ""  # of a wheel's library: the one of its CPU generations that was taken

    @classmethod
    def load(cls, directory: Path) -> Backend | None:
        """The library in `directory`, None if its manifest is missing or was not written by this version."""
        try:
            data = reading.json((directory / MANIFEST).read_bytes())
            kinds = get_type_hints(cls)
            return cls(directory, **{name: reading.typed(value, kinds[name], name) for name, value in data.items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def save(self) -> None:
        """Write the manifest into the directory."""
        data = {k: v for k, v in asdict(self).items() if k != "directory"}
        (self.directory / MANIFEST).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        programs = self.programs[0] if len(self.programs) == 1 else f"{len(self.programs)} programs"
        return self.directory.name + (f" with {programs}" if self.programs else "")


def of_wheel() -> Backend | None:
    """The library this installation brought along, in the folder of the cache that is made at first use."""
    found = Backend.load(BUNDLED)
    if found is None:
        return None
    return replace(found, directory=backends_dir() / f"{found.name}-{found.key}-{cpu_id()}", cpu=cpu_id())


def backends_dir() -> Path:
    """Where built libraries are installed."""
    return cache_dir() / "backends"


def patches_dir() -> Path:
    """The patch's folder: package data of an installed ggufloop, ../patches of a source checkout."""
    return shipped("patches")


def patch_id() -> str:
    """Short hash of the patch files; the library reports the one it was built from."""
    return _hash("ggml-*.patch", "llama-loop*")


def programs_id() -> str:
    """Short hash of what makes llama.cpp's programs loop."""
    return _hash("common-log.patch", "llama-server-loop.patch", "server-*.h")


def mends_id() -> str:
    """Short hash of what the unpatched library is mended with: it computes, and its programs print all they print."""
    return _hash("ggml-amx.patch", "common-log.patch")


def _hash(*patterns: str) -> str:
    """First 12 hex digits of the sha256 over files in the patch's folder."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in patches_dir().glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def cpu_id() -> str:
    """Short hash of the CPU's model and instruction sets: libraries are compiled for the machine they run on."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            first = f.read(16384).split("\n\n")[0]  # one CPU only: the whole file is slow on large machines
        kept = ("vendor_id", "model name", "flags", "CPU implementer", "CPU part", "Features", "isa")
        text = "\n".join(line for line in first.splitlines() if line.startswith(kept))
    elif sys.platform == "darwin":
        text = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout
    else:
        text = platform.processor()
    return hashlib.sha256(f"{platform.machine()}\n{text}".encode()).hexdigest()[:12]


def installed() -> list[Backend]:
    """Every library in the cache, the newest first."""
    found = []
    for manifest in backends_dir().glob(f"*/{MANIFEST}"):
        backend = Backend.load(manifest.parent)
        if backend:
            found.append((manifest.stat().st_mtime_ns, backend))
    return [backend for _, backend in sorted(found, key=lambda pair: pair[0], reverse=True)]


def program(name: str, stock: bool = False) -> Path:
    """One of llama.cpp's programs, of a library that computes right here, or of the one the environment names.

    Raises BackendError if none has it.
    """
    file = f"{name}.exe" if sys.platform == "win32" else name
    if os.environ.get(_VARIABLES[stock]):
        given = locate(stock).directory / file
        if given.is_file():
            return given
        raise BackendError(f"{given.parent}, which {_VARIABLES[stock]} names, has no {name}.", "build it, or unset it.")
    brought = None if stock else of_wheel()
    if brought is not None and name in brought.programs and locate() == brought:
        usable()
    for found in installed():
        ids = ("", "") if stock else (patch_id(), programs_id())
        fits = found.stock == stock and (found.patch_id, found.programs_id) == ids and is_verified(found)
        if fits and requested_name() in (None, found.name) and (found.directory / file).is_file():
            return found.directory / file
    flag = "--server" if name == "llama-server" and not stock else "--with-tools"
    raise BackendError(f"{name} is not built yet.", f"run: ggufloop build {'--stock ' * stock}{flag}")


def requested_name() -> str | None:
    """The backend $GGUFLOOP_BACKEND asks for, None for no preference. Raises BackendError for an unknown one."""
    name = os.environ.get("GGUFLOOP_BACKEND", "auto") or "auto"
    if name not in ("auto", *NAMES):
        raise BackendError(f"GGUFLOOP_BACKEND is {name!r}, which is no backend.", nearest(name, ("auto", *NAMES)))
    return None if name == "auto" else name


def locate(stock: bool = False) -> Backend:
    """The library `activate` would use. Raises BackendError, with the command to run, if there is none."""
    variable = _VARIABLES[stock]
    if os.environ.get(variable):
        return _from_directory(Path(os.environ[variable]).expanduser().absolute(), stock, variable)

    name = requested_name()
    command = "run: ggufloop build" + (f" --backend {name}" if name else "") + (" --stock" if stock else "")
    kind = " ".join(["stock" if stock else "patched", *([name] if name else [])])
    candidates = [b for b in installed() if b.stock == stock and name in (None, b.name)]
    wanted = "" if stock else patch_id()
    brought = of_wheel()
    keys = {b.key for b in candidates} if brought is None else {brought.key}
    current = [
        b for b in candidates
        if b.patch_id == wanted and b.binding == BINDING_VERSION
        and (not b.variant or (b.cpu == cpu_id() and b.key in keys))  # a wheel's, of this wheel and for this CPU
    ]  # fmt: skip
    if brought and not current and not stock and name in (None, brought.name):
        return brought
    if not candidates:
        raise BackendError(f"no {kind} llama.cpp is built yet.", command)
    if not current:
        raise BackendError(f"the {kind} llama.cpp in the cache was built by another version of ggufloop.", command)
    # the newest of the best; what the user has built is meant to be used
    return min(current, key=lambda b: (not is_verified(b), bool(b.variant), b.cpu != cpu_id()))


def is_verified(library: Backend) -> bool:
    """Whether `library` is known to compute right on this CPU.

    Its manifest is believed where nobody but a build writes; elsewhere files may have been exchanged since.
    """
    try:
        is_ours = library.directory.parent == backends_dir()
        return (is_ours and library.verified == cpu_id()) or note(library).is_file()
    except OSError:
        return False


def note(library: Backend) -> Path:
    """The empty file that says so of a library as it is, files and all, when its manifest does not."""
    digest = hashlib.sha256()
    for path in sorted(library.directory.glob("*")):
        if re.search(r"\.(so|dylib|dll)\b", path.name):
            state = path.stat()
            digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return cache_dir() / "verified" / f"{digest.hexdigest()[:12]}-{cpu_id()}"


def usable(stock: bool = False) -> Backend:
    """As `locate`, and verified on this CPU, which takes some seconds where nobody did so. Raises BackendError."""
    library = locate(stock)
    if not library.directory.is_dir():  # a wheel's, at its first use
        from ggufloop.backend import bundled  # as below

        return bundled.unpack(library)
    if not is_verified(library):
        from ggufloop.backend import verify  # not at the top: it needs this module, and hardly any process needs it

        verify.trust(library)
    return library


def _from_directory(directory: Path, stock: bool, variable: str) -> Backend:
    libraries = [directory / name for name in ("libllama.so", "libllama.dylib", "llama.dll", "libllama.dll")]
    library = next((path for path in libraries if path.is_file()), None)
    if library is None:
        raise BackendError(
            f"{variable} is {directory}, which holds no llama library.",
            "name a folder with libllama in it, or unset it.",
        )
    with open(library, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        patched = content.find(LOOP_SYMBOL) >= 0
    if patched == stock:
        raise BackendError(
            f"{variable} is {directory}, whose library is {'patched' if patched else 'not patched'}.",
            f"name a folder with the {'stock' if stock else 'patched'} library, or unset it.",
        )
    return Backend.load(directory) or _unknown(directory, stock)


def _unknown(directory: Path, stock: bool, patch: str = "") -> Backend:
    return Backend(directory, "", stock, patch, "", (), "", "", "")


def binding_version() -> str | None:
    """Version of the installed llama_cpp package, None if there is none. Read from its source, not imported."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r'__version__\s*=\s*"([^"]+)"', Path(spec.origin).read_text(encoding="utf-8"))
    return found[1] if found else "unknown"


def spin_briefly() -> None:
    """Tell libgomp, before it is loaded, to spin for SPIN_COUNT rounds, unless the user has told it how to wait.

    It reads the environment when it is loaded; children inherit it. Other OpenMP runtimes do not know the variable.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def activate(stock: bool | None = None) -> Backend:
    """Choose the library that `import llama_cpp` will load, in milliseconds if it was verified on this CPU before.

    stock: True for the unpatched library, False for the patched one, None for the one already chosen in this
    process, else the patched one. Sets LLAMA_CPP_LIB_PATH, and how its threads wait (`spin_briefly`). Raises
    BackendError when nothing fitting is built, when what is built does not compute right on this CPU, when the
    binding is missing, and when llama_cpp was imported first with a library that is not the one asked for.
    """
    global _active
    if stock is None:
        stock = _active.stock if _active else False
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is not None:
        _active = _adopt(loaded._lib, stock)
        return _active
    version = binding_version()
    if version is None:
        raise BackendError(f"{BINDING} is not installed.", "run: ggufloop build")
    if version != BINDING_VERSION:
        raise BackendError(
            f"{BINDING} {version} is installed, this version of ggufloop needs {BINDING_VERSION}.",
            "run: ggufloop build --replace-binding",
        )
    chosen = usable(stock)
    os.environ["LLAMA_CPP_LIB_PATH"] = str(chosen.directory)
    os.environ.pop("LLAMA_LOOP", None)  # for programs that know no loops: here the caller says which
    spin_briefly()
    _active = chosen
    return chosen


def _adopt(library: ctypes.CDLL, stock: bool) -> Backend:
    """The Backend of a library that is loaded already, if it is the kind asked for."""
    directory = Path(library._name).absolute().parent
    patched = hasattr(library, LOOP_SYMBOL.decode())
    if stock and patched:
        raise BackendError(
            "this process has loaded the patched llama.cpp, so it cannot have the stock one too.",
            "use the stock library in a process of its own.",
        )
    if not stock and not patched:
        raise BackendError(
            "llama_cpp was imported before ggufloop and has loaded a llama.cpp that cannot loop.",
            "import ggufloop.engine before llama_cpp, or set "
            "LLAMA_CPP_LIB_PATH to the folder that `ggufloop build` prints.",
        )
    if stock:
        return Backend.load(directory) or _unknown(directory, stock)
    library.llama_loop_patch_id.restype = ctypes.c_char_p
    found = library.llama_loop_patch_id().decode()
    if found != patch_id() and not os.environ.get("GGUFLOOP_LIB_DIR"):
        raise BackendError(
            f"llama_cpp was imported before ggufloop and has loaded patch {found}, this version needs {patch_id()}.",
            "import ggufloop.engine before llama_cpp.",
        )
    return Backend.load(directory) or _unknown(directory, stock, found)
