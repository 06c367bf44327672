"""`ggufloop perplexity -c A,B,C` against one call for each, and --save-kl-base against llama-perplexity's own file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cli import Cli

from ggufloop.backend import library
from ggufloop.backend.settings import ContextSettings
from ggufloop.cli import main
from ggufloop.engine import LoopedLlama
from ggufloop.loop import LoopSpec
from ggufloop.measure import corpus, perplexity_run
from ggufloop.measure.perplexity import KLBase
from ggufloop.measure.perplexity_run import PLAIN, run_perplexity

TinyModel = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(corpus.local("pydoc").text[:700])
    return path


@pytest.fixture
def run(tiny_model: TinyModel, cli: Cli) -> Run:
    """run("--text", ...) on the tiny model; exit code, stdout and stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        return cli("perplexity", tiny_model("llama"), "-t", "1", *args)

    return call


def good(run: Run, *args: object) -> str:
    code, out, err = run(*args)
    assert code == 0, err
    return out


# Several contexts


@pytest.mark.parametrize("loop", [(), ("--window", "2:5", "--K", 3)])
def test_every_row_is_that_of_its_own_call(run: Run, file: Path, loop: tuple[object, ...]) -> None:
    """64 and 200 before 128: a context left open, or the tokens of one cut for another, would show."""
    args = ("--text", file, "--chunks", 3, *loop)
    alone = [good(run, *args, "-c", n, "-o", "jsonl") for n in (64, 200, 128)]
    assert good(run, *args, "-c", "64,200,128", "-o", "jsonl") == "".join(alone)
    objects = json.loads(good(run, *args, "-c", "64,200,128", "-o", "json"))
    assert objects[1] == json.loads(good(run, *args, "-c", 200, "-o", "json"))
    assert [o["n_ctx"] for o in objects] == [64, 200, 128]
    assert good(run, *args, "-c", "64,200,128", "-o", "md").count("\n") == 2 + 3 * (2 if loop else 1)


def test_another_model_as_the_base(run: Run, file: Path, tiny_model: TinyModel) -> None:
    args = ("--text", file, "--kl-base", tiny_model("qwen3"), "-o", "jsonl")
    alone = [good(run, *args, "-c", n) for n in (64, 128)]
    assert good(run, *args, "-c", "64,128") == "".join(alone)


def test_what_is_printed(run: Run, file: Path) -> None:
    assert re.fullmatch(
        rf"model   llama\.gguf, no loop\ntext    {re.escape(str(file))}\n\n"
        r"\| n_ctx \| chunks \|   n \| +PPL \| +\+/- \| bits/byte \|\n\| -[-: |]+\n"
        r"\|    64 \|     10 \| 310 \|[ |.\d]+\n\|   128 \|      5 \| 315 \|[ |.\d]+\n\n"
        r"Rows score different tokens, those with more text before them in larger contexts\.\n",
        good(run, "--text", file, "-c", "64,128"),
    )


def test_what_is_printed_of_a_loop(run: Run, file: Path) -> None:
    """With one chunk of 512 there are only tokens to take an interval over."""
    args = ("--text", file, "--window", "2:5")
    out = good(run, *args, "-c", "64,512")
    rows = [dict(zip(head, line, strict=True)) for head, _, *lines in [_cells(out)] for line in lines]
    assert [(row["n_ctx"], row["over"]) for row in rows] == [("64", "chunks"), ("512", "tokens")]
    exact = [json.loads(line) for line in good(run, *args, "-c", "64,512", "-o", "jsonl").splitlines()]
    for row, plain, looped in zip(rows, exact[::2], exact[1::2], strict=True):
        assert row["base PPL"] == f"{plain['ppl']:.4f}"
        assert row["PPL"] == f"{looped['ppl']:.4f}"
        assert (row["low"], row["high"]) == (f"{looped['low']:+.5f}", f"{looped['high']:+.5f}")
        assert row["KL"] == f"{looped['kl']:.6f}"
    assert "\nbase    the plain model\n" in out


