"""A GGUF file as metadata of its architecture and float64 tensors.

    file = GGUFFile(path)
    file.get("attention.head_count")     # the key below the architecture's prefix
    file.weight("blk.0.attn_q.weight")   # torch float64, rows of outputs

Tensors that were never asked for are listed by `unread`: a model with parts the reference does not know is refused,
not computed without them.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from ggufloop.errors import GgufloopError

_REQUIRED = object()


class GGUFFile:
    """An open GGUF file. Raises GgufloopError if it cannot be read as one."""

    def __init__(self, path: str | PathLike[str]) -> None:
        try:
            self._reader = GGUFReader(path)
            self._tensors = {t.name: t for t in self._reader.tensors}
            self.arch: str = self._reader.fields["general.architecture"].contents()
        except (OSError, ValueError, KeyError, IndexError) as e:
            raise GgufloopError(f"{path} cannot be read as a GGUF file: {e}.", "give the path of a whole model.") from e
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `<architecture>.<key>`; without a default a missing key is a GgufloopError."""
        field = self._reader.fields.get(f"{self.arch}.{key}")
        if field is not None:
            return field.contents()
        if default is _REQUIRED:
            raise GgufloopError(f"the model file has no {self.arch}.{key}.", "convert the model again.")
        return default

    def has(self, name: str) -> bool:
        """Whether the file holds a tensor of this name."""
        return name in self._tensors

    def weight(self, name: str) -> torch.Tensor:
        """The tensor, dequantised to float64; dimensions in torch's order (the reverse of GGUF's)."""
        if name not in self._tensors:
            raise GgufloopError(f"the model file has no tensor {name}.", "convert the model again.")
        self._read.add(name)
        t = self._tensors[name]
        flat = dequantize(t.data, t.tensor_type)
        return torch.from_numpy(flat.reshape(tuple(reversed(t.shape.tolist()))).astype(np.float64))

    def optional(self, name: str) -> torch.Tensor | None:
        """The tensor, or None if the file has no such."""
        return self.weight(name) if self.has(name) else None

    def unread(self) -> list[str]:
        """Names of the tensors no one has asked for."""
        return sorted(self._tensors.keys() - self._read)
