"""Reads the weights of a GGUF model, a million at a time, whatever the size of its tensors.

    tensors = locate(read_model(path))
    for values in weights(tensors["blk.0.attn_q.weight"]): ...      # float32, flat

gguf's own reader turns every entry of a vocabulary into arrays first, which takes many times as long as the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggufloop.errors import GgufloopError
from ggufloop.models.gguf import Header, Tensor, type_sizes

_SLAB = 1 << 20  # weights held at once; some types take ten times their size while they are unpacked

_SMALL = {"Q2_0": (2, -1), "Q1_0": (1, -1)}
"""Types gguf does not read: an F16, then codes of so many bits, code 0 being so many times it; 1 bit means -1 or 1."""


def half(blocks: NDArray[np.uint8], at: int) -> NDArray[np.float32]:
    """The F16 at a byte of each block, as a column."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


@dataclass(frozen=True)
class StoredTensor:
    """Where the data of one tensor are."""

    tensor: Tensor
    path: Path
    offset: int


def locate(headers: Sequence[Header]) -> dict[str, StoredTensor]:
    """Every tensor by name: data follow the header in the order of the tensors, each start aligned."""
    found = {}
    for header in headers:
        alignment = header.number("general.alignment") or 32
        at = 0
        for tensor in header.tensors:
            found[tensor.name] = StoredTensor(tensor, header.path, header.data_start + at)
            at = (at + tensor.nbytes + alignment - 1) // alignment * alignment
    return found


def slabs(stored: StoredTensor) -> Iterator[NDArray[np.uint8]]:
    """The blocks of a tensor, a million weights at a time: uint8 (blocks, bytes of one)."""
    block, size = next((b, s) for name, b, s in type_sizes().values() if name == stored.tensor.type)
    blocks, at_once = stored.tensor.elements // block, max(_SLAB // block, 1)
    with stored.path.open("rb") as f:
        f.seek(stored.offset)
        for begin in range(0, blocks, at_once):
            n = min(at_once, blocks - begin)
            data = f.read(n * size)
            if len(data) != n * size:
                raise GgufloopError(f"{stored.path} ended while it was read.", "was it changed? Run it again.")
            yield np.frombuffer(data, dtype=np.uint8).reshape(n, size)


def decode(blocks: NDArray[np.uint8], type: str) -> NDArray[np.float32]:
    """The weights of some blocks, flat. Raises GgufloopError for a type that cannot be read."""
    values: NDArray[np.float32]
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    flat = np.ascontiguousarray(blocks)
    try:
        if type == "F32":
            return flat.view(np.float32).reshape(-1)
        if type == "F16":
            return flat.view(np.float16).astype(np.float32).reshape(-1)
        if type in _SMALL:
            bits, lowest = _SMALL[type]
            shifts = np.arange(0, 8, bits, dtype=np.uint8)
            codes = (flat[:, 2:, None] >> shifts & (1 << bits) - 1).reshape(len(flat), -1)
            return (half(flat, 0) * (codes.astype(np.float32) * (3 - bits) + lowest)).reshape(-1)
        values = dequantize(flat.reshape(1, -1), GGMLQuantizationType[type])
    except (KeyError, NotImplementedError):  # gguf's own: a type it has no number for, or cannot take apart
        raise GgufloopError(f"tensors of type {type} cannot be read here.", "leave this file out.") from None
    return values.reshape(-1)


def weights(stored: StoredTensor) -> Iterator[NDArray[np.float32]]:
    for blocks in slabs(stored):
        yield finite(decode(blocks, stored.tensor.type), stored)


def finite(values: NDArray[np.float32], stored: StoredTensor) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise GgufloopError(
            f"{stored.tensor.name} of {stored.path} has weights that are not finite.", "get the file again."
        )
    return values
