"""How many instructions an evaluation takes: the same from run to run, on however busy a machine.

    counts = count(path, ["", "12:16 k=3"], stock=False)      # [Count(prefill, decode), ...], None without a tool

Counted by the CPU itself (perf_event_open, what `perf stat -e instructions` reads), or where that is refused, as in
most virtual machines, by valgrind's callgrind. One thread, so that nothing waits: spinning is instructions too.

callgrind knows no AVX-512 and no AMX, so there the libraries are portable ones (GGML_NATIVE=OFF, which is AVX2), built
once into <cache>/instructions by a toolchain file, which CMake reads without the build knowing. It counts evaluations
alone; the counted process itself tells it, by vgdb, when to begin and after which evaluation to write a count.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ggufloop.errors import GgufloopError
from ggufloop.files import cache_dir

PROMPT, GENERATED = 8, 2  # callgrind takes a second for each token of a small model
_DUMPS = 3  # for one loop: a warm-up, the prompt, the generated tokens
_EVALUATION = "llama_context::decode(llama_batch const*"  # llama_decode itself callgrind takes for a part of libffi
_SYSCALLS = {"x86_64": 298, "aarch64": 241, "riscv64": 241}
_ENABLE, _DISABLE, _RESET = 0x2400, 0x2401, 0x2403


@dataclass(frozen=True)
class Count:
    """Instructions per token of a prompt, and of generating."""

    prefill: float
    decode: float


class Counter:
    """The CPU's own count of this thread's instructions. Raises OSError where it has none, or lends it to nobody."""

    def __init__(self, kind: int = 0, event: int = 1) -> None:  # PERF_TYPE_HARDWARE, PERF_COUNT_HW_INSTRUCTIONS
        number = _SYSCALLS.get(platform.machine()) if sys.platform == "linux" else None
        if number is None:
            raise OSError("no perf_event_open here")
        self._libc = ctypes.CDLL(None, use_errno=True)
        attributes = struct.pack("IIQQQQQ", kind, 64, event, 0, 0, 0, 0b1100001)  # disabled, not the kernel's
        attributes = ctypes.create_string_buffer(attributes.ljust(64, b"\0"), 64)
        self._file = self._libc.syscall(number, attributes, 0, -1, -1, 0)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def __enter__(self) -> Counter:
        self._libc.ioctl(self._file, _RESET, 0)
        self._libc.ioctl(self._file, _ENABLE, 0)
        return self

    def __exit__(self, *exception: object) -> None:
        self._libc.ioctl(self._file, _DISABLE, 0)
        self.value = int.from_bytes(os.read(self._file, 8), sys.byteorder)


def tool() -> str | None:
    """What can count here: perf, callgrind or nothing."""
    try:
        Counter()
    except OSError:
        return "callgrind" if shutil.which("valgrind") else None
    return "perf"


def count(path: Path, loops: list[str], stock: bool) -> list[Count] | None:
    """Count the evaluations of a model under each loop ("" is the plain model). None without a tool.

    Raises GgufloopError if a library cannot be built or the counting process fails.
    """
    chosen = tool()
    if chosen is None:
        return None
    words = [sys.executable, __file__, str(path), json.dumps(loops), "stock" if stock else "patched", chosen]
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    if chosen == "perf":
        return [Count(*pair) for pair in json.loads(_run(words, env))]
    env |= _portable(stock, env)
    with tempfile.TemporaryDirectory() as folder:
        valgrind = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
        _run([*valgrind, "--instr-atstart=no", f"--toggle-collect={_EVALUATION}", *words], env)
        dumps = [_summary(Path(folder) / f"out.{i + 1}") for i in range(_DUMPS * len(loops))]
    return [Count(dumps[i + 1] / PROMPT, dumps[i + 2] / GENERATED) for i in range(0, len(dumps), _DUMPS)]


def _summary(dump: Path) -> int:
    found = re.search(r"^summary: (\d+)", dump.read_text(), re.MULTILINE) if dump.exists() else None
    if found is None:
        raise GgufloopError(f"callgrind wrote no count {dump.name}.", "is its version too old for this program?")
    return int(found[1])


def _portable(stock: bool, env: dict[str, str]) -> dict[str, str]:
    """The environment in which the library of that kind is one that callgrind can run; built if it is not there."""
    folder = cache_dir() / "instructions"
    folder.mkdir(parents=True, exist_ok=True)
    toolchain = folder / "portable.cmake"
    toolchain.write_text('set(GGML_NATIVE OFF CACHE BOOL "")\n')
    if not (folder / "sdist").exists() and (cache_dir() / "sdist").exists():
        (folder / "sdist").symlink_to(cache_dir() / "sdist")
    more = {"GGUFLOOP_CACHE": str(folder), "GGUFLOOP_BACKEND": "cpu", "CMAKE_TOOLCHAIN_FILE": str(toolchain)}
    build = ["build", "--backend", "cpu", *(["--stock"] if stock else [])]
    for name in ("GGUFLOOP_LIB_DIR", "GGUFLOOP_STOCK_LIB_DIR"):
        env.pop(name, None)
    _run([sys.executable, "-c", f"from ggufloop.cli import main; main({build!r})"], {**env, **more})
    return more


def _run(words: list[str], env: dict[str, str]) -> str:
    """Output of a process. Raises GgufloopError with its last line if it fails."""
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise GgufloopError(f"counting instructions failed: {last}", "leave it out with --no-instructions.")
    return done.stdout


def _child(path: str, loops: str, kind: str, chosen: str) -> None:
    """The process that is counted: for every loop a warm-up, a prompt and generated tokens."""
    from ggufloop.backend import library

    library.activate(stock=kind == "stock")
    from ggufloop.engine import LoopedLlama

    llm = LoopedLlama(path, n_ctx=256, n_batch=64, n_ubatch=64, n_threads=1, n_threads_batch=1, verbose=False)
    tokens = np.random.default_rng(1).integers(llm.n_vocab(), size=PROMPT + GENERATED).tolist()

    def generate() -> None:
        for token in tokens[PROMPT:]:
            llm.eval([token])

    if chosen == "callgrind":
        _tell("instrumentation", "on")  # loading, which is most of the work, is not slowed down
    found: list[tuple[float, float]] = []
    for loop in json.loads(loops):
        llm.set_loop(loop or None)
        llm.reset()
        llm.eval(tokens[:1])  # what the first evaluation reserves is not counted
        llm.reset()
        if chosen == "callgrind":
            _tell("dump")
            llm.eval(tokens[:PROMPT])
            _tell("dump")
            generate()
            _tell("dump")
            continue
        with Counter() as prefill:
            llm.eval(tokens[:PROMPT])
        with Counter() as decode:
            generate()
        found.append((prefill.value / PROMPT, decode.value / GENERATED))
    print(json.dumps(found))


def _tell(*words: str) -> None:
    """Have the valgrind that runs this process do something now."""
    subprocess.run(["vgdb", f"--pid={os.getpid()}", *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    _child(*sys.argv[1:])
