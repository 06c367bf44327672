"""C++ (patches/llama-loop-text.cpp) and Python (ggufloop/loop.py) read a loop's text: one plan, one set of words."""

from __future__ import annotations

import ctypes
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ggufloop import engine
from ggufloop.backend import capi
from ggufloop.errors import UsageError
from ggufloop.loop import KV_POLICIES, MODES, ROUTINGS, SOLVERS, LoopSpec

N = 64


class Spec(ctypes.Structure):
    """`struct llama_loop_spec`."""

    _fields_ = [
        ("params", capi.Params),
        ("decode_first", ctypes.c_int32),
        ("decode_entropy", ctypes.c_double),
        ("A", ctypes.c_double * (N * N)),
        ("B", ctypes.c_double * N),
    ]


def in_c(text: str, n_layer: int) -> tuple[str, Spec]:
    """What C++ makes of a text: an error and its remedy, or '', and the spec."""
    lib = engine._lib
    assert lib is not None
    lib.llama_loop_parse.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(Spec)]
    spec = Spec()
    code = lib.llama_loop_parse(text.encode(), n_layer, spec)
    return ("" if code == 0 else lib.llama_loop_error().decode()), spec


def in_python(text: str, n_layer: int) -> tuple[str, LoopSpec | None]:
    try:
        loop = LoopSpec.parse(text)
        if n_layer:
            loop.check(n_layer)
    except UsageError as e:
        return f"{e.message}\n{e.hint}", None
    return "", loop


def compare(text: str, n_layer: int) -> bool:
    """Hold the two against each other; whether the text is a loop."""
    error, spec = in_c(text, n_layer)
    expected, loop = in_python(text, n_layer)
    assert error == expected, text
    if loop is None:
        return False
    p, n = spec.params, loop.tableau().evaluations
    assert (p.first, p.last, p.n_eval) == (*loop.window, n), text
    assert np.abs(np.array(spec.A[: n * n]).reshape(n, n) - loop.tableau().A).max(initial=0) <= 1e-15, text
    assert np.abs(np.array(spec.B[:n]) - loop.tableau().B).max() <= 1e-15, text
    assert (MODES[p.mode], KV_POLICIES[p.kv], ROUTINGS[p.routing]) == (loop.mode, loop.kv, loop.routing), text
    assert (p.attention, p.sinks, p.halt) == (loop.attention or 0, loop.sinks, loop.halt or 0.0), text
    first, entropy = loop.decode_loops(), loop.decode_entropy()
    assert spec.decode_first == (-1 if first is None else first), text
    assert spec.decode_entropy == (-1.0 if entropy is None else entropy), text
    return True


def a_loop(rng: random.Random) -> str:
    """A text that is mostly right."""
    solver = rng.choice(SOLVERS)
    a = rng.randint(1, 20)
    words = [f"{a}:{a + rng.randint(1, 9)}", f"k={rng.choice([1, 2, 3, 4, 7, 16, 33, 64])}"]
    extra = {
        "mode": rng.choice(MODES),
        "solver": solver,
        "damping": rng.choice(["0.5", "1", "1.5", ".25", "2e-1", "2"]),
        "beta": rng.choice(["0", "0.5", "1", "0.3"]),
        "mu": rng.choice(["0.5", "0", "0.9"]),
        "passes": rng.choice(["2", "3", "9"]),
        "kv": rng.choice(KV_POLICIES),
        "decode": rng.choice(["full", "bypass", "first:3", "entropy:1.5", "entropy:.5e1"]),
        "routing": rng.choice(ROUTINGS),
        "attention": str(rng.randint(1, 4096)),
        "sinks": str(rng.randint(0, 8)),
        "halt": rng.choice(["0.1", "1e-3", "5"]),
    }
    words += [f"{name}={extra[name]}" for name in rng.sample(list(extra), rng.choice([0, 1, 1, 2, 2, 3, 5]))]
    return " ".join(words)


NUMBERS = ("0", "-1", "+3", "007", "1e3", "1e999", "-1e-999", "nan", "inf", "", "1_0", "3.", "0x3", "99999999999",
           "999999999999999999999", "1.0000000001", "0.1234567890123")  # fmt: skip


