"""RPC servers on loopback as child processes of the tests: they end with the test, however that ends.

with running(folder) as worker:
    worker.address                       # 127.0.0.1:port
    before = worker.mark(); ...; worker.nodes(before)      # graph nodes it was sent since
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support import PYTHONPATH, ROOT

# The child reads its standard input, which closes when its parent is gone, even if that was killed.
_PROGRAM = """
import ctypes, os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
if os.environ.get("DIRTY") and sys.platform == "linux":
    ctypes.CDLL(None).mallopt(-6, 256)  # M_PERTURB: malloc fills with 256 ^ 255, in a byte 255, which makes NaN
from ggufloop.cli import main
main(sys.argv[1:])
"""


@dataclass(frozen=True)
class Worker:
    """A running server. log: what it writes to stderr, llama.cpp's debug lines included."""

    address: str
    log: Path
    process: subprocess.Popen[bytes]

    def mark(self) -> int:
        """A place in the log."""
        return self.log.stat().st_size

    def nodes(self, mark: int) -> int:
        """Nodes of the graphs the server was given since the mark; what it computes again is not counted again."""
        text = self.log.read_bytes()[mark:].decode()
        return sum(int(n) for n in re.findall(r"\[graph_compute\] device: 0, n_nodes: (\d+)", text))


def environment(**more: str) -> dict[str, str]:
    """This environment, in which a child finds this checkout; an abort in C does not call for a debugger."""
    return {
        **{k: v for k, v in os.environ.items() if k != "LLAMA_CPP_LIB_PATH"},
        "PYTHONPATH": PYTHONPATH,
        "GGML_NO_BACKTRACE": "1",
        **more,
    }


def free_port() -> int:
    """A port nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def running(folder: Path, *flags: str, verbose: bool = True, dirty: bool = False) -> Iterator[Worker]:
    """A server of one thread on a free port, ready to serve. dirty: it finds NaN in the memory it allocates (glibc)."""
    port = free_port()
    log = folder / f"worker-{port}.log"
    words = [*(["-v"] if verbose else []), "rpc-server", "-p", str(port), "-t", "1", *flags]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=out,
            cwd=ROOT,
            env=environment(GGML_RPC_DEBUG="1", DIRTY="1" if dirty else ""),
        )
    try:
        deadline = time.monotonic() + 60
        while "Ctrl-C ends it." not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Worker(f"127.0.0.1:{port}", log, process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.kill()
        process.wait()
