"""Python as docs/python.md shows it: its example is run, and each thing it says."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT
from support.cli import Cli

import ggufloop
from ggufloop.errors import UsageError
from ggufloop.loop import LoopSpec, as_loop

SMALL: dict[str, Any] = {"n_ctx": 64, "n_threads": 1}


@pytest.fixture
def llm(tiny_model: Callable[[str], Path]) -> Iterator[ggufloop.LoopedLlama]:
    llm = ggufloop.load(tiny_model("llama"), **SMALL)
    yield llm
    llm.close()


def test_the_example_runs(tiny_model: Callable[[str], Path], tmp_path: Path, cli: Cli) -> None:
    """And says nothing of its own: what is printed is what the example prints."""
    pandas = pytest.importorskip("pandas")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    for old, new in (("smollm2-135m", str(tiny_model("llama"))), ("12:16", "2:5"), ("(12, 16)", "(2, 5)")):
        assert old in code
        code = code.replace(old, new)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "verdict" in done.stdout
    assert "sweep" in done.stdout
    out = cli("results", tmp_path / "studies", "-o", "csv")[1]
    pandas.testing.assert_frame_equal(ggufloop.results(tmp_path / "studies"), pandas.read_csv(io.StringIO(out)))


def test_load(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="neither a file nor a known name"):
        ggufloop.load("smolm2-135m")
    with pytest.raises(UsageError, match="window 5:60 is out of range"):
        ggufloop.load(tiny_model("llama"), "5:60")
    llm = ggufloop.load(str(tiny_model("llama")), {"window": "2:5"}, n_threads=1)
    assert (llm.loop, llm.n_threads, llm.n_threads_batch) == (LoopSpec((2, 5), k=3), 1, 1)
    assert llm.n_ctx() == min(4096, int(llm.metadata["llama.context_length"]))
    llm.close()


def test_nothing_is_said(tiny_model: Callable[[str], Path]) -> None:
    path = str(tiny_model("llama"))
    code = f"import ggufloop; ggufloop.LoopedLlama({path!r}, n_ctx=64).create_completion('a', max_tokens=2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "loop", ["2:5", " 2:5 k=3", {"window": "2:5"}, {"window": (2, 5), "k": 3}, LoopSpec((2, 5), k=3)], ids=repr
)
def test_ways_to_say_a_loop(loop: Any) -> None:
    assert as_loop(loop) == LoopSpec((2, 5), k=3)


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ({"window": "2:5", "K": 3}, "loop setting 'K' is not known."),
        ({"k": 3}, "a loop has a window, and this has none."),
        ((2, 5), "(2, 5) is no loop."),
        ("", "loop '' does not start with a window."),
        ("2:5 k=", "k '' is not a whole number."),
        ("2:5 kv=most", "kv 'most' is not known."),
    ],
)
def test_what_is_no_loop(loop: Any, message: str) -> None:
    with pytest.raises(UsageError) as e:
        as_loop(loop)
    assert e.value.message == message
    assert e.value.hint


def test_tokens(llm: ggufloop.LoopedLlama) -> None:
    tokens = llm.tokenize(b"abc")
    expected = llm.logits(tokens)
    for same in (np.array(tokens), np.array(tokens, np.int32), tuple(tokens)):
        llm.reset()
        np.testing.assert_array_equal(llm.logits(same), expected)
    llm.reset()
    llm.eval(np.array(tokens))
    assert llm.n_tokens == len(tokens)
    for bad in ("abc", b"abc"):
        for call in (llm.logits, llm.eval):
            with pytest.raises(UsageError, match="this is text, and what is evaluated are tokens") as e:
                call(bad)
            assert "tokenize" in e.value.hint
    for array in (np.array([tokens]), np.array(tokens, float), np.array(3)):
        with pytest.raises(UsageError, match="no row of whole numbers"):
            llm.logits(array)


def test_the_version_is_that_of_the_package() -> None:
    assert f'\nversion = "{ggufloop.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "ggufloop" / "py.typed").is_file()
