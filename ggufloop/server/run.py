"""Start a server, keep it until it is asked to stop, and stop it in time.

    serve(config, on_ready=print)         # returns when the server has stopped

Ctrl-C, or SIGTERM, refuses new requests at once, lets answers being generated go on for `stop_seconds`, then cuts them
off; a second one cuts them off at once. The listening socket is made before anything else, so that an address that is
taken is known before a model is loaded, and /health says that the model is loading meanwhile.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec
from ggufloop.sampling import Sampling
from ggufloop.server.guard import is_local
from ggufloop.server.limits import Limits

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama
    from ggufloop.server.worker import Settings

NEEDS = ("starlette", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class Config:
    """Everything a server is started with.

    name: the model's, in the API. loop, sampling: of requests that say nothing. suggested: the window 'auto' means.
    open_model: loads the model, for vocabulary and weights; `settings` are those of the contexts. key: None: none.
    origins: pages whose scripts may use the server. results: the folder the page shows.
    """

    name: str
    open_model: Callable[[], LoopedLlama]
    settings: Settings
    loop: LoopSpec | None = None
    suggested: tuple[int, int] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)
    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = None
    origins: tuple[str, ...] = ()
    results: Path | None = None


def check_installed() -> None:
    """Raise GgufloopError if the extra `serve` is not installed."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise GgufloopError(
            f"the server needs {', '.join(missing)}, which is not installed.", "run: pip install 'ggufloop[serve]'"
        )


def check_address(host: str, key: str | None) -> None:
    """Raise UsageError for an address others can reach, without a key."""
    if key is not None and len(key) < 8:
        raise UsageError("the API key has fewer than 8 characters.", "make one up that nobody guesses.")
    if not is_local(host) and key is None:
        raise UsageError(
            f"{host} can be reached from other machines, and anybody could use the server.",
            "give it a key: --api-key KEY, or GGUFLOOP_API_KEY; or stay at 127.0.0.1.",
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises GgufloopError if the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as e:
        raise GgufloopError(f"{host} is no address of this machine: {e}.", "use 127.0.0.1.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as e:
        listener.close()
        raise GgufloopError(
            f"cannot listen at {host}:{port}: {e.strerror or e}.", "another program may be there: give another --port."
        ) from None
    return listener


def serve(config: Config, on_ready: Callable[[str], None] = lambda url: None) -> bool:
    """Serve until stopped. on_ready: called with the server's address once it answers.

    Returns whether the engine's thread has ended: llama.cpp may be loading a model, or reading a prompt on a device
    that cannot be interrupted.

    Raises UsageError and GgufloopError if it cannot be started.
    """
    check_installed()
    check_address(config.host, config.key)
    listener = listen(config.host, config.port)
    with contextlib.closing(listener):
        return Running(config, listener).run(on_ready)


class Running:
    """A server on a socket. `stop` may be called from any thread."""

    def __init__(self, config: Config, listener: socket.socket) -> None:
        import uvicorn

        from ggufloop.server.app import Service, make_app
        from ggufloop.server.loops import Served
        from ggufloop.server.worker import Worker

        self._config = config
        self._listener = listener
        self._on_ready: Callable[[str], None] = lambda url: None
        self.worker = Worker(config.open_model, config.settings, config.limits, self._state)
        served = Served(config.name, config.loop, config.suggested)
        self.service = Service(self.worker, served, config.limits, config.key, config.origins, config.results)
        settings = uvicorn.Config(
            make_app(self.service),
            log_level="error",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=int(config.limits.stop_seconds) + 1,
        )
        self._server = uvicorn.Server(settings)
        self._stopping = False

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, on_ready: Callable[[str], None] = lambda url: None) -> bool:
        """Serve until stopped, by a signal too if this is the main thread; -> whether the engine's thread has ended.

        Raises what went wrong with the model.
        """
        self._on_ready = on_ready
        self._server.handle_exit = self._exit  # what a signal does
        self.worker.start()
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self.worker.stop()
            ended = self.worker.join(1.0)
        if self.worker.error is not None:
            raise self.worker.error
        return ended

    def stop(self, at_once: bool = False) -> None:
        """Refuse new requests, let running ones end or cut them off."""
        self.worker.stop(0.0 if at_once or self._stopping else self._config.limits.stop_seconds)
        if self._stopping or at_once:
            self._server.force_exit = True
        self._stopping = self._server.should_exit = True

    def _exit(self, signum: int, frame: FrameType | None) -> None:
        self.stop()

    def _state(self, state: str) -> None:
        """What the engine thread tells."""
        from ggufloop.server.requests import Reader

        if state != "ready":
            self._server.should_exit = True
            return
        config, worker = self._config, self.worker
        assert worker.engine is not None
        self.service.reader = Reader(
            worker.engine.llm,
            self.service.served,
            config.sampling,
            worker.engine.lanes.n_ctx,
            config.limits.prompt_tokens,
        )
        self._on_ready(self.url)
