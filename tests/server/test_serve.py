"""`ggufloop serve` as a user meets it: what is refused, what it says, what flags become, and that it ends in time."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from support.serving import CLI, SMALL, Server, served

from ggufloop.backend import library
from ggufloop.cli import main
from ggufloop.cli.commands import serve
from ggufloop.loop import LoopSpec
from ggufloop.server import words
from ggufloop.server.serve import Site

TinyModel = Callable[[str], Path]
Serve = Callable[..., Server]


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Path:
    return tiny_model("llama")


def refused(capfd: pytest.CaptureFixture[str], *args: str) -> tuple[Any, str]:
    """The exit code and stderr of a command that must not start."""
    with pytest.raises(SystemExit) as e:
        main(["serve", *args])
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return e.value.code, err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (
            "--host 0.0.0.0",
            2,
            "error: 0.0.0.0 can be reached from other machines, and anybody could use the server.\n"
            "  give it a key: --api-key KEY, or GGUFLOOP_API_KEY; or stay at 127.0.0.1.\n",
        ),
        ("--host 0.0.0.0 --api-key short", 2, "error: the API key has fewer than 8 characters.\n"),
        ("--api-key long-enough,short", 2, "error: the API key has fewer than 8 characters.\n"),
        ("--window 2:70", 2, "error: window 2:70 is out of range: this model has 7 layers.\n"),
        ("--window 2-5", 2, "error: window 2-5 is not of the form first:end.\n"),
        ("--window 2:5 --decode entropy:1", 2, "error: decode entropy:1 evaluates tokens twice, which the server"),
        ("--K 3", 2, "Error: --K needs --window A:B"),
        ("--cors example.org", 2, "error: --cors 'example.org' is no origin.\n  write it like https://example.org"),
        ("--cors https://a.org,https://b.org", 2, "error: --cors 'https://a.org,https://b.org' is no origin.\n"),
        ("--results /no/folder", 1, "error: cannot read the results folder /no/folder: No such file or directory.\n"),
        ("--webui /", 2, "error: / holds no index.html, so it is not llama.cpp's page"),
        ("--host no.such.host.invalid --api-key long-enough", 1, "error: cannot listen at no.such.host.invalid:8080: "),
        ("--temp -1", 2, "error: temp -1.0 is not a number of 0 or more.\n"),
        ("--parallel 0", 2, "Invalid value for '-np' / '--parallel'"),
        ("--mmproj /no/file", 2, "Invalid value for '--mmproj': File '/no/file' does not exist"),
        ("-md /no/file", 2, "File '/no/file' does not exist"),
        ("-- --port 9", 2, "error: --port after -- would go past ggufloop.\n  give --port before it.\n"),
        ("-- --loop=2:5", 2, "error: --loop after -- would go past ggufloop.\n  give --window before it.\n"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_line(
    flags: str, code: int, message: str, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    left, err = refused(capfd, str(model), *flags.split())
    assert left == code
    assert message in err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--nonsense", 2, "error: llama-server: error: invalid argument: --nonsense\n  its flags: ggufloop exec "),
        ("--cache-ram lots", 2, 'error: llama-server: error while handling argument "--cache-ram": stoi\n'),
        ("--ctx-size", 2, 'error: llama-server: error while handling argument "--ctx-size": expected value for arg'),
        ("--lora /no/file", 1, "error: llama-server ended (exit status 1): llama_adapter_lora_init: failed to open '/"),
    ],
)
def test_what_llama_server_refuses_is_a_line_of_its_own(
    flags: str, code: int, message: str, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    left, err = refused(capfd, str(model), *SMALL, "--port", "0", "--", *flags.split())
    assert left == code
    assert err.startswith(f"note: loading llama.gguf ...\n{message}")
    assert len(err.splitlines()) == 3


def test_a_loop_that_only_the_weights_refuse(tiny_model: TinyModel, capfd: pytest.CaptureFixture[str]) -> None:
    words = (*SMALL, "--port", "0", "--window", "2:5", "--kv", "frozen")
    assert refused(capfd, str(tiny_model("qwen35")), *words) == (
        2,
        "note: loading qwen35.gguf ...\nerror: window 2:5 has recurrent layers, which store one state of all "
        "positions: kv frozen would need one of each.\n",
    )


def test_no_model_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert refused(capfd)[1] == (
        "error: no model is given.\n  name one: a GGUF file, a name of `ggufloop list`, or user/repo[:quant].\n"
    )
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert "x.gguf" in refused(capfd, str(file))[1]


def test_a_port_that_is_taken_is_known_at_once(serve: Serve, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    port = serve(model, *SMALL).port
    code, err = refused(capfd, str(model), "--port", str(port))
    assert (code, err.splitlines()) == (
        1,
        [
            f"error: cannot listen at 127.0.0.1:{port}: Address already in use.",
            "  another program may be there: give another --port, or --host 127.0.0.1.",
        ],
    )


def test_flags_become_the_server(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def fake(words: list[str], address: Any, site: Site, env: dict[str, str], *rest: Any) -> None:
        started.append((words, env))
        assert json.loads((site.folder / "results.json").read_text())["folder"] == tmp_path.name
        raise KeyboardInterrupt

    monkeypatch.setattr("ggufloop.server.serve.serve", fake)
    monkeypatch.setenv("GGUFLOOP_API_KEY", "from-the-environment")
    draft = str(model)
    words = (
        "--window 2:5 --K 6 --kv frozen --host 0.0.0.0 --port 0 -np 3 --cors https://a.example -c 700 -b 300 -ub 100 "
        f"-t 1 --temp 0.5 -n 9 -s 3 -ngl 7 -fa on -ctk q8_0 --embeddings --reasoning-budget 0 --results {tmp_path} "
        f"-md {draft} -- --metrics --slots"
    )
    with pytest.raises(SystemExit) as e:
        main(["serve", str(model), *words.split()])
    assert e.value.code == 0
    ((words_given, env),) = started
    text = " ".join(words_given)
    for expected in (
        f"llama-server -m {model} -a llama -t 1 -tb 1 -np 3 -c 2100 --no-kv-unified", "-b 300", "-ub 100", "-ngl 7",
        "-fa on", "-ctk q8_0", "-n 9", "-s 3", "--temp 0.5", f"-md {draft}", "--reasoning-budget 0", "--embeddings",
        "--loop 2:5 k=6 kv=frozen", "--loop-menu 2:5 k=6 kv=frozen", "--host 0.0.0.0", "--check-host",
        "--cors-origins https://a.example",
    ):  # fmt: skip
        assert expected in text
    assert text.endswith(" --metrics --slots")
    assert "from-the-environment" not in text, "others on the machine see the words of a process"
    assert env == {"LLAMA_LOOP": "", "LLAMA_ARG_LOOP": "", "LLAMA_API_KEY": "from-the-environment"}


def test_the_menu_is_what_the_model_can_run(tiny_model: TinyModel) -> None:
    menu = words.menu(tiny_model("llama"), LoopSpec((2, 5), 4))
    assert str(menu[0]) == "2:5 k=4"
    assert len(menu) == 3
    assert len(words.menu(tiny_model("llama"), LoopSpec((2, 5), 4, kv="each"))) == 1
    assert words.model_name(Path("some/my@model.Q4_K_M.gguf")) == "my-model.Q4_K_M"


def test_what_it_says_and_what_is_handed_through(model: Path, tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text("# One")
    (tmp_path / "two.html").write_text("<script>")
    with served(model, *SMALL, "--window", "2:5", "--results", str(tmp_path), "--", "--metrics") as server:
        assert server.said == [
            "note: loading llama.gguf ...\n",
            f"serving llama, window 2:5, K 3, at {server.url} (the API: {server.url}/v1). Ctrl-C ends it.\n",
        ]
        assert server.get("/metrics").status == 200
        page = server.get("/")
        assert (page.status, page.headers["content-type"].split(";")[0]) == (200, "text/html")
        found = server.get("/results.json").json
        assert sorted(result["name"] for result in found["results"]) == ["one.md", "two.html"]
        assert server.get("/results/one.md").body == b"# One"
        assert server.get("/results/two.html").status == 404
        assert server.get("/results/two.html.txt").headers["content-type"].startswith("text/plain")
        assert server.get("/results/../../etc/passwd").status == 404


def test_the_page_of_llama_cpp_where_it_is_had(model: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("theirs")
    with served(model, *SMALL, "--webui", str(tmp_path)) as server:
        assert server.get("/").body == b"theirs"


def endless(server: Server) -> threading.Thread:
    """An answer that is being generated, in the middle of it."""
    begun = threading.Event()

    def ask() -> None:
        body = json.dumps({"prompt": "Hi", "n_predict": -1, "stream": True, "ignore_eos": True})
        with server.connection(20) as connection, contextlib.suppress(OSError, HTTPException):  # the end may cut a line
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            while answer.readline():
                begun.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert begun.wait(20)
    return thread


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_it_ends_in_time_in_the_middle_of_an_answer(stop: signal.Signals, code: int, smollm2: Path) -> None:
    with served(smollm2, "-t", "1", "-c", "8192", "-np", "1") as server:
        thread = endless(server)
        started = time.monotonic()
        server.process.send_signal(stop)
        assert server.process.wait(10) == code
        assert time.monotonic() - started < 6  # 5, and what a loaded machine needs to end a process
        thread.join(5)
        assert server.said[2:] == (["stopped\n"] if stop == signal.SIGINT else [])
        with pytest.raises(OSError, match="refused"):
            server.get("/health")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_it_does_not_outlive_a_parent_that_is_killed(model: Path) -> None:
    with served(model, *SMALL) as server:
        server.process.kill()
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                server.get("/health")
            except OSError:
                return
            time.sleep(0.05)
        raise AssertionError("llama-server is still there")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the child in /proc")
def test_a_server_that_dies_is_told(model: Path) -> None:
    with served(model, *SMALL) as server:
        parent = server.process.pid
        (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        subprocess.run(["kill", "-KILL", child], check=True)
        assert server.process.wait(15) == 1
        server.close()
        assert server.said[2:] == ["error: llama-server ended (SIGKILL).\n", "  run with -v to see its log.\n"]


def test_v_shows_its_log(model: Path) -> None:
    with served(model, *SMALL, "-v") as server:
        assert any(re.match(r"[\d.]+ I ", line) for line in server.said)


def test_the_first_serve_builds_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def build(request: Any, progress: Any) -> None:
        asked.append(request)
        monkeypatch.undo()

    def missing(name: str, stock: bool = False) -> Path:
        raise library.BackendError(f"{name} is not built yet.", "run: ggufloop build --server")

    found = library.program("llama-server")
    monkeypatch.setattr("ggufloop.backend.build.build", build)
    monkeypatch.setattr(library, "program", missing)
    assert serve.program() == found
    assert (asked[0].server, asked[0].stock) == (True, False)
    assert capsys.readouterr().err == "note: building llama-server, once; that takes some minutes.\n"


def test_help_tells_how_flags_are_handed_through() -> None:
    done = subprocess.run([*CLI, "serve", "--help"], capture_output=True, text=True, check=True)
    assert "What follows -- goes to llama-server as it is." in " ".join(done.stdout.split())
