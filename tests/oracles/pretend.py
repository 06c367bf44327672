"""The pretend GPU of pretend_gpu.cpp: compiled, registered, models placed on it, and compared with the CPU.

    library = pretend.build(folder)                    # against ggml's headers, from the archive in the cache
    gpu = pretend.register(library)                    # for a process that has loaded no model yet
    with pretend.opened(path, "straddling", 2, 6) as llm:    # or "cpu": the same process without the device
        llm.logits(tokens)
    for result in pretend.run(["llama"], folder, library):   # a row at a time, in worker processes

A device is for good and for the whole process, so every test that wants it runs in a worker. Bit for bit is what is
asked, so both sides have the same kernels: F32 weights (llama.cpp repacks quantised ones for the CPU alone; extra
buffer types are off besides), F32 K/V, and one thread.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from support import ROOT, archs, headers

from oracles import matrix

SETTINGS = {**matrix.SETTINGS, "n_ctx": 256, "n_batch": 256, "n_ubatch": 256}

EXPERTS = rb"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
PLACEMENTS = ("all", "straddling", "none", "host-kv", "host-experts")
"""Where a model is: all layers on the GPU; a window whose first layer is not; none, so that the GPU only takes over
operations with many rows; all but the K/V, or but the experts."""

PROMPTS, DECODED = (8, 40, 200), 3
"""Below 32 tokens the device takes over nothing; 200 tokens leave few experts of a mixture unused, 40 leave most."""

EXPERTS_128 = archs.Row("qwen3moe 128 experts", archs.KV, {**archs.MOE, "expert_count": 128}, seed=2)
"""So many that a prompt leaves most of them alone, and another pass of a loop chooses others."""
ROWS = {**archs.ROWS, EXPERTS_128.name: EXPERTS_128}
FAMILIES = ("llama", EXPERTS_128.name, "gemma3", "deepseek2", "qwen3next")
"""Those whose every case is run: plain K/V, a mixture, sliding windows, MLA, and a delta net beside attention."""


def build(folder: Path) -> Path:
    """Compile the device for the library in use and return the shared object."""
    from ggufloop.backend import library as backend

    include = headers.unpack(folder / "include")
    library, ggml = folder / "libpretend.so", backend.locate().directory
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-Wall", "-shared", "-fPIC", f"-I{include}",
         ROOT / "tests" / "oracles" / "pretend_gpu.cpp", "-o", library,
         f"-L{ggml}", f"-Wl,-rpath,{ggml}", "-lggml", "-lggml-base", "-lggml-cpu"],
        check=True,
    )  # fmt: skip
    return library


def register(library: Path) -> ctypes.CDLL:
    """Add the device to the llama.cpp of this process; returns its functions."""
    import ggufloop.engine  # noqa: F401  # the library the device is added to

    gpu = ctypes.CDLL(str(library))
    gpu.pretend_gpu_graphs.restype = ctypes.c_int64
    gpu.pretend_gpu_compute_bytes.restype = ctypes.c_size_t
    gpu.pretend_gpu_register()
    return gpu


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def gpu_layers(placement: str, first: int, n_layer: int) -> int:
    """n_gpu_layers of a placement, for a model of n_layer layers whose window starts at `first`."""
    return {"cpu": 0, "none": 0, "straddling": n_layer - first}.get(placement, -1)  # counted from the output's end


@contextmanager
def opened(path: Path, placement: str, first: int = 0, n_layer: int = 0, **settings: Any) -> Iterator[Any]:
    """The model as placed; window and layers are asked for by "straddling" alone."""
    from ggufloop.engine import LoopedLlama, llama_cpp

    lib = llama_cpp.llama_cpp._lib
    lib.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p

    class Pretend(LoopedLlama):
        """llama_cpp sets model_params just before it loads the model."""

        @property
        def model_params(self) -> Any:
            return self._placed

        @model_params.setter
        def model_params(self, params: Any) -> None:
            if placement == "host-experts":
                self._overrides = (_Override * 2)(_Override(EXPERTS, lib.ggml_backend_cpu_buffer_type()), _Override())
                params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
            LoopedLlama.model_params.fset(self, params)
            self._placed = self._model_params

    if placement == "cpu":
        settings["device"] = "none"
    layers = gpu_layers(placement, first, n_layer)
    llm = Pretend(
        path,
        verbose=False,
        repack=False,
        n_gpu_layers=layers,
        offload_kqv=placement != "host-kv",
        **{**SETTINGS, **settings},
    )
    try:
        yield llm
    finally:
        llm.close()


# cases


def loops(row: archs.Row) -> list[str]:
    """The settings of every loop a row's window can have here; any four in a row have every kv policy it can have."""
    routings = ("free", "frozen") if "expert_count" in row.meta else ("free",)
    modes = product(routings, ("block", "layer"), matrix.policies(row))
    return [f"k=3 kv={kv} mode={mode} routing={routing}" for routing, mode, kv in modes]


