"""The process in which llama.cpp quantises: `quantize` and `imatrix` start it, nothing imports it.

One JSON object per line comes in, a job with its arguments; what happens goes out the same way, ending in {"done": ...}
or {"error": [class, message, hint]}. It is a process of its own because llama.cpp answers some inputs by aborting, and
because its log, which is where it says what it does to each tensor, is a setting of the whole process.

llama_cpp is imported here, next to the engine, for `llama_model_quantize` and for the callback that shows the inputs
of each matrix multiplication; neither needs a LoopedLlama.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufloop.backend import library, process
from ggufloop.backend.process import Send
from ggufloop.errors import GgufloopError
from ggufloop.quant import imatrix

_BATCH = 128  # tokens whose logits are held at once: with a large vocabulary a megabyte each
_F32 = 0  # ggml_type
_STRING_OVERRIDE = 3  # LLAMA_KV_OVERRIDE_TYPE_STR


def quantize(low: Any, job: dict[str, Any]) -> dict[str, Any]:
    """llama_model_quantize. job: source, target, ftype, threads, overrides, imatrix, metadata, dry_run."""
    params = low.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = job["ftype"], job["threads"], job["dry_run"]
    params.allow_requantize = True
    keep: list[Any] = []  # what C points to
    overrides = [(pattern.encode(), number) for pattern, number in job["overrides"]]
    if overrides:
        types = (low.llama_model_tensor_override * (len(overrides) + 1))(*overrides)
        params.tt_overrides = types
        keep.append(types)
    entries = low.llama_model_kv_override * (len(job["metadata"]) + 1)
    metadata = entries()
    for entry, (key, value) in zip(metadata, job["metadata"].items(), strict=False):
        entry.tag, entry.key, entry.value.val_str = _STRING_OVERRIDE, key.encode(), value.encode()
    params.kv_overrides = metadata
    if job["imatrix"] is not None:
        matrix = imatrix.read(Path(job["imatrix"]))
        data = (low.llama_model_imatrix_data * (len(matrix.entries) + 1))()
        for slot, (name, squares) in zip(data, matrix.entries.items(), strict=False):
            flat = np.ascontiguousarray(squares, dtype=np.float32)
            keep.append(flat)
            slot.name, slot.size = name.encode(), flat.size
            slot.data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = data
    code = low.llama_model_quantize(os.fsencode(job["source"]), os.fsencode(job["target"]), ctypes.byref(params))
    return {"code": int(code)}


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor` of the pinned llama.cpp; `_Ggml.check` holds it against the library's own accessors."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class _Ggml:
    """The functions of ggml that reading a tensor takes."""

    def __init__(self, low: Any) -> None:
        pointer = ctypes.POINTER(_Tensor)
        library = low._lib
        if sys.platform == "win32":  # there a library shows its own functions only
            library = ctypes.CDLL(str(Path(os.environ["LLAMA_CPP_LIB_PATH"]) / "ggml-base.dll"))

        def function(name: str, result: Any, *more: Any) -> Any:
            found = getattr(library, f"ggml_{name}")
            found.restype, found.argtypes = result, [pointer, *more]
            return found

        self._get = function("backend_tensor_get", None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
        self._nbytes, self._elements = function("nbytes", ctypes.c_size_t), function("nelements", ctypes.c_int64)
        self._op, self._name = function("op_desc", ctypes.c_char_p), function("get_name", ctypes.c_char_p)

    def check(self, tensor: Any) -> None:
        """Raise GgufloopError unless a tensor's fields are where this module has them; its name is among the last."""
        t = tensor.contents
        if t.name != self._name(tensor) or int(np.prod(t.ne)) != self._elements(tensor):
            raise GgufloopError("the tensors of this llama.cpp are laid out otherwise.", "run: ggufloop build")

    def op(self, tensor: Any) -> str:
        """'MUL_MAT' and the like."""
        return str(self._op(tensor).decode())

    def read(self, tensor: Any, dtype: type[np.generic]) -> NDArray[Any]:
        """A tensor's values, from whichever device holds them; the axes as numpy has them, the longest stride first."""
        t = tensor.contents
        raw = np.empty(self._nbytes(tensor), dtype=np.uint8)
        self._get(tensor, raw.ctypes.data, 0, raw.size)
        return np.lib.stride_tricks.as_strided(
            raw.view(dtype), shape=tuple(reversed(t.ne)), strides=tuple(reversed(t.nb)), writeable=False
        )


