"""Models every test file may ask for: the two real ones, and tiny random ones by family."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import tiny
from support.dequantise import dequantise

if TYPE_CHECKING:
    from support.cli import Cli
    from support.serving import Server


os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # datasets would count every local file it reads on its authors' server


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure is told when it happens: a run that is cut off says what it found."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        print(f"\n{report.nodeid}: {crash.message if crash else report.longreprtext}"[:2000], file=sys.__stderr__)


def _resolve(name: str) -> Path:
    from ggufloop.models import registry  # not at the top: tests of other parts must not need it

    return registry.resolve(name)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1: llama, 30 layers, 9 heads of 64 over 3 K/V heads."""
    return _resolve("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_f32(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's F32 twin, 540 MB: the same weights, exact arithmetic."""
    return dequantise(smollm2, tmp_path_factory.mktemp("twin") / "smollm2-f32.gguf")


@pytest.fixture(scope="session")
def gemma() -> Path:
    """gemma-3-270m Q4_K_M: 18 layers, sliding window of 512 on five layers of six."""
    return _resolve("gemma-3-270m")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_model(family) writes the family's model once and returns its path."""
    folder = tmp_path_factory.mktemp("tiny")

    def get(family: str) -> Path:
        path = folder / f"{family}.gguf"
        return path if path.exists() else tiny.write(path, (tiny.FAMILIES | tiny.HYBRIDS)[family])

    return get


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that asks for another host fails, and at once: where no answer comes, it would wait for minutes."""
    asked, resolve = [], socket.getaddrinfo

    def local(host: Any, *args: Any, **options: Any) -> Any:
        if host not in (None, "127.0.0.1", "localhost", "::1", "0.0.0.0", "::"):
            if not str(host).endswith(".invalid"):  # which nobody has
                asked.append(host)
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", local)
    yield
    assert not asked


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """cli("inspect", path) runs a command in this process: exit code, stdout, stderr."""
    from support.cli import run

    return partial(run, capsys)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv("GGUFLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """own_models(text) makes text the user's models.toml."""
    path = tmp_path / "models.toml"
    monkeypatch.setenv("GGUFLOOP_MODELS", str(path))

    def write(text: str) -> None:
        path.write_text(text)

    return write


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., Server]]:
    """serve(model, *flags) is `ggufloop serve` with them; the same one for all tests that ask for the same."""
    from support.serving import served

    running: dict[tuple[object, ...], Server] = {}

    def get(model: Path, *flags: str, key: str | None = None) -> Server:
        asked = (model, *flags, key)
        if asked in running and not running[asked].is_alive():  # a test ended it; the next one is to know its own
            running.pop(asked).close()
        if asked not in running:
            running[asked] = served(model, *flags, key=key).wait()
        return running[asked]

    yield get
    for server in running.values():
        server.close()
