"""What every check needs: rows of the table, and models on the device that is checked or on the CPU.

    with opened(path, "device", type_k=8) as llm: ...        # or "cpu", or "host experts"
    row("repeated", "q8_0", value=0.0, bound=0.0)            # told to the parent at once, so that a crash loses nothing

The device is llama.cpp's own choice unless $GPU_CHECK_DEVICE names one; "none" is the CPU, for rehearsals.
$GPU_CHECK_PRELOAD, FILE:FUNCTION, is a shared object that brings a device of its own and the function registering it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = {"n_ctx": 512, "n_batch": 512, "n_threads": 1, "n_threads_batch": 1, "flash_attn": False}
EXPERTS = rb"\.ffn_(up|down|gate|gate_up)_(ch|)exps"

_answers = sys.stdout


@dataclass(frozen=True)
class Row:
    """One line of the table. ok: None where a figure is only measured. value must not exceed bound."""

    check: str
    case: str
    value: float | None = None
    bound: float | None = None
    unit: str = ""
    ok: bool | None = None
    note: str = ""


def keep_stdout() -> None:
    """Keep stdout for rows: C code prints."""
    global _answers
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def row(check: str, case: str, value: float | None = None, bound: float | None = None, **rest: Any) -> None:
    """Tell the parent a row; with a bound it passes if the value is a number and no larger."""
    if bound is not None and "ok" not in rest:
        rest["ok"] = bool(value is not None and np.isfinite(value) and value <= bound)
    if value is not None and not np.isfinite(value):
        rest["note"], value = f"{rest.get('note', '')} not finite".strip(), None
    made = Row(check, case, value, bound, **rest)
    _answers.write(json.dumps(asdict(made)) + "\n")
    _answers.flush()


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def preload() -> None:
    """Register the device of $GPU_CHECK_PRELOAD, once per process and before any model is loaded."""
    given = os.environ.pop("GPU_CHECK_PRELOAD", "")
    if given:
        import ggufloop.engine  # noqa: F401  # the library it registers with

        file, _, function = given.rpartition(":")
        ctypes.CDLL(file)[function]()


@contextmanager
def opened(path: Path, place: str, **settings: Any) -> Iterator[Any]:
    """A LoopedLlama of the file: all on the device, all on the CPU, or on the device with its experts on the host."""
    preload()
    from ggufloop.engine import LoopedLlama, llama_cpp

    lib = llama_cpp.llama_cpp._lib
    lib.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p

    class Placed(LoopedLlama):
        """llama_cpp sets model_params just before it loads the model."""

        @property
        def model_params(self) -> Any:
            return self._placed

        @model_params.setter
        def model_params(self, params: Any) -> None:
            if place == "host experts":
                self._overrides = (_Override * 2)(_Override(EXPERTS, lib.ggml_backend_cpu_buffer_type()), _Override())
                params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
            LoopedLlama.model_params.fset(self, params)
            self._placed = self._model_params

    named = os.environ.get("GPU_CHECK_DEVICE")
    if place == "cpu" or named:
        settings["device"] = "none" if place == "cpu" else named
    settings.setdefault("n_gpu_layers", 0 if place == "cpu" else -1)
    llm = Placed(path, verbose=False, **{**SETTINGS, **settings})
    try:
        yield llm
    finally:
        llm.close()


def evaluate(llm: Any, loop: str | None, steps: list[list[int]]) -> np.ndarray:
    """Logits (tokens, vocabulary) of steps on an empty cache under a loop."""
    llm.set_loop(loop)
    llm.reset()
    return np.concatenate([llm.logits(step) for step in steps])


def tokens(n: int, seed: int = 7) -> list[int]:
    """Random bytes as tokens of the tiny models."""
    return [int(t) for t in np.random.default_rng(seed).integers(0, 256, n)]


def prompt_and_more(prompt: int, more: int = 4) -> list[list[int]]:
    """A prompt as one step, and tokens after it one by one."""
    text = tokens(prompt + more)
    return [text[:prompt], *([t] for t in text[prompt:])]


def spread(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of any logit; infinite if one is no number."""
    return float(np.abs(a - b).max()) if np.isfinite(a).all() and np.isfinite(b).all() else float("inf")


@contextmanager
def logged() -> Iterator[list[str]]:
    """Everything llama.cpp logs meanwhile, debug lines included, in the list."""
    from ggufloop.engine import llama_cpp

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: object) -> None:
        lines.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, None)
    try:
        yield lines
    finally:
        from llama_cpp._logger import llama_log_callback

        llama_cpp.llama_log_set(llama_log_callback, None)
