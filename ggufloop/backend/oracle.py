"""Small llama models of every weight type that llama.cpp has kernels of its own for, and what numpy says they compute.

    model = TinyModel("Q4_1", folder)              # model.path is a GGUF file whose matrices are all of that type
    rows = model.logits(loop)                  # float32 (66, 264): the prompt's 65 rows, then the next token's

A library is verified against these numbers, so nothing here asks the library: quantised matrices are random blocks,
taken apart by gguf-py; the forward pass is the plain formulas. Shapes are chosen for the kernels: rows of 512 and
768 numbers, outputs by the 32 for the tiled ones, but 264 words, which only take those that work on 8 rows at once.
Every branch moves the state by about its own size, so that what one of them gets wrong is seen at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from ggufloop.loop import LoopSpec

Array = NDArray[np.float32]

N_LAYER, N_EMBD, N_FF, N_VOCAB = 4, 512, 768, 264
N_HEAD, N_HEAD_KV, HEAD = 8, 2, 64
EPS, ROPE_BASE = 1e-5, 10000.0
WINDOW = (1, 3)
N_PROMPT = 65  # 64 columns are the smallest full tile of every kernel; one more is the rest beside it

# Where a block of the type has its float16 scales: offset -> its size in units of the first. The negative and the
# second ones are offsets, which here take away the mean that the unsigned numbers of the type have.
_SCALES: dict[str, dict[int, float]] = {
    "Q4_0": {0: 1},
    "Q4_1": {0: 1, 2: -7.5},
    "Q5_0": {0: 1},
    "Q5_1": {0: 1, 2: -15.5},
    "Q8_0": {0: 1},
    "Q2_K": {80: 1, 82: 1.5},
    "Q3_K": {108: 1},
    "Q4_K": {0: 1, 2: 7.5},
    "Q5_K": {0: 1, 2: 15.5},
    "Q6_K": {208: 1},
    "IQ4_NL": {0: 1},
    "IQ4_XS": {0: 1},
}
TYPES = ("F32", "F16", "BF16", *_SCALES, "MXFP4")

_LAYER: dict[str, tuple[int, int, float]] = {  # rows, columns, gain
    "attn_q": (N_HEAD * HEAD, N_EMBD, 0.5),
    "attn_k": (N_HEAD_KV * HEAD, N_EMBD, 1.0),
    "attn_v": (N_HEAD_KV * HEAD, N_EMBD, 1.0),
    "attn_output": (N_EMBD, N_HEAD * HEAD, 1.0),
    "ffn_gate": (N_FF, N_EMBD, 1.0),
    "ffn_up": (N_FF, N_EMBD, 1.0),
    "ffn_down": (N_EMBD, N_FF, 1.0),
}


def _random(kind: str, rng: np.random.Generator, rows: int, columns: int, gain: float) -> NDArray[Any]:
    """A matrix as the file holds it, of mean 0 and standard deviation gain / sqrt(columns)."""
    wanted = gain / np.sqrt(columns)
    if kind in ("F32", "F16", "BF16"):
        plain = (wanted * rng.standard_normal((rows, columns), dtype=np.float32)).astype(np.float32)
        return quantize(plain, GGMLQuantizationType[kind])
    width, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * columns // width, size), dtype=np.uint8)
    if kind == "Q8_0":
        np.maximum(blocks[:, 2:].view(np.int8), -127, out=blocks[:, 2:].view(np.int8))  # no quantiser writes -128
    if kind == "MXFP4":  # a power of two
        blocks[:, 0] = 128
        blocks[:, 0] = 128 + np.round(np.log2(wanted / _deviation(blocks, kind))) + rng.integers(-1, 1, len(blocks))
        return blocks.reshape(rows, -1)
    spread = rng.uniform(0.5, 1.5, (len(blocks), 1))
    if len(_SCALES[kind]) == 1:
        spread *= rng.choice((-1, 1), (len(blocks), 1))  # -8 to 7 has no mean of 0 either
    for unit in (1.0, None):
        unit = unit or wanted / _deviation(blocks, kind)
        for offset, size_of in _SCALES[kind].items():
            blocks[:, offset : offset + 2] = (unit * size_of * spread).astype("<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def _deviation(blocks: NDArray[np.uint8], kind: str) -> float:
    """Standard deviation of what the blocks hold; 256 of them tell it."""
    return float(_numbers(blocks[:256], kind).std())


def _numbers(stored: NDArray[Any], kind: str) -> Array:
    """What stored weights are, in one row: gguf-py works by 16 rows, which for short ones takes most of its time."""
    return dequantize(stored.reshape(1, -1), GGMLQuantizationType[kind]).astype(np.float32)


class TinyModel:
    """One weight type's file in `folder` and its forward pass."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.path = kind, folder / f"{kind}.gguf"
        rng = np.random.default_rng(TYPES.index(kind))
        stored = {"token_embd": _random(kind, rng, N_VOCAB, N_EMBD, N_EMBD**0.5)}
        stored["output"] = _random(kind, rng, N_VOCAB, N_EMBD, 2.0)
        for name, (rows, columns, gain) in _LAYER.items():
            for parity in (0, 1):  # layers two apart have the same weights: half the work
                stored[f"{parity}.{name}"] = _random(kind, rng, rows, columns, gain)
        names = [f"{il}.{name}" for il in range(N_LAYER) for name in ("attn_norm", "ffn_norm")]
        self.norms = {name: rng.uniform(0.5, 1.5, N_EMBD).astype(np.float32) for name in (*names, "output_norm")}
        self.weights: dict[str, Array] = {
            name: _numbers(data, kind).reshape(len(data), -1) for name, data in stored.items()
        }
        self.known: dict[Any, tuple[Array, tuple[Array, Array]]] = {}
        self.tokens = [int(token) for token in rng.integers(0, N_VOCAB, N_PROMPT + 1)]
        self._write(stored)

    def _write(self, stored: dict[str, NDArray[Any]]) -> None:
        writer = GGUFWriter(self.path, "llama")
        for name, value in (
            ("block_count", N_LAYER), ("context_length", 1024), ("embedding_length", N_EMBD),
            ("feed_forward_length", N_FF), ("head_count", N_HEAD), ("head_count_kv", N_HEAD_KV),
            ("layer_norm_rms_eps", EPS), ("rope_freq_base", ROPE_BASE), ("rope_dimension_count", HEAD),
            ("vocab_size", N_VOCAB), ("tokenizer_model", "none"),
        ):  # fmt: skip
            getattr(writer, f"add_{name}")(value)
        kind = GGMLQuantizationType[self.kind]

        def add(name: str, data: NDArray[Any]) -> None:
            writer.add_tensor(f"{name}.weight", data, raw_dtype=None if self.kind in ("F32", "F16") else kind)

        add("token_embd", stored["token_embd"])
        add("output", stored["output"])
        for il in range(N_LAYER):
            for name in _LAYER:
                add(f"blk.{il}.{name}", stored[f"{il % 2}.{name}"])
        for name, data in self.norms.items():
            writer.add_tensor(f"blk.{name}.weight" if name[0].isdigit() else f"{name}.weight", data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def times(self, x: Array, name: str) -> Array:
        """The one multiplication there is: rows of x with a matrix, which is what kernels get wrong."""
        product: Array = x @ self.weights[name].T
        return product

    def logits(self, loop: LoopSpec | None) -> Array:
        """Rows of the prompt, evaluated as one batch, and of one more token after it."""
        run = _Run(self, loop)
        return np.concatenate([run.step(self.tokens[:N_PROMPT]), run.step(self.tokens[N_PROMPT:])])


class _Run:
    """A context: what it has seen, by (layer, pass)."""

    def __init__(self, model: TinyModel, loop: LoopSpec | None) -> None:
        self.model, self.loop = model, loop
        self.seen: dict[tuple[int, int], tuple[Array, Array]] = {}
        self.n_past = 0

    def step(self, tokens: list[int]) -> Array:
        """Evaluate tokens as one batch; float32 (tokens, N_VOCAB)."""
        x = self.model.weights["token_embd"][tokens]
        first, last = self.loop.window if self.loop else (N_LAYER, N_LAYER)
        fresh: dict[tuple[int, int], tuple[Array, Array]] = {}

        def layers(x: Array, which: range, number: int = 0) -> Array:
            for il in which:
                x = self._layer(x, il, number, fresh)
            return x

        x = layers(x, range(first))
        if self.loop:
            tableau = self.loop.tableau()
            moves: list[Array] = []  # f(y) of the evaluations so far
            for number, row in enumerate(tableau.A):
                y = x + _sum(row, moves)
                moves.append(layers(y, range(first, last), number) - y)
            x = x + _sum(tableau.B, moves)
        x = layers(x, range(last, N_LAYER))
        for key, pair in fresh.items():
            old = self.seen.get(key)
            self.seen[key] = (np.concatenate([old[0], pair[0]]), np.concatenate([old[1], pair[1]])) if old else pair
        self.n_past += len(tokens)
        return self.model.times(_norm(x, self.model.norms["output_norm"]), "output")

    def _layer(self, x: Array, il: int, number: int, fresh: dict[tuple[int, int], tuple[Array, Array]]) -> Array:
        known = (il, x.tobytes()) if self.n_past == 0 else None  # loops of one model begin with the same layers
        if known in self.model.known:
            x, fresh[il, number] = self.model.known[known]
            return x
        norms, times = self.model.norms, self.model.times
        n, part = len(x), il % 2
        h = _norm(x, norms[f"{il}.attn_norm"])
        q, k, v = (times(h, f"{part}.attn_{name}").reshape(n, -1, HEAD) for name in "qkv")
        positions = self.n_past + np.arange(n)
        q, k = _rope(q, positions), _rope(k, positions)
        fresh[il, number] = (k, v)
        # with kv=each an evaluation sees its own slot, else the first one's; of this batch always its own
        old = self.seen.get((il, number if self.loop and self.loop.kv == "each" else 0))
        if old:
            k, v = np.concatenate([old[0], k]), np.concatenate([old[1], v])
        grouped = q.reshape(n, N_HEAD_KV, N_HEAD // N_HEAD_KV, HEAD)
        scores = np.einsum("qghd,kgd->ghqk", grouped, k, optimize=True) / np.float32(np.sqrt(HEAD))
        scores = np.where(np.arange(len(k)) <= positions[:, None], scores, -np.inf)
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        mixed = np.einsum("ghqk,kgd->qghd", chances, v, optimize=True).reshape(n, N_HEAD * HEAD)
        x = x + times(mixed, f"{part}.attn_output")
        h = _norm(x, norms[f"{il}.ffn_norm"])
        gate = times(h, f"{part}.ffn_gate")
        hidden = gate / (1 + np.exp(-gate)) * times(h, f"{part}.ffn_up")
        x = x + times(hidden, f"{part}.ffn_down")
        if known:
            self.model.known[known] = x, fresh[il, number]
        return x


def _sum(factors: Any, moves: list[Array]) -> Array:
    return sum((np.float32(a) * move for a, move in zip(factors, moves, strict=False)), np.zeros((), np.float32))


def _norm(x: Array, weight: Array) -> Array:
    normed: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(EPS)) * weight
    return normed


def _rope(x: Array, positions: NDArray[Any]) -> Array:
    """Neighbouring pairs turned, as the llama architecture has them."""
    angles = (positions[:, None] * ROPE_BASE ** (-np.arange(0, HEAD, 2) / HEAD))[:, None, :]
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


# What rounding explains. With activations rounded to 8 bits in blocks of 256, the coarsest any kernel of the CPU does,
# numpy itself is 2.0 to 2.3 % away from these logits (test_verify.py); 16-bit ones (BF16) are five times finer.
# A scale that is 3 % off is 6 %, one wrong row of each matrix 8 % and more. A GPU may multiply in half precision and
# round activations of any type, so it gets the wider bound throughout. Rounding leaves the length of the logits as it
# is (0.3 % at most were seen), where a wrong scale of the last matrix shows.
_PLAIN_BOUND, _ROUNDED_BOUND, _LENGTH_BOUND = 0.01, 0.04, 0.01


def wrong(rows: Array, wanted: Array, kind: str, device: str) -> str:
    """What is wrong with the logits a device computed from weights of a type, "" if nothing is."""
    if not np.isfinite(rows).all():
        return "NaN" if np.isnan(rows).any() else "infinite numbers"
    exact = kind in ("F32", "F16", "BF16") and device == "CPU"
    bound = _PLAIN_BOUND if exact else _ROUNDED_BOUND
    error = float(np.linalg.norm(rows - wanted) / np.linalg.norm(wanted))
    if error > bound:
        return f"wrong by {100 * error:.1f} %, where rounding explains {100 * bound:.0f} %"
    length = float((rows * wanted).sum() / (wanted * wanted).sum()) - 1
    if abs(length) > _LENGTH_BOUND:
        return f"{100 * abs(length):.1f} % too {'large' if length > 0 else 'small'}"
    return ""