def places(row: archs.Row) -> list[str]:
    """The placements that differ for a row."""
    without = {"host-experts"} if "expert_count" not in row.meta else set()
    return [place for place in PLACEMENTS if place not in without]


def cases(name: str) -> list[tuple[str, str]]:
    """The (placement, loop) of a row: all of a family's, else one per placement, with another loop each.

    Rows take turns, so that over all of them every loop meets every placement.
    """
    row = ROWS[name]
    if name in FAMILIES:
        return list(product(places(row), loops(row)))
    turn = list(ROWS).index(name) * len(PLACEMENTS)
    return [(place, loops(row)[(turn + i) % len(loops(row))]) for i, place in enumerate(places(row))]


def _evaluate(llm: Any, row: archs.Row, n: int) -> np.ndarray:
    text = np.random.default_rng(n).integers(0, 256, n + DECODED).tolist()
    steps = [text[:n]] if row.cache == archs.NONE else [text[:n], *([t] for t in text[n:])]
    llm.reset()
    return np.concatenate([llm.logits(step) for step in steps])


def _compare(row: archs.Row, path: Path, gpu: Any, begin: Any) -> list[str]:
    """What differs from the CPU in the cases of a row, the plain model's results where they differ too."""
    from ggufloop.loop import LoopSpec

    n_layer = row.meta.get("block_count", row.n_layer)
    a, b = row.window
    todo: dict[str, list[str]] = {"cpu": ["plain"]}
    for place, loop in cases(row.name):
        todo.setdefault(place, []).append(loop)
        todo["cpu"].append(loop)
    wrong, cpu = [], {}
    for place, settings in todo.items():
        with opened(path, place, a % n_layer, n_layer, flash_attn=row.flash_attn) as llm:
            for loop in dict.fromkeys(settings):
                begin(f"{place} {loop}")
                llm.set_loop(None if loop == "plain" else LoopSpec.parse(f"{a}:{b} {loop}"))
                for n in PROMPTS:
                    before = gpu.pretend_gpu_graphs()
                    rows = _evaluate(llm, row, n)
                    used = gpu.pretend_gpu_graphs() - before
                    if place == "cpu":
                        cpu[loop, n] = rows
                        continue
                    if not used and (place != "none" or n >= 32):
                        wrong.append(f"{place} {loop}: the device computes nothing of {n} tokens")
                    if not np.array_equal(rows, cpu[loop, n]):
                        llm.set_loop(None)
                        plain = _differ(_evaluate(llm, row, n), cpu["plain", n])
                        llm.set_loop(LoopSpec.parse(f"{a}:{b} {loop}"))
                        wrong.append(
                            f"{place} {loop}: {n} tokens differ by {_differ(rows, cpu[loop, n])}, plain by {plain}"
                        )
    return wrong


def _differ(rows: np.ndarray, other: np.ndarray) -> str:
    return f"{np.abs(rows - other).max():.3g}" if np.isfinite(rows).all() else "NaN"


def run(names: Sequence[str], folder: Path, library: Path, jobs: int = 2) -> Iterator[matrix.Result]:
    """A result of each row named, as they come, from `jobs` workers; the error says which cases are not the CPU's."""
    return matrix.ask(names, [[__file__, str(folder), str(library)]], jobs)


def _serve(folder: Path, library: Path) -> None:
    """Answer row names on stdin with a line of JSON each, after lines that say what is being tried."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gpu = register(library)
    from support import zoo

    from ggufloop import engine

    @engine.llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: object) -> None:
        if level == 4:
            os.write(2, text)

    def write(line: str) -> None:
        answers.write(f"{line}\n")
        answers.flush()

    for line in sys.stdin:
        engine.llama_cpp.llama_log_set(log, None)
        row = ROWS[line.strip()]
        path = folder / f"{row.name.replace(' ', '-')}.gguf"
        try:
            zoo.write(path, row)
            error = "; ".join(_compare(row, path, gpu, lambda what: write(f"> {what}")))
        except Exception as e:  # whatever it is, it belongs to this row
            error = repr(e)
        finally:
            path.unlink(missing_ok=True)
        write(json.dumps(asdict(matrix.Result(row.name, error=error))))


if __name__ == "__main__":
    _serve(*map(Path, sys.argv[1:]))
