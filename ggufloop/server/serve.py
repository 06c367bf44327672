"""llama-server, started with a loop, our page and a folder of results, and ended in time.

    with Site(results) as site:
        serve([program, "-m", path, "--path", site.folder, ...], url, site, on_ready=print)

The server answers from `site.folder`, which holds the page's files and what the results folder has: links, so that a
file that grows is seen as it is, and a list of them that is written anew every few seconds. Reports are offered as text,
for the page to show without their scripts: whatever the server sent as a page could use the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.server.results import listing

PAGE = Path(__file__).parent / "page"
STOP_SECONDS = 4.0
_LOOK_SECONDS = 0.25
_LIST_SECONDS = 5.0
_LOCAL = ("localhost", "127.0.0.1", "::1")


def check_address(host: str, key: str | None) -> None:
    """Raise UsageError for an address others can reach, without a key."""
    if key is not None and len(key) < 8:
        raise UsageError("the API key has fewer than 8 characters.", "make one up that nobody guesses.")
    if host not in _LOCAL and key is None:
        raise UsageError(
            f"{host} can be reached from other machines, and anybody could use the server.",
            "give it a key: --api-key KEY, or GGUFLOOP_API_KEY; or stay at 127.0.0.1.",
        )


def free_port(host: str, port: int) -> int:
    """This port, or one that is free for 0. Raises GgufloopError if the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.closing(socket.socket(family, kind, proto)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            return int(listener.getsockname()[1])
    except (OSError, UnicodeError) as e:
        raise GgufloopError(
            f"cannot listen at {host}:{port}: {getattr(e, 'strerror', None) or e}.",
            "another program may be there: give another --port, or --host 127.0.0.1.",
        ) from None


class Site:
    """The folder llama-server answers from; deleted at the end of the block."""

    def __init__(self, results: Path | None) -> None:
        self._results = results
        self._linked: set[str] = set()
        self.folder = Path(tempfile.mkdtemp(prefix="ggufloop-site-"))

    def __enter__(self) -> Site:
        for file in PAGE.iterdir():
            shutil.copy(file, self.folder)
        self.refresh()
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def refresh(self) -> None:
        """List the results folder as it is now."""
        found = listing(self._results)
        folder = self.folder / "results"
        folder.mkdir(exist_ok=True)
        for result in found["results"]:
            name = result["name"]
            if name not in self._linked and self._results is not None:
                target = folder / offered(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                source = (self._results / name).absolute()
                try:
                    os.symlink(source, target)
                except OSError:  # Windows asks for a privilege
                    shutil.copy(source, target)
                self._linked.add(name)
        partial = folder / ".index.json"
        partial.write_text(json.dumps(found), encoding="utf-8")
        os.replace(partial, folder / "index.json")


def offered(name: str) -> str:
    """The name a result has in the site: a report is text there."""
    return f"{name}.txt" if name.lower().endswith(".html") else name


def serve(words: Sequence[str | Path], url: str, site: Site, env: dict[str, str], on_ready: Callable[[], None]) -> None:
    """Run llama-server until it ends, or until KeyboardInterrupt, which is raised once it has ended.

    on_ready: called when it answers. Raises GgufloopError, with llama-server's last words, if it ends by itself.
    """
    with tempfile.TemporaryFile() as log:
        quiet: Any = log if "-v" not in words else None
        process = subprocess.Popen(
            list(words), stdin=subprocess.DEVNULL, stdout=quiet, stderr=quiet,
            env={**os.environ, **env}, preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
        try:
            waited = 0.0
            ready = False
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOK_SECONDS if not ready else _LIST_SECONDS)
                    break
                waited += _LOOK_SECONDS
                if not ready and _answers(url):
                    ready = True
                    on_ready()
                site.refresh()
        finally:
            _end(process)
        raise _ended(process.returncode, log)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:  # reading a prompt cannot be interrupted
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """In the child: be asked to end when the parent is gone, however that ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _ended(code: int, log: Any) -> GgufloopError:
    log.seek(0)
    lines = log.read()[-20000:].decode("utf-8", "replace").splitlines()
    marked = [line for line in lines if "error" in line.lower() or " E " in line] or lines
    last = f": {marked[-1].strip()}" if marked else ""
    how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
    return GgufloopError(f"llama-server ended ({how}){last}", "run with -v to see its log.")
