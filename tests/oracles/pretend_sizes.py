"""What the pretend GPU holds and how often it is called: a program, for a device is for good and for a whole process.

    python tests/oracles/pretend_sizes.py FOLDER LIBRARY  # {"bytes": {...}, "graphs": {...}}, by placement and loop

bytes: of its compute buffers, once a prompt of 64 tokens is computed by a model just opened. graphs: it is given for a
prompt of 8 tokens, for which it takes over nothing; the scheduler gives it one for each of its splits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from support import archs

from oracles import pretend

LARGE = archs.Row(
    "llama large", archs.KV, {"embedding_length": 256, "feed_forward_length": 1024}, window=(2, 6), n_layer=8
)
"""Layers of 3.75 MiB."""
LARGE_EXPERTS = archs.Row(
    "qwen3moe large", archs.KV, {**archs.MOE, "expert_count": 128, "expert_feed_forward_length": 64}, seed=2,
    window=(2, 6), n_layer=8,
)  # fmt: skip
"""Experts of 6 MiB a layer."""
SMALL = archs.Row("llama", archs.KV, window=(2, 6), n_layer=8)

LOOPS = ("plain", "k=3", "k=3 mode=layer", "k=3 kv=last", "k=3 kv=each", "k=3 kv=frozen", "k=6")
STRADDLING = 4
"""The layer from which on the device has them: the middle of the windows above."""


def _measure(path: Path, row: archs.Row, gpu: Any, place: str, loop: str, n: int) -> tuple[int, int]:
    """Bytes of compute buffers after a prompt of n tokens, and the graphs of that prompt."""
    from ggufloop.loop import LoopSpec

    with pretend.opened(path, place, STRADDLING - 1, row.n_layer, n_ubatch=64) as llm:
        a, b = row.window
        llm.set_loop(None if loop == "plain" else LoopSpec.parse(f"{a}:{b} {loop}"))
        before = gpu.pretend_gpu_graphs()
        llm.eval(np.random.default_rng(n).integers(0, 256, n).tolist())
        return gpu.pretend_gpu_compute_bytes(), gpu.pretend_gpu_graphs() - before


def main(folder: Path, library: Path) -> None:
    gpu = pretend.register(library)
    from support import zoo

    sizes: dict[str, dict[str, int]] = {}
    graphs: dict[str, dict[str, int]] = {}
    for row, place in ((LARGE, "none"), (LARGE_EXPERTS, "host-experts"), (LARGE_EXPERTS, "none")):
        path = zoo.write(folder / "large.gguf", row)
        sizes[f"{row.name} {place}"] = {loop: _measure(path, row, gpu, place, loop, 64)[0] for loop in LOOPS}
    path = zoo.write(folder / "small.gguf", SMALL)
    for place in ("all", "straddling", "none", "host-kv"):
        graphs[place] = {loop: _measure(path, SMALL, gpu, place, loop, 8)[1] for loop in LOOPS}
    print(json.dumps({"bytes": sizes, "graphs": graphs}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