class Collector:
    """Sums of squares of what enters each weight matrix of the layers, by its name: (matrices, columns).

    A matrix of experts has a row of sums per expert, each over the tokens that were routed there.
    """

    def __init__(self, ggml: _Ggml) -> None:
        self._ggml = ggml
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.counts: dict[str, NDArray[np.int64]] = {}
        self.failed: str | None = None

    def __call__(self, tensor: int, ask: bool, _user: int | None) -> bool:
        """The scheduler's callback: whether a node is wanted, and then its values. Never raises: C could not tell."""
        t = ctypes.cast(tensor, ctypes.POINTER(_Tensor))
        try:
            op = self._ggml.op(t)
            if op not in ("MUL_MAT", "MUL_MAT_ID"):
                return not ask
            name = self._weight(t.contents.src[0])
            if ask:
                self._ggml.check(t)
                return name is not None and t.contents.src[1].contents.type == _F32
            if name is not None:
                (self._experts if op == "MUL_MAT_ID" else self._matrix)(t.contents, name)
        except Exception as e:
            self.failed = f"{type(e).__name__}: {e}"
            return False
        return True

    def _weight(self, tensor: Any) -> str | None:
        """The name of a layer's weight matrix, None for anything else that is multiplied."""
        name: str = tensor.contents.name.decode(errors="replace")
        name = name.split("#")[1] if name.count("#") >= 2 else name  # a copy on another device: CUDA0#blk.0...#0
        return name if name.startswith("blk.") and name.endswith(".weight") else None

    def _slot(self, name: str, matrices: int, columns: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        sums = self.sums.setdefault(name, np.zeros((matrices, columns)))
        return sums, self.counts.setdefault(name, np.zeros(matrices, dtype=np.int64))

    def _matrix(self, node: _Tensor, name: str) -> None:
        rows = self._ggml.read(node.src[1], np.float32).astype(np.float64)
        n3, n2 = node.src[0].contents.ne[3], node.src[0].contents.ne[2]
        sums, counts = self._slot(name, n3 * n2, rows.shape[-1])
        for i3 in range(rows.shape[0]):
            for i2 in range(rows.shape[1]):
                at = (i3 % n3) * n2 + i2 % n2
                sums[at] += np.square(rows[i3, i2]).sum(axis=0)
                counts[at] += rows.shape[2]

    def _experts(self, node: _Tensor, name: str) -> None:
        rows = self._ggml.read(node.src[1], np.float32)[0].astype(np.float64)  # (tokens, 1 or used, columns)
        chosen = self._ggml.read(node.src[2], np.int32)[0, 0]  # (tokens, used)
        sums, counts = self._slot(name, node.src[0].contents.ne[2], rows.shape[-1])
        for i in range(chosen.shape[1]):
            np.add.at(sums, chosen[:, i], np.square(rows[:, i % rows.shape[1]]))
            np.add.at(counts, chosen[:, i], 1)


def collect(low: Any, job: dict[str, Any], send: Send) -> dict[str, Any]:
    """An importance matrix of the plain model. job: model, target, text, dataset, n_ctx, chunks, threads."""
    import llama_cpp

    collector = Collector(_Ggml(low))
    callback = low.ggml_backend_sched_eval_callback(collector)
    params = low.llama_model_default_params()
    model = low.llama_model_load_from_file(os.fsencode(job["model"]), params)
    if not model:
        raise GgufloopError(f"llama.cpp cannot load {job['model']}.", "run with -v to see llama.cpp's own log.")
    vocab = low.llama_model_get_vocab(model)
    n_ctx = job["n_ctx"]
    tokens = _tokenize(llama_cpp, vocab, job["text"])
    found = len(tokens) // n_ctx
    if found == 0:
        raise GgufloopError(
            f"the text of the importance matrix has {len(tokens)} tokens, and one chunk takes {n_ctx}.",
            "give a longer text; some 100000 tokens are usual.",
        )
    chunks = min(found, job["chunks"] or found)
    settings = low.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = n_ctx
    settings.n_threads = settings.n_threads_batch = job["threads"] or os.cpu_count() or 1
    settings.cb_eval = callback
    ctx = low.llama_init_from_model(model, settings)
    if not ctx:
        raise GgufloopError(f"llama.cpp cannot make a context of {n_ctx} tokens.", "give a smaller one.")
    memory = low.llama_get_memory(ctx)
    step = min(_BATCH, n_ctx) if memory else n_ctx  # a model without a cache takes a chunk as one
    batch = low.llama_batch_init(step, 0, 1)
    for i in range(chunks):
        chunk = tokens[i * n_ctx : (i + 1) * n_ctx]
        if low.llama_vocab_get_add_bos(vocab):
            chunk[0] = low.llama_vocab_bos(vocab)
        if memory:
            low.llama_memory_clear(memory, True)
        for begin in range(0, n_ctx, step):
            part = chunk[begin : begin + step]
            batch.n_tokens = len(part)
            for j, token in enumerate(part):
                batch.token[j], batch.pos[j] = token, begin + j
                batch.n_seq_id[j], batch.seq_id[j][0] = 1, 0
                batch.logits[j] = True  # else the last layer would see one token only
            if low.llama_decode(ctx, batch) != 0 or collector.failed:
                what = collector.failed or "run with -v to see its log"
                raise GgufloopError(f"llama.cpp could not evaluate chunk {i + 1}: {what}.", "try another text.")
        send({"chunk": [i + 1, chunks]})
    if not collector.sums:
        raise GgufloopError("no matrix multiplication of this model could be read.", "quantise without --imatrix.")
    bad = next((name for name, sums in collector.sums.items() if not np.isfinite(sums).all()), None)
    if bad is not None:
        raise GgufloopError(f"the activations that enter {bad} are not finite.", "this file is damaged: get it again.")
    imatrix.write(Path(job["target"]), collector.sums, collector.counts, job["dataset"], chunks, n_ctx, job["recipe"])
    low.llama_batch_free(batch)
    low.llama_free(ctx)
    low.llama_model_free(model)
    return {"chunks": chunks}


def _tokenize(llama_cpp: Any, vocab: Any, text: str) -> list[int]:
    data = text.encode()
    room = len(data) + 8
    out = (llama_cpp.llama_token * room)()
    n = llama_cpp.llama_tokenize(vocab, data, len(data), out, room, True, False)
    return list(out[: max(n, 0)])


def main() -> None:
    """Do the jobs that come in, one line each, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends this process
    send = process.answers()
    try:
        library.activate()
        from llama_cpp import llama_cpp as low

        def log(level: int, text: bytes, _user: int | None) -> None:
            send({"log": text.decode(errors="replace"), "level": level})

        keep = low.llama_log_callback(log)
        low.llama_log_set(keep, ctypes.c_void_p(0))
        low.llama_backend_init()
    except GgufloopError as e:
        process.send_error(send, e)
        return
    process.serve_jobs(send, lambda job: quantize(low, job) if job["kind"] == "quantise" else collect(low, job, send))
