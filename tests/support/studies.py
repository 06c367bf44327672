"""A study made up of numbers, as `compare` writes one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ggufloop.loop import PLAIN
from ggufloop.study import file as study
from ggufloop.study.file import Chunk, File, Study, StudyHeader

LOOPS = ("2:5 k=2", "2:5 k=3 solver=naive")
HEADER = StudyHeader(
    "m.gguf", "a" * 64, "Q4_1", "llama", 7, 1000, 300, "F32", (2, 5), "pydoc", "b" * 64, 64,
    {"threads": "1", "flash_attn": "True"}, "0.1.0", "p1",
)  # fmt: skip
FILES = (
    File("F32", "c" * 64, 4000, 32.0, math.inf, math.inf),
    File("Q4_0", "d" * 64, 600, 4.5, 21.5, 20.5, "2 tensors as Q5_0"),
)


def numbers(seed: int, n: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"nll": rng.normal(3, 0.3, n), "kl": rng.gamma(4, 0.01, n), "seconds": rng.uniform(1, 2, n)}


def written(path: Path, chunks: int = 8, header: StudyHeader = HEADER) -> Study:
    """A study of two files under two loops; looped Q4_0 is better by 0.1 under the first, and 2.5 times as far off."""
    s = study.create(path, header)
    for file in FILES:
        s = study.add_file(path, s, file)
    base = numbers(1, chunks)
    for file in FILES:
        for loop, shift, factor in ((PLAIN, 0.0, 1.0), (LOOPS[0], -0.1, 2.5), (LOOPS[1], 0.0, 1.0)):
            jitter = np.random.default_rng(5).normal(0, 0.01, chunks) if loop == LOOPS[1] else np.zeros(chunks)
            for i in range(chunks):
                nll = float(base["nll"][i] + shift + jitter[i])
                kl = float(base["kl"][i] * factor) if file is FILES[1] else 0.0
                study.add_chunk(path, file.type, loop, Chunk(i, 31, 90, nll, nll**2 + 2, kl, 0.9, base["seconds"][i]))
    return study.read(path)
