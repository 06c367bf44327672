"""A file nobody has computed on is tried in a process of its own: what would end this one is a line, once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mutations import gguf
from support import tiny

from ggufloop.backend import trial
from ggufloop.backend.settings import ContextSettings
from ggufloop.cli import main
from ggufloop.errors import GgufloopError

TinyModel = Callable[[str], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was tried before is not known."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(trial, "cache_dir", lambda: folder)
    return folder


def notes(cache: Path) -> list[Path]:
    return sorted((cache / "tried").glob("*"))


@pytest.fixture
def crashing(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A hybrid without a bias that the loader takes for optional, and the graph does not."""
    file = gguf.parse(tiny_model("granitehybrid").read_bytes())
    file.weights = [w for w in file.weights if w.name != b"blk.0.ssm_conv1d.bias"]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf.build(file))
    return path


@pytest.mark.parametrize("family", ["llama", "granitehybrid"])
def test_a_sound_file_is_tried_once(
    family: str, tiny_model: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial.check(tiny_model(family))
    assert len(notes(cache)) == 1
    monkeypatch.setattr(trial, "_try", lambda *words: pytest.fail("tried again"))
    trial.check(tiny_model(family))


def test_a_copy_is_the_same_file_and_another_header_is_not(tiny_model: TinyModel, cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny_model("llama").read_bytes())
    trial.check(tiny_model("llama"))
    trial.check(copy)
    assert len(notes(cache)) == 1
    trial.check(tiny.write(tmp_path / "other.gguf", replace(tiny.FAMILIES["llama"], meta={"rope.freq_base": 6e4})))
    assert len(notes(cache)) == 2


def test_other_kernels_are_tried_too(tiny_model: TinyModel, cache: Path) -> None:
    path = tiny_model("llama")
    trial.check(path)
    ContextSettings(repack=False).keywords(path)
    assert len(notes(cache)) == 2


def test_what_ends_the_process_is_a_line_every_time(crashing: Path, cache: Path) -> None:
    for _ in range(2):
        with pytest.raises(GgufloopError) as e:
            trial.check(crashing)
        assert e.value.message == f"llama.cpp cannot compute {crashing}: it ends its process (SIGSEGV)."
        assert "--no-try" in e.value.hint
    assert not notes(cache)


def test_the_last_words_of_an_assert_are_told(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys; print('m.cpp:7: GGML_ASSERT(a == b) failed', file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setattr(trial, "_START", code)
    with pytest.raises(GgufloopError, match=r"\(SIGABRT\): m\.cpp:7: GGML_ASSERT\(a == b\) failed\.$"):
        trial.check(tiny_model("llama"))


def test_an_exception_of_llama_cpp_is_told(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_START", """print('{"failed": "KeyError: 3", "ours": false}')""")
    with pytest.raises(GgufloopError, match=r"llama_cpp fails with KeyError: 3\.$"):
        trial.check(tiny_model("llama"))


def test_one_that_takes_too_long_is_let_pass(
    tiny_model: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "LIMIT", 0.2)
    monkeypatch.setattr(trial, "_START", "import time; time.sleep(60)")
    begun = time.monotonic()
    trial.check(tiny_model("llama"))
    assert time.monotonic() - begun < 10
    assert len(notes(cache)) == 1


@pytest.mark.parametrize(
    "code",
    ["raise SystemExit('terminate: std::bad_alloc')", """print('{"failed": "GgufloopError: what", "ours": true}')"""],
    ids=["memory", "refused"],
)
def test_what_is_not_the_files_fault_is_left_to_the_engine(
    code: str, tiny_model: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_START", code)
    trial.check(tiny_model("llama"))
    assert not notes(cache)


def test_a_file_of_more_than_half_the_memory_is_not_tried(
    tiny_model: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "free_bytes", lambda: 2 * tiny_model("llama").stat().st_size - 1)
    monkeypatch.setattr(trial, "_try", lambda path, most: pytest.fail("tried"))
    trial.check(tiny_model("llama"))
    assert not notes(cache)


def test_a_command_tries_before_it_loads_and_no_try_does_not(
    crashing: Path,
    tiny_model: TinyModel,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ggufloop.cli.input.read_piped", lambda: "")
    words = ["run", "--raw", "-p", "a", "-n", "1", "-s", "1"]
    with pytest.raises(SystemExit) as e:
        main([*words, str(crashing)])
    assert e.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: llama.cpp cannot compute ")
    assert len(said.splitlines()) == 2
    with pytest.raises(SystemExit) as e:
        main([*words, str(tiny_model("llama")), "--no-try"])
    assert e.value.code == 0
    assert not notes(cache)