def _cells(out: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]


def test_the_text_is_cut_into_tokens_once(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(llm: LoopedLlama, text: str) -> list[int]:
        calls.append(text)
        return before(llm, text)

    before = perplexity_run.tokenize
    monkeypatch.setattr(perplexity_run, "tokenize", counted)
    good(run, "--text", file, "-c", "64,100,128")
    assert len(calls) == 1


def test_a_context_given_twice_is_one(run: Run, file: Path) -> None:
    assert good(run, "--text", file, "-c", "64,64") == good(run, "--text", file, "-c", 64)


def test_the_models_own_context_in_a_list(run: Run, file: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text(file.read_text() * 10)
    args = ("--text", long, "--chunks", 1, "-o", "jsonl")
    assert good(run, *args, "-c", "64,0") == good(run, *args, "-c", 64) + good(run, *args, "-c", 0)


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ("64,", 2, "-c '64,' has an empty entry.\n  write it like -c 1,2,3.\n"),
        ("64,x", 2, "-c 'x' is not a whole number of 0 or more.\n  write it like -c 512, or -c 256,512,1024.\n"),
        ("-64", 2, "-c '-64' is not a whole number of 0 or more.\n  write it like -c 512, or -c 256,512,1024.\n"),
        ("64,3", 2, "-c 3 leaves nothing to score.\n  give 4 or more.\n"),
        ("64,800", 1, "the text has 694 tokens, and a chunk is 800.\n  give a longer text, or a smaller -c.\n"),
    ],
)
def test_bad_contexts(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch, given: str, code: int, message: str
) -> None:
    """All are refused before anything is scored, the text too short for the last of them as well."""
    monkeypatch.setattr(perplexity_run, "perplexity", lambda *args: pytest.fail("scored"))
    found = run("--text", file, "-c", given)
    assert found[:2] == (code, "")
    assert found[2].endswith(f"error: {message}")


def test_a_file_brings_one_context(run: Run, file: Path, tmp_path: Path) -> None:
    kept = tmp_path / "a.kld"
    good(run, "--text", file, "-c", 64, "--save-kl-base", kept)
    assert run("--kl-base", kept, "-c", "64,128")[2].startswith(f"error: {kept} brings its own text and -c 64.\n")
    assert run("--text", file, "-c", "64,128", "--save-kl-base", kept)[2] == (
        "error: --save-kl-base writes the chunks of one context.\n  give one -c.\n"
    )


# Saving a base


def test_a_saved_base_is_as_good_as_the_model(run: Run, file: Path, tmp_path: Path) -> None:
    """Saved plain, then compared with: the numbers of both models in one process, but for the last bit of exp."""
    kept, args = tmp_path / "a.kld", ("--window", "2:5", "-o", "json")
    code, out, err = run("--text", file, "-c", 64, "--save-kl-base", kept)
    assert (code, err) == (0, f"note: {kept} is written, {kept.stat().st_size / 1e6:.1f} MB.\n")
    assert out == good(run, "--text", file, "-c", 64)
    assert [p.name for p in tmp_path.iterdir()] == ["a.kld"]
    stored = json.loads(good(run, "--kl-base", kept, *args))
    direct = json.loads(good(run, "--text", file, "-c", 64, *args))
    assert stored["kl_statistics"]["kl"]["mean"] == pytest.approx(direct["kl_statistics"]["kl"]["mean"], rel=1e-5)
    assert stored["kl_statistics"]["same_top"] == direct["kl_statistics"]["same_top"]
    assert stored["kl_statistics"]["kl"]["mean"] > 0.001
    assert stored["n"] == direct["n"]


