"""How far the weights of a quantised file are from those they were made of: signal to noise, tensor by tensor.

    tensors = tensor_snr(path, reference)        # reference=None: an estimate from the file alone
    window_snr(tensors, (12, 16))                # dB
    by_layer(tensors)                            # one Share per layer, and one for what is outside the layers

With a reference, SNR = 10 log10(sum w^2 / sum (q - w)^2), w of the reference and q of the file. Several tensors are
taken as one long vector: signals and noises are added. Norms and biases, which no type quantises, stay out of it.

Without one, rounding to a grid of step s errs by s^2 / 12 on average, and the steps are in the file; what they leave
out (the ends of a block's range, the search for a better scale) is a constant per type, in OFFSETS. Types without
equal steps get what FORMATS says of them, because the SNR of weights is nearly a property of the format. Neither sees
what was lost before: of a file made from a quantised one only the last loss is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.models.gguf import Array, Header, read_model
from ggufloop.models.weights import StoredTensor, decode, finite, half, locate, slabs, weights
from ggufloop.progress import Progress, Step, silent

FORMATS = {
    "Q8_0": (45.41, 43.42, 43.27), "Q6_K": (35.00, 33.25, 33.26), "Q5_K": (28.83, 27.36, 27.47),
    "Q5_1": (28.42, 27.05, 27.17), "Q5_0": (27.36, 25.42, 25.30), "Q4_K": (22.92, 21.44, 21.58),
    "IQ4_NL": (22.36, 21.12, 21.01), "IQ4_XS": (22.29, 21.05, 20.93), "Q4_1": (22.13, 20.75, 20.88),
    "Q4_0": (21.30, 19.41, 19.29), "MXFP4": (18.85, 17.95, 17.94), "Q3_K": (16.43, 15.10, 15.05),
    "IQ3_S": (15.57, 14.13, 14.44), "IQ3_XXS": (13.40, 12.10, 12.29), "Q2_K": (10.55, 9.30, 9.54),
    "IQ2_S": (11.53, 9.78, 9.94), "IQ2_XS": (10.47, 9.66, 9.59), "IQ2_XXS": (9.27, 8.28, 8.14),
    "IQ1_M": (4.69, 4.65, 4.46), "IQ1_S": (6.27, 5.27, 5.07),
}  # fmt: skip
"""Measured SNR in dB of each type, without an importance matrix: normal, Laplace and t (5 degrees) weights."""

EXACT = ("F32", "F16", "BF16")
_INTEGERS = ("I8", "I16", "I32", "I64")  # tables, not weights
STEPS, FORMAT, REFERENCE, UNQUANTISED = "steps", "format", "reference", "unquantised"
"""How a noise is known."""


@dataclass(frozen=True)
class TensorSnr:
    """Signal and noise of one tensor: sums of squares over its n weights.

    layer: None outside the layers. bits: per weight, as stored. method: REFERENCE; without one STEPS, FORMAT, or
    UNQUANTISED, whose noise is 0.
    """

    name: str
    layer: int | None
    type: str
    shape: tuple[int, ...]
    n: int
    bits: float
    signal: float
    noise: float
    method: str

    @property
    def snr_db(self) -> float:
        """inf for a tensor that is the same as its reference, nan for one of zeros."""
        return decibel(self.signal, self.noise)

    @property
    def estimated(self) -> bool:
        """Whether the noise is inferred from the file alone."""
        return self.method != REFERENCE

    @property
    def is_matrix(self) -> bool:
        """Whether it counts in the SNR of a layer: norms and biases do not."""
        return len(self.shape) > 1


@dataclass(frozen=True)
class Share:
    """The matrices of one layer (None: those outside the layers) taken as one. types: the largest first."""

    layer: int | None
    types: tuple[str, ...]
    n: int
    bits: float
    signal: float
    noise: float
    estimated: bool

    @property
    def snr_db(self) -> float:
        """As TensorSnr's."""
        return decibel(self.signal, self.noise)


def decibel(signal: float, noise: float) -> float:
    """10 log10 of their ratio; inf without noise, nan without signal."""
    if signal <= 0:
        return math.nan
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


