"""llama-server, started with a loop, our page and a folder of results, and ended in time.

    with Site(results) as site:
        serve([program, "-m", path, "--path", site.folder, ...], ("127.0.0.1", 8080), site, env={}, on_ready=print)

The server answers from `site.folder`, which holds the page's files and what the results folder has, with a list of it
that is written anew every few seconds. The settings of a loop are there as JSON in a module, settings.js, of which the
page makes its controls: a page's own file is asked for without a key. Reports are offered as text, for the page to
show without their scripts: whatever the server sent as a page could use the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ggufloop.backend.process import ending
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.files import write_text
from ggufloop.loop import schema
from ggufloop.server.results import listing

PAGE = Path(__file__).parent / "page"
VENDORED = PAGE / "vendor"
STOP_SECONDS = 4.0
_LOOK_SECONDS = 0.25
_LIST_SECONDS = 5.0
MOST_COPIED = 256 * 2**20
"""Bytes of results that are copied where they cannot be linked; what is beyond is not offered."""
_WRONG = re.compile(r"error|[\d.]+ E |.*GGML_ASSERT|.*what\(\):")
"""How llama-server's lines begin that say what went wrong: of its flags, its log, and what ends it."""


def is_local(host: str) -> bool:
    """Whether only this machine can reach the address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def check_address(host: str, key: str | None) -> None:
    """Raise UsageError for an address others can reach, without a key. key: one, or several with commas between."""
    if key is not None and min(map(len, key.split(","))) < 8:
        raise UsageError("the API key has fewer than 8 characters.", "make one up that nobody guesses.")
    if not is_local(host) and key is None:
        raise UsageError(
            f"{host} can be reached from other machines, and anybody could use the server.",
            "give it a key: --api-key KEY, or GGUFLOOP_API_KEY; or stay at 127.0.0.1.",
        )


def check_origin(origin: str) -> None:
    """Raise UsageError unless it is what a browser calls a page's origin, or *."""
    parts = urlsplit(origin)
    if origin != "*" and (parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}"):
        raise UsageError(f"--cors {origin!r} is no origin.", "write it like https://example.org, one, or * for all.")


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
        for file in (*PAGE.glob("*.*"), *VENDORED.glob("*.js")):  # side by side: what lies deeper wants the key
            shutil.copy(file, self.folder)
        (self.folder / "settings.js").write_text(f"export default {json.dumps(schema())};\n", encoding="utf-8")
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
        with contextlib.suppress(GgufloopError):  # a full disk: the list stays as it was
            write_text(self.folder / "results.json", json.dumps(found))

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


def serve(
    words: Sequence[str | Path],
    address: tuple[str, int],
    site: Site,
    env: dict[str, str],
    on_ready: Callable[[], None],
    verbose: bool = False,
) -> None:
    """Run llama-server until it ends, or until KeyboardInterrupt, which is raised once it has ended.

    on_ready: called when it answers. verbose: show its log. Raises GgufloopError, with what llama-server says is
    wrong, if it ends by itself.
    """
    said: deque[str] = deque(maxlen=100)
    process = subprocess.Popen(
        [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "GGML_NO_BACKTRACE": "1", **env},
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )  # fmt: skip
    assert process.stdout is not None
    reader = threading.Thread(target=_listen, args=(process.stdout, said, verbose), daemon=True)
    reader.start()
    ready = False
    try:
        while process.poll() is None:
            if not ready and _answers(*address):
                ready = True
                said.clear()
                on_ready()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LIST_SECONDS if ready else _LOOK_SECONDS)
            with contextlib.suppress(OSError):  # a full disk: results are old, answers are not
                site.refresh()
    finally:
        _end(process)
        reader.join(1)
        process.stdout.close()
    raise _ended(process.returncode, list(said), ready)


def _listen(log: IO[bytes], said: deque[str], verbose: bool) -> None:
    """Keep what is wrong, and nothing else: a log is as long as the server is busy."""
    with contextlib.suppress(ValueError):  # closed
        for line in log:
            if verbose:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
            text = line.decode("utf-8", "replace").strip()
            if _WRONG.match(text):
                said.append(text)


def _answers(host: str, port: int) -> bool:
    """Whether the model is loaded: until then every answer is a 503."""
    connection = http.client.HTTPConnection({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status != 503
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


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


def _ended(code: int, said: list[str], ready: bool) -> GgufloopError:
    """While it loads, the first thing that is wrong is the reason of the others; later, the last one is."""
    why = re.sub(r"^[\d.]+ E (srv|cmn|slot)? *", "", said[-1 if ready else 0]) if said else ""
    if not ready and why.startswith("llama_loop: "):
        return UsageError(why.removeprefix("llama_loop: "))
    if not ready and why.startswith("error"):
        return UsageError(f"llama-server: {why}", "its flags: ggufloop exec llama-server --help")
    return GgufloopError(
        f"llama-server ended ({ending(code)})" + (f": {why}" if why else "."), "run with -v to see its log."
    )
