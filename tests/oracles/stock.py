"""Logits of the unpatched library, in a process of its own: one process can hold only one llama.cpp.

rows = stock.logits(path, steps, n_ctx=512)          # steps: lists of tokens; all their rows, in order
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

_PROGRAM = """
import json, sys
import numpy as np
from ggufloop.backend import library
assert library.activate(stock=True).stock
from ggufloop.engine import LoopedLlama
job = json.loads(sys.argv[1])
llm = LoopedLlama(job["path"], verbose=False, **job["settings"])
np.save(job["out"], np.concatenate([llm.logits(step) for step in job["steps"]]))
"""


def logits(path: Path, steps: Sequence[Sequence[int]], **settings: Any) -> np.ndarray:
    """Float32 (tokens, n_vocab) of the steps evaluated one after the other."""
    with TemporaryDirectory() as folder:
        out = f"{folder}/rows.npy"
        job = {"path": str(path), "settings": settings, "steps": [list(s) for s in steps], "out": out}
        subprocess.run([sys.executable, "-c", _PROGRAM, json.dumps(job)], check=True)
        return np.load(out)
