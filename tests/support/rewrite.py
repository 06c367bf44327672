"""A GGUF file of F32 tensors, written again with other metadata or other tensors.

rewritten(path, tmp_path / "m.gguf", {"tokenizer.ggml.pre": "nobody-knows"})
rewritten(path, tmp_path / "m.gguf", tensors=lambda name, data: {} if name == "output_norm.weight" else {name: data})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter

from support import tiny

Tensors = Callable[[str, np.ndarray], Mapping[str, np.ndarray]]


def rewritten(
    path: Path,
    out: Path,
    keys: Mapping[str, Any] | None = None,
    tensors: Tensors = lambda name, data: {name: data},
) -> Path:
    """The copy. keys: values that are other ones, or more; tensors: what stands in the place of each, by name."""
    reader, keys = GGUFReader(path), keys or {}
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, f in reader.fields.items():
        if key != "general.architecture" and key[:5] != "GGUF." and key not in keys:
            writer.add_key_value(key, f.contents(), f.types[0], sub_type=f.types[-1] if len(f.types) > 1 else None)
    for key, value in keys.items():
        tiny.add(writer, key, value)
    for t in reader.tensors:
        for name, data in tensors(t.name, np.array(t.data, dtype=np.float32)).items():
            writer.add_tensor(name, np.ascontiguousarray(data, dtype=np.float32))
    return tiny.finish(writer, out)


def replacing(others: Mapping[str, np.ndarray]) -> Tensors:
    """`tensors` of `rewritten`: these in the place of those of their names."""
    return lambda name, data: {name: others.get(name, data)}
