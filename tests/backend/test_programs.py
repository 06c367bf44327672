"""llama.cpp's own programs with a loop, through `ggufloop exec`: they compute what ggufloop computes, or refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufloop.backend import library
from ggufloop.backend.build import PROGRAMS
from ggufloop.errors import BackendError
from ggufloop.measure import corpus

TinyModel = Callable[[str], Path]
CLI = [sys.executable, "-c", "from ggufloop.cli import main; main()"]
LOOPS = [
    "--window 2:5 --K 3",
    "--window 2:5 --K 2 --solver naive --kv each",
    "--window 2:5 --K 3 --kv frozen",
    "--window 2:5 --K 2 --kv last --mode layer",
]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    try:
        library.program("llama-cli")
    except BackendError:
        pytest.skip("llama.cpp's programs are not built; run: ggufloop build --with-tools")


def ggufloop(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *map(str, words)], capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL
    )


def executed(loop: str, *words: object) -> subprocess.CompletedProcess[str]:
    return ggufloop("exec", *loop.split(), "--", *words)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(corpus.local("pydoc").text[:12_000], encoding="utf-8")
    return path


@pytest.mark.parametrize("loop", ["", *LOOPS])
def test_llama_perplexity_has_the_number_of_ggufloop_perplexity(loop: str, text: Path, tiny_model: TinyModel) -> None:
    """To the last digit it prints."""
    model = tiny_model("llama")
    words = ["-c", 128, "-b", 128, "--chunks", 5, "-t", 1]
    theirs = executed(loop, "llama-perplexity", "-m", model, "-f", text, *words)
    assert theirs.returncode == 0, theirs.stderr[-500:]
    found = re.search(r"Final estimate: PPL = (\S+) \+/- (\S+)", theirs.stdout + theirs.stderr)
    assert found, theirs.stderr[-500:]
    ours = ggufloop("perplexity", model, "--text", text, *words, *loop.split(), "-o", "json")
    assert ours.returncode == 0, ours.stderr
    result = json.loads(ours.stdout)
    assert found[1] == f"{result['ppl']:.4f}"
    assert float(found[2]) == pytest.approx(result["error"], abs=1.1e-5)  # theirs is summed up in other steps


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_refuses_a_loop_it_cannot_run(name: str, tiny_model: TinyModel) -> None:
    """None of them runs plain in silence: what loads a model says what is wrong with the loop, and fails."""
    if name in ("llama-quantize", "llama-mtmd-cli"):
        pytest.skip("llama-quantize computes nothing; llama-mtmd-cli wants a model that sees")
    done = subprocess.run(
        [library.program(name), "-m", tiny_model("llama"), *(["-f", __file__] if name in NEED_TEXT else [])],
        env={"LLAMA_LOOP": "2:99 k=3"}, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
        timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert "LLAMA_LOOP: window 2:99 is out of range: this model has 7 layers" in done.stdout + done.stderr


NEED_TEXT = ("llama-perplexity", "llama-imatrix")


@pytest.mark.model
@pytest.mark.parametrize("loop", ["", "--window 12:16 --K 3", "--window 12:16 --K 3 --kv frozen --decode bypass"])
def test_llama_cli_says_what_run_says(loop: str, smollm2: Path) -> None:
    prompt, words = "What is the capital of France?", ["-n", 24, "--temp", 0, "-c", 512, "-t", 1, "-b", 512, "-ub", 512]
    theirs = executed(loop, "llama-cli", "-m", smollm2, "-p", prompt, "-st", "--simple-io", *words)
    assert theirs.returncode == 0, theirs.stderr
    ours = ggufloop("run", smollm2, "-p", prompt, *words, *loop.split())
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout.strip()
    assert ours.stdout.strip() in theirs.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama-clli"], "llama-clli is no program of llama.cpp that ggufloop builds."),
        (["--window", "auto", "--", "llama-bench"], "--window auto needs a model"),
        (["--stock", "--window", "1:2", "--", "llama-bench"], "the stock llama.cpp has no loops."),
        (["--window", "1:x", "--", "llama-bench"], "window '1:x'"),
        (["../../bin/sh"], "../../bin/sh is no program of llama.cpp that ggufloop builds."),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_line(words: list[str], message: str) -> None:
    done = ggufloop("exec", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_loop_in_the_environment_is_not_meant_for_python(tiny_model: TinyModel) -> None:
    """There the caller says which: a variable that is forgotten changes no measurement."""
    code = (
        "import os; os.environ['LLAMA_LOOP'] = '2:5 k=3'\n"
        "from ggufloop.engine import LoopedLlama\n"
        f"llm = LoopedLlama({str(tiny_model('llama'))!r}, verbose=False, n_ctx=64)\n"
        "print(llm.logits([1, 2, 3]).sum()); llm.set_loop('2:5 k=3'); llm.reset(); print(llm.logits([1, 2, 3]).sum())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain, looped = done.stdout.split()
    assert plain != looped