def spoiled(rng: random.Random, text: str) -> str:
    """A text with something wrong in it."""
    words = text.split()
    i = rng.randrange(len(words))
    kind = rng.randrange(9)
    if kind == 0:
        del words[i]
    elif kind == 1:
        words[i] = words[i].partition("=")[0] + "=" + rng.choice(NUMBERS)
    elif kind == 2:
        words.append(rng.choice(words))
    elif kind == 3:
        j = rng.randrange(len(words[i]) + 1)
        words[i] = words[i][:j] + rng.choice("abz=:-.,1 9_%\t~\x7f'\\") + words[i][j:]
    elif kind == 4:
        words[0] = rng.choice(
            ["14-19", "0:3", "5:5", "9:2", "1:99999999999", "a:b", "3", ":", "1:2:3", "1" * 40, "3:-4"]
        )
    elif kind == 5:
        j = rng.randrange(len(words[i]))
        words[i] = words[i][:j] + words[i][j + 1 :]
    elif kind == 6:
        words[i] = words[i].upper()
    elif kind == 7:
        words.append(rng.choice(["solver=eular", "solvr=euler", "kv=eache", "decode=frist:3", "decode=entropy:-1",
                                 "decode=first:0", "mode=blocks", "routing=", "x" * 250 + "=1", "beta",
                                 "=3"]))  # fmt: skip
    else:
        words = words * rng.choice([2, 30])
    return " ".join(words)


def test_thousands_of_texts_mean_the_same_in_c_and_in_python() -> None:
    rng = random.Random(7)
    right = sum(compare(a_loop(rng), rng.choice([0, 12, 30])) for _ in range(3000))
    assert 1000 < right < 2900  # both kinds were met
    wrong = sum(not compare(spoiled(rng, a_loop(rng)), rng.choice([0, 2, 12, 30])) for _ in range(5000))
    assert wrong > 3000


@pytest.mark.parametrize("text", ["", " ", "12:16", "k=3", "12:16 k=3 \u00e9", "12:16\nk=3", "12:16 k=3 " + " " * 600])
def test_texts_that_are_hardly_texts(text: str) -> None:
    if text.isascii():
        compare(text, 30)
    else:  # Python counts characters, C++ bytes: the first bad one is the same
        assert in_c(text, 30)[0] == in_python(text, 30)[0]


def test_every_solver_at_every_k() -> None:
    for solver in SOLVERS:
        for k in range(1, 65):
            compare(f"3:5 k={k} solver={solver}", 30)
            compare(f"3:5 k={k} beta=0.37", 30)
            compare(f"3:5 k={k} passes=3 beta=0.5", 30)


# the environment variable

LOGITS = """
import sys, ctypes, os
import numpy as np
from ggufloop.backend import library
library.activate()
os.environ.update({k[3:]: v for k, v in os.environ.items() if k.startswith("ENV")})
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True)
llm.eval([1, 2, 3, 4]); llm.eval([5]); llm.eval([6])
np.save(sys.argv[2], llm.scores[:6])
"""


def plain_program(path: Path, out: Path, text: str | None) -> subprocess.CompletedProcess[str]:
    """A program that knows llama.cpp and no loops, on our library."""
    env = {**os.environ} if text is None else {**os.environ, "ENVLLAMA_LOOP": text}
    return subprocess.run(
        [sys.executable, "-c", LOGITS, path, out], env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "text", ["2:5 k=3", "2:5 k=2 kv=each", "2:5 k=3 decode=bypass", "2:5 k=3 decode=first:1", None]
)
def test_the_environment_loops_any_program(text: str | None, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path, out = tiny_model("llama"), tmp_path / "rows.npy"
    done = plain_program(path, out, text)
    assert done.returncode == 0, done.stderr
    llm = engine.LoopedLlama(path, n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False, loop=text)
    rows = np.concatenate([llm.logits(part) for part in ([1, 2, 3, 4], [5], [6])])
    assert np.array_equal(np.load(out), rows)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2:5 k=0", "K 0 is not a whole number in the range 1 to 64."),
        ("2:9 k=2", "window 2:9 is out of range: this model has 7 layers."),
        ("2:5 k=2 decode=entropy:1", "decode entropy evaluates a token twice, which this program does not."),
    ],
)
def test_a_wrong_text_in_the_environment_is_no_plain_run(
    text: str, words: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    done = plain_program(tiny_model("llama"), tmp_path / "rows.npy", text)
    assert done.returncode != 0
    assert not (tmp_path / "rows.npy").exists()
    assert re.search(rf"Failed to create (llama_)?context|{re.escape(words)}", done.stderr)
