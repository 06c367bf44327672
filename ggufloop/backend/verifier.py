"""The process in which a library computes what numpy knows: `verify.check` starts it, nothing imports it.

One JSON object per line goes out: {"begin": case} before each thing that may end the process, {"wrong": [*case, what]}
for a number that is not right, {"done": ...} at the end. A case is [weight type, columns, device, loop], with no
columns yet while a model loads and no type while the library does.
The library is that of LLAMA_CPP_LIB_PATH, used as everybody uses it: weights are put where it likes them best, and
each device that takes layers is given all of them.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ggufloop.backend import capi
from ggufloop.backend.ggml import Device, Ggml
from ggufloop.backend.oracle import N_PROMPT, N_VOCAB, TYPES, WINDOW, Array, TinyModel, wrong
from ggufloop.backend.process import Send, answers
from ggufloop.loop import LoopSpec

# with `each` the next token sees the K/V of every pass, with `first` (the default) that of the first one
LOOPS = {
    "plain": None,
    "naive": LoopSpec(window=WINDOW, k=2, solver="naive", kv="each"),
    "euler": LoopSpec(window=WINDOW, k=2, solver="euler", kv="first"),
}
_ALL_LAYERS = 999


class Failed(Exception):
    """The library did not do what it was asked; the words say what."""


class _Context:
    """A model on a device, evaluated batch by batch."""

    def __init__(self, low: Any, path: Path, device: Device | None) -> None:
        self._low = low
        params = low.llama_model_default_params()
        handles = (ctypes.c_void_p * 2)(device.handle if device else None, None)
        params.devices = ctypes.addressof(handles)
        params.n_gpu_layers = _ALL_LAYERS if device else 0
        self._model = low.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise Failed("the model does not load")
        settings = low.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 128, 128, 128
        settings.n_threads = settings.n_threads_batch = min(4, os.cpu_count() or 1)
        self.ctx = low.llama_init_from_model(self._model, settings)
        if not self.ctx:
            raise Failed("there is no context for the model")
        self._batch = low.llama_batch_init(N_PROMPT, 0, 1)

    def clear(self) -> None:
        self._low.llama_memory_clear(self._low.llama_get_memory(self.ctx), True)

    def step(self, tokens: list[int], begin: int) -> Array:
        """Logits of all tokens of a batch at positions from `begin` on."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, begin + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = True
        code = self._low.llama_decode(self.ctx, batch)
        if code != 0:
            raise Failed(f"llama_decode says {code}")
        rows = np.ctypeslib.as_array(self._low.llama_get_logits(self.ctx), (len(tokens), N_VOCAB))
        return np.array(rows, dtype=np.float32)  # a copy: the next step writes there

    def close(self) -> None:
        self._low.llama_batch_free(self._batch)
        self._low.llama_free(self.ctx)
        self._low.llama_model_free(self._model)


def verify(low: Any, directory: Path, types: Sequence[str], folder: Path, send: Send) -> dict[str, Any]:
    """Go through all cases; what there was to compute on."""
    loops = dict(LOOPS)
    if hasattr(low._lib, "llama_loop_abi"):
        capi.declare(low._lib)
    else:
        loops = {"plain": None}
    devices = [None, *(device for device in Ggml(directory).devices() if device.takes_layers)]
    for kind in types:
        send({"begin": [kind, 0, "CPU", "plain"]})
        model = TinyModel(kind, folder)
        wanted = {name: model.logits(loop) for name, loop in loops.items()}
        for device in devices:
            _check(low, model, device, loops, wanted, send)
        model.path.unlink()
    return {"types": list(types), "devices": [d.name if d else "CPU" for d in devices], "loops": list(loops)}


def _check(
    low: Any,
    model: TinyModel,
    device: Device | None,
    loops: dict[str, LoopSpec | None],
    wanted: dict[str, Array],
    send: Send,
) -> None:
    place = device.name if device else "CPU"
    case: list[Any] = [model.kind, 0, place, "plain"]
    send({"begin": case})
    context = None
    try:
        context = _Context(low, model.path, device)
        for name, loop in loops.items():
            context.clear()
            if "naive" in loops:
                capi.install(low._lib, context.ctx, loop)
            for begin, end in ((0, N_PROMPT), (N_PROMPT, N_PROMPT + 1)):
                case = [model.kind, end - begin, place, name]
                send({"begin": case})
                rows = context.step(model.tokens[begin:end], begin)
                what = wrong(rows, wanted[name][begin:end], model.kind, place)
                if what:
                    send({"wrong": [*case, what]})
    except (Failed, capi.Refused) as e:
        send({"wrong": [*case, str(e)]})
    finally:
        if context:
            context.close()


def main() -> None:
    """Verify the library of LLAMA_CPP_LIB_PATH with the weight types that the arguments name, all if none does."""
    send = answers()
    send({"begin": ["", 0, "CPU", "plain"]})
    from llama_cpp import llama_cpp as low

    keep = low.llama_log_callback(lambda level, text, user: None)
    low.llama_log_set(keep, ctypes.c_void_p(0))
    low.llama_backend_init()
    try:
        with tempfile.TemporaryDirectory(prefix="ggufloop-") as folder:
            directory, types = Path(os.environ["LLAMA_CPP_LIB_PATH"]), sys.argv[2:] or TYPES
            send({"done": verify(low, directory, types, Path(folder), send)})
    except Exception as e:  # the machine's fault or ours: no word on the library
        send({"error": f"{type(e).__name__}: {e}"})