# the steps of each type, from its blocks: uint8 (blocks, bytes) -> float32 (blocks, steps in a block)


def _one_scale(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return half(blocks, 0)


def _q6_k(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)


def _q45_k(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Eight scales of 6 bits: four whole, the next four with their upper bits on top of the first ones'."""
    packed = blocks[:, 4:16]
    low, high = packed[:, :4] & 63, (packed[:, 8:12] & 15) | ((packed[:, :4] >> 6) << 4)
    return half(blocks, 0) * np.concatenate([low, high], axis=1).astype(np.float32)


def _q3_k(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Sixteen scales of 6 bits, 32 too large: eight bytes of lower halves, four of upper pairs of bits."""
    packed = blocks[:, 96:108]
    low: NDArray[np.uint8] = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high: NDArray[np.uint8] = np.concatenate([(packed[:, 8:12] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales: NDArray[np.float32] = (low | (high << 4)).astype(np.float32) - np.float32(32)
    return half(blocks, 108) * scales


def _q2_k(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)


_STEP = {
    "Q8_0": _one_scale, "Q4_0": _one_scale, "Q4_1": _one_scale, "Q5_0": _one_scale, "Q5_1": _one_scale,
    "Q6_K": _q6_k, "Q5_K": _q45_k, "Q4_K": _q45_k, "Q3_K": _q3_k, "Q2_K": _q2_k,
}  # fmt: skip

OFFSETS = {
    "Q8_0": 0.12, "Q6_K": 0.65, "Q5_K": 0.6, "Q5_1": 0.26, "Q5_0": 0.1, "Q4_K": 1.05, "Q4_1": 0.24, "Q4_0": 0.08,
    "Q3_K": 0.35, "Q2_K": 0.6,
}  # fmt: skip
"""dB by which the SNR of each type is better than its steps alone say."""


def _difference(of: StoredTensor, to: StoredTensor) -> tuple[float, float]:
    """Sums of squares of `to`, and of `of` minus `to`; their blocks may differ in size."""
    signal = noise = 0.0
    left, right = weights(of), weights(to)
    a = b = np.empty(0, dtype=np.float32)
    for _ in range(of.tensor.elements + 1):
        a = next(left, a) if not a.size else a
        b = next(right, b) if not b.size else b
        n = min(a.size, b.size)
        if n == 0:
            break
        w = b[:n].astype(np.float64)
        signal += float(np.dot(w, w))
        w -= a[:n]
        noise += float(np.dot(w, w))
        a, b = a[n:], b[n:]
    return signal, noise


def _estimate(stored: StoredTensor) -> tuple[float, float, str]:
    """Sums of squares of a tensor, and what its noise is likely to be, with the method."""
    kind = stored.tensor.type
    signal = noise = 0.0
    for blocks in slabs(stored):
        w = finite(decode(blocks, kind), stored).astype(np.float64)
        signal += float(np.dot(w, w))
        if kind in _STEP:
            steps = _STEP[kind](blocks).astype(np.float64)
            noise += float(np.square(steps).mean()) * w.size / 12
    if kind in EXACT:
        return signal, 0.0, UNQUANTISED
    if kind in _STEP:
        return signal, noise / 10 ** (OFFSETS[kind] / 10), STEPS
    if kind not in FORMATS:
        raise GgufloopError(
            f"{stored.tensor.name} is {kind}, whose SNR cannot be estimated without a reference.", "give --ref FILE."
        )
    return signal, signal / 10 ** (sorted(FORMATS[kind])[1] / 10), FORMAT


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" and len(parts) > 2 and parts[1].isdigit() else None


def check_reference(headers: Sequence[Header], reference: Sequence[Header]) -> None:
    """Raise GgufloopError unless `reference` holds the same model: architecture, tensors, shapes and tokenizer."""
    a, b = headers[0], reference[0]

    def other(what: str) -> GgufloopError:
        return GgufloopError(
            f"{b.path} is no reference of {a.path}: {what}.", "give a file of the same model, in F16 for example."
        )

    for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"):
        if a.text(key) != b.text(key):
            raise other(f"its {key} is {b.text(key)!r}, not {a.text(key)!r}")
    shapes, others = ({t.name: t.shape for h in hs for t in h.tensors} for hs in (headers, reference))
    for name, shape in shapes.items():
        if name not in others:
            raise other(f"it has no tensor {name}")
        if others[name] != shape:
            raise other(f"{name} is {_shape(others[name])} there and {_shape(shape)} here")
    more = next((name for name in others if name not in shapes), None)
    if more is not None:
        raise other(f"it has a tensor {more} more")
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        tokens, theirs = a.metadata.get(key), b.metadata.get(key)
        if isinstance(tokens, Array) and isinstance(theirs, Array) and tokens.digest != theirs.digest:
            raise other(
                "its tokenizer has other tokens" if key.endswith("tokens") else "its tokenizer merges otherwise"
            )


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)


def tensor_snr(path: Path, reference: Path | None = None, *, progress: Progress = silent) -> list[TensorSnr]:
    """Signal and noise of every tensor of the model at `path`, in the file's order; a million weights held at once.

    reference: a file of the same model with more bits; None: an estimate (the module's docstring). Raises
    GgufloopError.
    """
    headers = read_model(path)
    tensors = {name: stored for name, stored in locate(headers).items() if stored.tensor.type not in _INTEGERS}
    others: dict[str, StoredTensor] = {}
    if reference is not None:
        if reference.exists() and reference.samefile(path):
            raise UsageError(f"{reference} is the file itself.", "give a file of the same model with more bits.")
        other = read_model(reference)
        check_reference(headers, other)
        others = locate(other)
    out = []
    for i, (name, stored) in enumerate(tensors.items(), 1):
        progress(Step(name, i, len(tensors), "tensor"))
        if reference is None:
            signal, noise, method = _estimate(stored)
        else:
            (signal, noise), method = _difference(stored, others[name]), REFERENCE
        t = stored.tensor
        out.append(
            TensorSnr(name, _layer(name), t.type, t.shape, t.elements, 8 * t.nbytes / t.elements, signal, noise, method)
        )
    return out


def _share(layer: int | None, tensors: Sequence[TensorSnr]) -> Share:
    n = sum(t.n for t in tensors)
    sizes: dict[str, int] = {}
    for t in tensors:
        sizes[t.type] = sizes.get(t.type, 0) + t.n
    return Share(
        layer,
        tuple(sorted(sizes, key=lambda kind: (-sizes[kind], kind))),
        n,
        sum(t.n * t.bits for t in tensors) / n,
        sum(t.signal for t in tensors),
        sum(t.noise for t in tensors),
        any(t.estimated for t in tensors),
    )


def by_layer(tensors: Sequence[TensorSnr]) -> list[Share]:
    """The matrices of each layer taken as one, in order; last those outside the layers, if there are any."""
    layers = sorted({t.layer for t in tensors if t.layer is not None and t.is_matrix})
    order: list[int | None] = [*layers, None]
    groups = [(il, [t for t in tensors if t.layer == il and t.is_matrix]) for il in order]
    return [_share(il, group) for il, group in groups if group]


def window_share(tensors: Sequence[TensorSnr], window: tuple[int, int]) -> Share:
    """The matrices of the layers a to b-1 taken as one. Raises UsageError if there are none."""
    a, b = window
    inside = [t for t in tensors if t.layer is not None and a <= t.layer < b and t.is_matrix]
    if {t.layer for t in inside} != set(range(a, b)) or a >= b:
        last = max((t.layer for t in tensors if t.layer is not None), default=-1)
        raise UsageError(
            f"window {a}:{b} is out of range: the file has layers 0 to {last}.", f"use 0:{last + 1} at most."
        )
    return _share(None, inside)


def window_snr(tensors: Sequence[TensorSnr], window: tuple[int, int]) -> float:
    """SNR in dB of the matrices of a window taken as one. Raises UsageError for layers the file does not have."""
    return window_share(tensors, window).snr_db


def total(tensors: Sequence[TensorSnr]) -> Share:
    """All matrices of the file taken as one."""
    return _share(None, [t for t in tensors if t.is_matrix] or list(tensors))