def test_from_python_as_from_the_command_line(run: Run, file: Path, tmp_path: Path, tiny_model: TinyModel) -> None:
    path, loop, settings = tiny_model("llama"), LoopSpec((2, 5), 3), ContextSettings(n_threads=1)
    text = corpus.local(str(file))
    found = run_perplexity(path, text, loop, contexts=(64,), base=PLAIN, settings=settings)
    told = json.loads(good(run, "--text", file, "-c", 64, "--window", "2:5", "-o", "json"))
    assert (found.base, found.base_path) == ("the plain model", path)
    assert found.results[0].model.ppl == told["ppl"]
    assert found.results[0].against is not None
    assert found.results[0].against.kl.kl.mean == told["kl_statistics"]["kl"]["mean"]
    kept = tmp_path / "plain.kld"
    run_perplexity(path, text, contexts=(64,), save=kept, settings=settings)
    stored = run_perplexity(path, loop=loop, base=KLBase.open(kept), settings=settings).results[0]
    assert stored.against is not None
    assert stored.against.kl.kl.mean == pytest.approx(found.results[0].against.kl.kl.mean, rel=1e-5)


def test_the_loop_is_saved_with_the_model(run: Run, file: Path, tmp_path: Path) -> None:
    kept = tmp_path / "looped.kld"
    good(run, "--text", file, "-c", 64, "--window", "2:5", "--save-kl-base", kept)
    same = json.loads(good(run, "--kl-base", kept, "--window", "2:5", "-o", "json"))["kl_statistics"]
    plain = json.loads(good(run, "--kl-base", kept, "-o", "json"))["kl_statistics"]
    assert same["kl"]["mean"] < 1e-5
    assert plain["kl"]["mean"] > 0.001


def test_what_cannot_be_saved(run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--text", file, "-c", 64, "--save-kl-base")
    assert run(*args, tmp_path)[::2] == (1, f"error: cannot write {tmp_path}: it is a folder.\n  name another file.\n")
    missing = tmp_path / "no" / "a.kld"
    assert run(*args, missing)[::2] == (
        1,
        f"error: cannot write {missing}: No such file or directory.\n  name another file.\n",
    )
    target = tmp_path / "a.kld"
    target.write_text("kept")
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
        assert re.fullmatch(
            rf"error: {re.escape(str(target))} needs 0\.0 GB, and 0\.0 GB of the disk are free\.\n"
            r"  give fewer --chunks, or a file on another disk\.\n",
            run(*args, target)[2],
        )
    with monkeypatch.context() as m:
        m.setattr(perplexity_run, "perplexity", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*args, target)[0] == 130
    assert target.read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["a.kld"]


def _tool() -> Path:
    found = [
        b.directory / "llama-perplexity" for b in library.installed() if "llama-perplexity" in b.programs and b.stock
    ]
    found = [path for path in found if path.is_file()]
    if not found:
        pytest.skip("no llama-perplexity in the cache; run: ggufloop build --stock --with-tools")
    return found[0]


def _by_tool(model: Path, file: Path, kept: Path, *args: object) -> bytes:
    words = [_tool(), "-m", model, "-t", 1, "-f", file, *args, "--kl-divergence-base", kept]
    subprocess.run([str(word) for word in words], capture_output=True, check=True)
    return kept.read_bytes()


def test_the_file_is_llama_perplexitys(run: Run, file: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Byte for byte, on a vocabulary of an odd number of tokens."""
    theirs = _by_tool(tiny_model("llama"), file, tmp_path / "theirs.kld", "-c", 64, "-b", 64)
    good(run, "--text", file, "-c", 64, "-b", 64, "--save-kl-base", tmp_path / "ours.kld")
    assert (tmp_path / "ours.kld").read_bytes() == theirs


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_a_real_models_file_is_llama_perplexitys(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file, ours = request.getfixturevalue(name), tmp_path / "text.txt", tmp_path / "ours.kld"
    file.write_text(corpus.local("pydoc").text[:5000])
    theirs = _by_tool(model, file, tmp_path / "theirs.kld", "-c", 128, "-b", 128, "--chunks", 2)
    words = ("perplexity", model, "--text", file, "-t", 1, "-c", 128, "-b", 128, "--chunks", 2, "--save-kl-base", ours)
    with pytest.raises(SystemExit):
        main([str(word) for word in words])
    assert ours.read_bytes() == theirs
