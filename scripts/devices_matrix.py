#!/usr/bin/env python3
"""Split tiny models of every architecture over two RPC servers and compare with the CPU: plain and four loops.

    python scripts/devices_matrix.py                       # all rows of tests/support/archs.py, some 15 minutes
    python scripts/devices_matrix.py llama "gemma4 moe"    # these rows

One line per row and split: the largest difference of any logit, per loop; docs/devices.md quotes them. Each row runs in
a process of its own, since llama.cpp ends the process where it cannot split, and sometimes the server's, which is then
started anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import archs, rpc_worker  # noqa: E402  # found once the path is set

LOOPS = ("", "k=3", "k=3 kv=each", "k=3 kv=frozen", "k=3 mode=layer kv=last")


def compare(name: str, folder: Path, servers: str) -> None:
    """Print the row's lines; in a process of its own."""
    import numpy as np
    from oracles import matrix
    from support import zoo

    from ggufloop.engine import LoopedLlama
    from ggufloop.errors import GgufloopError

    row = archs.ROWS[name]
    path = zoo.write(folder / "model.gguf", row)
    loops = [loop and "{}:{} {}".format(*row.window, loop) for loop in LOOPS[: 3 if row.recurrent else 5]]

    def logits(**settings: object) -> list[np.ndarray]:
        llm = LoopedLlama(path, **matrix.SETTINGS, verbose=False, **settings)
        found = []
        for loop in loops:
            llm.set_loop(loop or None)
            llm.reset()
            found.append(np.concatenate([llm.logits(step) for step in matrix.steps(row)]))
        llm.close()
        return found

    for split, shared in (
        ("layer", {"flash_attn": row.flash_attn}),
        ("tensor", {"flash_attn": True}),
    ):
        try:
            here = logits(**shared)
            there = logits(**shared, rpc_servers=servers, split_mode=split, tensor_split="1,1")
            words = " ".join(f"{np.abs(a - b).max():.1e}" for a, b in zip(here, there, strict=True))
        except GgufloopError as e:
            words = str(e)
        print(f"{name:20} {split:7} {words}", flush=True)


def main(names: list[str]) -> None:
    """Run the rows, with new servers where the last row ended one."""
    with tempfile.TemporaryDirectory() as folder:
        while names:
            with ExitStack() as stack:
                running = [stack.enter_context(rpc_worker.running(Path(folder), verbose=False)) for _ in range(2)]
                while names and all(worker.process.poll() is None for worker in running):
                    row = [names.pop(0), folder, ",".join(worker.address for worker in running)]
                    done = subprocess.run(
                        [sys.executable, __file__, "--row", json.dumps(row)],
                        env=rpc_worker.environment(), capture_output=True, text=True,
                    )  # fmt: skip
                    print(done.stdout, end="")
                    if done.returncode:
                        why = [line for line in done.stderr.splitlines() if "ASSERT" in line or "rror" in line]
                        print(f"{row[0]:20} ended with {done.returncode}: {' '.join(why[:1])}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        name, folder, servers = json.loads(sys.argv[2])
        compare(name, Path(folder), servers)
        os._exit(0)  # a server that died takes the exit with it
    main(sys.argv[1:] or list(archs.ROWS))
