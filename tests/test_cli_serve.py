"""`ggufloop serve` as a user meets it: what is refused before anything is loaded, and what the flags become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ggufloop.cli import main, serve
from ggufloop.loop import LoopSpec
from ggufloop.server import run
from ggufloop.server.run import Config

TinyModel = Callable[[str], Path]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[Any, str]:
    """The exit code and stderr of a command that must not start."""
    with pytest.raises(SystemExit) as e:
        main(["serve", *args])
    out, err = capsys.readouterr()
    assert out == ""
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
        ("--window 2:70", 2, "error: window 2:70 is out of range: this model has 7 layers.\n"),
        ("--window 2-5", 2, "error: window 2-5 is not of the form first:end.\n"),
        ("--K 3", 2, "Error: --K needs --window A:B"),
        ("--cors example.org", 2, "error: --cors 'example.org' is no origin.\n  write it like https://example.org"),
        ("--results /no/folder", 1, "error: cannot read the results folder /no/folder: No such file or directory.\n"),
        ("--host no.such.host.invalid --api-key long-enough", 1, "error: no.such.host.invalid is no address"),
        ("--temp -1", 2, "error: temp -1.0 is not a number of 0 or more.\n"),
        ("--parallel 0", 2, "Invalid value for '--parallel'"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_line(
    flags: str, code: int, message: str, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    left, err = refused(capsys, str(tiny_model("llama")), *flags.split())
    assert left == code
    assert message in err


def test_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys)[1] == (
        "error: no model is given.\n  name one: a GGUF file, a name of `ggufloop list`, or user/repo[:quant].\n"
    )
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert "x.gguf" in refused(capsys, str(file))[1]


def test_without_the_extra_one_line_says_what_to_install(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert refused(capsys, str(tiny_model("llama"))) == (
        1,
        "error: the server needs uvicorn, which is not installed.\n  run: pip install 'ggufloop[serve]'\n",
    )


def test_flags_become_the_server(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Config] = []

    def fake(config: Config, on_ready: Callable[[str], None]) -> bool:
        started.append(config)
        on_ready("http://127.0.0.1:1")
        return True

    monkeypatch.setattr(run, "serve", fake)
    monkeypatch.setenv("GGUFLOOP_API_KEY", "from-the-environment")
    model = tiny_model("llama")
    words = (
        "--window 2:5 --K 6 --kv each --host 0.0.0.0 --port 0 --parallel 3 --queue 7 --cache-ram 5 --max-body 2 "
        f"--max-prompt 100 --max-predict 50 --cors https://a.example/,https://b.example --results {tmp_path} "
        "-c 700 -b 300 -ub 100 -t 1 --temp 0.5 -n 9 -s 3"
    )
    with pytest.raises(SystemExit) as e:
        main(["serve", str(model), *words.split()])
    assert e.value.code == 0
    (config,) = started
    assert (config.name, config.loop) == ("llama", LoopSpec((2, 5), 6, kv="each"))
    assert (config.host, config.port, config.key) == ("0.0.0.0", 0, "from-the-environment")
    limits = config.limits
    assert (limits.parallel, limits.queue, limits.cache_bytes, limits.body_bytes) == (3, 7, 5 * 2**20, 2 * 2**20)
    assert (limits.prompt_tokens, limits.max_tokens) == (100, 50)
    assert config.origins == ("https://a.example", "https://b.example")
    assert config.results == tmp_path
    assert (config.settings.n_ctx, config.settings.n_batch, config.settings.n_ubatch) == (700, 300, 100)
    assert (config.sampling.temp, config.sampling.n, config.sampling.seed) == (0.5, 9, 3)
    assert capsys.readouterr().err == (
        "serving llama, window 2:5, K 6, kv=each, at http://127.0.0.1:1 (the API: http://127.0.0.1:1/v1). "
        "Ctrl-C ends it.\nstopped\n"
    )
    llm = config.open_model()
    assert llm.n_layer() == 7
    assert capsys.readouterr().err == "note: loading llama ...\n"
    llm.close()


def test_a_model_is_named_as_the_list_names_it() -> None:
    assert serve.model_name(Path("some/my@model.Q4_K_M.gguf")) == "my-model.Q4_K_M"
