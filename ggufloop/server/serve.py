"""llama-server, started with a loop, our page and a folder of results, and ended in time.

    with Site(results) as site:
        serve([program, "-m", path, "--path", site.folder, ...], url, site, on_ready=print)

The server answers from `site.folder`, which holds the page's files and what the results folder has, with a list of it
that is written anew every few seconds. Reports are offered as text, for the page to show without their scripts:
whatever the server sent as a page could use the server.
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
MOST_COPIED = 256 * 2**20
"""Bytes of results that are copied where they cannot be linked; what is beyond is not offered."""
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
    """The folder llama-server answers from; deleted at the end of the block.

    It serves nothing outside that folder, not even through a symbolic link. So a result is a hard link, which grows as
    the file does, or where that cannot be (another file system) a copy, made again when the file has changed.
    """

    def __init__(self, results: Path | None) -> None:
        self._results = results
        self._copied: dict[str, tuple[int, float]] = {}  # name -> size and time of the file that was copied
        self._offered: set[str] = set()
        self.folder = Path(tempfile.mkdtemp(prefix="ggufloop-site-"))

    def __enter__(self) -> Site:
        for file in PAGE.iterdir():
            shutil.copy(file, self.folder)
        self.refresh()
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def refresh(self) -> None:
        """Offer the results folder as it is now: the files in results/, their list as results.json beside it."""
        found = listing(self._results)
        if self._results is not None:
            found["results"] = [result for result in found["results"] if self._offer(self._results, result)]
        names = {result["name"] for result in found["results"]}
        for name in self._offered - names:
            self._withdraw(name)
        self._offered = names
        partial = self.folder / ".results.json"
        with contextlib.suppress(OSError):  # a full disk: the list stays as it was
            partial.write_text(json.dumps(found), encoding="utf-8")
            os.replace(partial, self.folder / "results.json")

    def _offer(self, results: Path, result: dict[str, Any]) -> bool:
        """Put a file of the list in place; False if it cannot be had."""
        name, size, modified = result["name"], result["size"], result["modified"]
        source, target = results / name, self._target(name)
        if name in self._offered and (self._copied.get(name) == (size, modified) or _same(source, target)):
            return True
        self._withdraw(name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError:
                if size + sum(size for size, _ in self._copied.values()) > MOST_COPIED:
                    return False
                shutil.copyfile(source, target, follow_symlinks=False)
                self._copied[name] = (size, modified)
            if target.is_symlink():  # what was listed has become one
                self._withdraw(name)
                return False
        except OSError:  # gone meanwhile, or not ours to read
            return False
        return True

    def _withdraw(self, name: str) -> None:
        self._copied.pop(name, None)
        with contextlib.suppress(OSError):
            self._target(name).unlink()

    def _target(self, name: str) -> Path:
        """Where a result is in the site: a report is offered as text."""
        return self.folder / "results" / (f"{name}.txt" if name.lower().endswith(".html") else name)


def _same(source: Path, target: Path) -> bool:
    try:
        return os.path.samefile(source, target)
    except OSError:
        return False


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
