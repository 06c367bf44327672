"""A library is verified by computing: what the comparison refuses, and what happens to a library that is broken.

The faults of kernels are played in numpy, on top of the rounding that kernels are allowed; the broken libraries are the
real one with one kernel replaced (broken.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import PYTHONPATH, broken
from support.fake_machine import FakeMachine

from ggufloop.backend import library as backend
from ggufloop.backend import verify
from ggufloop.backend.library import Backend
from ggufloop.backend.oracle import N_PROMPT, TYPES, Array, TinyModel, wrong
from ggufloop.backend.verifier import LOOPS
from ggufloop.errors import BackendError

linux = pytest.mark.skipif(sys.platform != "linux", reason="the shim replaces a kernel as Linux' loader does it")

Times = Callable[[Array, Array, str], Array]


def rounded(x: Array, w: Array, name: str) -> Array:
    """As coarse as any kernel of the CPU: 8 bits in blocks of 256."""
    blocks = x.reshape(-1, 256)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    return (np.round(blocks / scale) * scale).reshape(x.shape) @ w.T


def bfloat(x: Array, w: Array, name: str) -> Array:
    """As coarse as any kernel for weights of 16 bits."""
    bits = x.view(np.uint32)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).view(np.float32) @ w.T


def spoilt(w: Array, columns: list[int]) -> Array:
    """The matrix with its columns 32 to 63 taken from those given, one after the other."""
    w = w.copy()
    w[:, 32:64] = w[:, columns] if columns else 0
    return w


def without_row(y: Array) -> Array:
    y[:, 7] = 0
    return y


HONEST = {"Q4_1": rounded, "Q6_K": rounded, "IQ4_XS": rounded, "F32": bfloat, "BF16": bfloat}
FAULTS: dict[str, Callable[[Times, Array, Array, str], Array]] = {
    "scale 3 % too large": lambda f, x, w, name: f(x, w, name) * np.float32(1.03),
    "scale 3 % too small": lambda f, x, w, name: f(x, w, name) * np.float32(0.97),
    "the same in all but the last matrix": lambda f, x, w, name: f(x, w, name) * (1 if name == "output" else 1.03),
    "the same in the last matrix": lambda f, x, w, name: f(x, w, name) * (1.03 if name == "output" else 1),
    "a block dropped": lambda f, x, w, name: f(x, spoilt(w, []), name),
    "nibbles swapped": lambda f, x, w, name: f(x, spoilt(w, [*range(48, 64), *range(32, 48)]), name),
    "a block used twice": lambda f, x, w, name: f(x, spoilt(w, [*range(32)]), name),
    "a row of each tile wrong": lambda f, x, w, name: without_row(f(x, w, name)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: TinyModel(kind, folder) for kind in HONEST}


def computed(model: TinyModel, loop: str, times: Times) -> Array:
    """What a library with this multiplication would answer."""

    class Other(TinyModel):
        def times(self, x: Array, name: str) -> Array:
            return times(x, self.weights[name], name).astype(np.float32)

    other = object.__new__(Other)
    other.__dict__ = {**model.__dict__, "known": {}}
    return other.logits(LOOPS[loop])


@pytest.mark.parametrize(
    ("kind", "loop"), [*((kind, "plain") for kind in HONEST), *(("Q4_1", loop) for loop in LOOPS if loop != "plain")]
)
def test_rounding_is_right_and_faults_are_wrong(models: dict[str, TinyModel], kind: str, loop: str) -> None:
    honest, wanted = HONEST[kind], models[kind].logits(LOOPS[loop])
    parts = (slice(0, N_PROMPT), slice(N_PROMPT, None))
    rows = computed(models[kind], loop, honest)
    assert [wrong(rows[part], wanted[part], kind, "CPU") for part in parts] == ["", ""]
    for name, fault in FAULTS.items():
        rows = computed(models[kind], loop, lambda x, w, n, fault=fault: fault(honest, x, w, n))
        for part in parts:
            assert wrong(rows[part], wanted[part], kind, "CPU"), name


def test_the_bounds_follow_from_rounding(models: dict[str, TinyModel]) -> None:
    """oracle.py says 2.0 to 2.3 % and five times less."""
    for kind, (least, most) in {"Q4_1": (0.015, 0.025), "Q6_K": (0.015, 0.025), "BF16": (0.003, 0.005)}.items():
        wanted = models[kind].logits(None)
        error = np.linalg.norm(computed(models[kind], "plain", HONEST[kind]) - wanted) / np.linalg.norm(wanted)
        assert least < error < most, (kind, error)


def test_a_loop_is_not_the_plain_model(models: dict[str, TinyModel]) -> None:
    """Else the looped cases would prove nothing."""
    plain, naive, euler = (models["F32"].logits(loop) for loop in LOOPS.values())
    assert all(wrong(a, b, "Q4_1", "CPU") for a, b in ((plain, naive), (plain, euler), (naive, euler)))


def test_words_for_what_is_wrong() -> None:
    right = np.ones((2, 4), np.float32)
    assert wrong(right, right, "F32", "CPU") == ""
    assert wrong(right * np.float32("nan"), right, "F32", "CPU") == "NaN"
    assert wrong(right * np.float32("inf"), right, "F32", "CPU") == "infinite numbers"
    assert wrong(right * 1.02, right, "F32", "CPU") == "wrong by 2.0 %, where rounding explains 1 %"
    assert wrong(right * 0.98, right, "F32", "CUDA0") == "2.0 % too small"


@pytest.mark.parametrize("stock", [False, True], ids=["patched", "stock"])
def test_the_library_is_right(stock: bool) -> None:
    found = verify.check(backend.locate(stock).directory)
    assert found.failures == ()
    assert found.types == TYPES
    assert found.loops == (("plain",) if stock else tuple(LOOPS))
    assert re.fullmatch(r"16 weight types on CPU(, \w+)*, plain(, naive, euler)?: right \([\d.]+ s\)", str(found))


FEW = ("Q4_0", "Q5_1")  # a right one and the broken one
CRASH = "Q5_1, 65 columns, CPU: SIGILL"
# the prompt and the next token, plain and in two loops
WRONG = r"Q5_1, 65 columns, CPU: wrong by \d+\.\d %, where rounding explains 4 %"


@linux
def test_a_broken_library_is_named(tmp_path: Path) -> None:
    crash = verify.check(broken.library(tmp_path, "crash"), types=FEW)
    assert [str(failure) for failure in crash.failures] == [CRASH]
    multiplies = verify.check(broken.library(tmp_path, "wrong"), types=FEW)
    assert {(f.kind, f.device) for f in multiplies.failures} == {("Q5_1", "CPU")}
    assert [(f.columns, f.loop) for f in multiplies.failures] == [(n, loop) for loop in LOOPS for n in (65, 1)]
    assert re.fullmatch(rf"{WRONG} \(and 5 more\)", str(multiplies))
    hang = verify.check(broken.library(tmp_path, "hang"), timeout=3)
    assert [str(failure) for failure in hang.failures] == ["loading, CPU: no end after 3 s"]
    (tmp_path / "wrong" / "libllama.so").write_text("no library")
    with pytest.raises(BackendError, match=r"wrong does not load: .*libllama\.so"):
        verify.check(tmp_path / "wrong")


REALLY = f"""
from ggufloop.backend.verify import check
build.check = lambda folder: check(folder, types={FEW})
toolchain.cpu_flags = lambda: frozenset()
"""


@linux
@pytest.mark.parametrize("how", ["crash", "wrong"])
def test_build_refuses_a_broken_library(tmp_path: Path, how: str) -> None:
    folder = broken.library(tmp_path, how)
    machine = FakeMachine(tmp_path)
    machine.program("ninja", f"rm -rf $2/bin; cp -a {folder} $2/bin")
    done = machine.build(FAKE_CODE=REALLY)
    failure = CRASH if how == "crash" else WRONG + r" \(and 5 more\)"
    assert (done.returncode, done.stdout) == (3, "")
    assert re.search(rf"^giving up the CPU's newer instructions \({failure}\)$", done.stderr, re.MULTILINE)
    assert re.search(rf"^error: the library just built does not compute right: {failure}\.$", done.stderr, re.MULTILINE)
    assert machine.events == ["cmake", "ninja"] * 2
    assert machine.libraries() == []
    assert machine.leftovers() == []


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, in which a check takes few types and is counted in `asked`."""
    head = "asked = []\nfrom ggufloop.backend import doctor, library as backend, verify\nfull = verify.check\n"
    head += f"def check(folder):\n    asked.append(folder)\n    return full(folder, types={FEW})\n"
    head += "verify.check = doctor.check = check\n"
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, **env}
    return subprocess.run([sys.executable, "-c", head + code], env=environment, capture_output=True, text=True)


@linux
def test_doctor_finds_a_broken_library(tmp_path: Path) -> None:
    for how, line in (("crash", CRASH + r"\."), ("wrong", WRONG + r"\.")):
        code = "from ggufloop.cli import main; main(['doctor'])"
        done = run(code, GGUFLOOP_LIB_DIR=str(broken.library(tmp_path, how)))
        assert done.returncode == 3, done.stderr
        assert re.search(
            rf"^problem: {how}(?: with \d programs)? does not compute right: {line}\n  run: ggufloop build",
            done.stdout,
            re.M,
        )
        assert "everything is fine" not in done.stdout
        assert "\ncomputes" not in done.stdout
    assert "There are 3 more cases like these." in done.stdout


ACTIVATE = "print(backend.activate().directory.name, len(asked))"


@linux
def test_a_library_of_another_cpu_is_verified_once(tmp_path: Path) -> None:
    good = tmp_path / "backends" / "cpu-elsewhere"
    good.parent.mkdir()
    subprocess.run(["cp", "-a", backend.locate().directory, good], check=True)
    elsewhere = replace(Backend.load(good) or backend.locate(), directory=good, cpu="0" * 12, verified="0" * 12)
    elsewhere.save()
    for asked in (1, 0):
        done = run(ACTIVATE, GGUFLOOP_CACHE=str(tmp_path))
        assert (done.stdout, done.stderr) == (f"cpu-elsewhere {asked}\n", "")
    os.utime(next(good.glob("libggml-cpu.so.*.*")))  # another library in its place
    assert run(ACTIVATE, GGUFLOOP_CACHE=str(tmp_path)).stdout == "cpu-elsewhere 1\n"

    bad = broken.library(tmp_path, "crash")
    (bad / backend.MANIFEST).unlink()  # a folder given by hand
    for _ in range(2):
        done = run(ACTIVATE, GGUFLOOP_CACHE=str(tmp_path), GGUFLOOP_LIB_DIR=str(bad))
        assert done.stderr.splitlines()[-1] == (
            f"ggufloop.errors.BackendError: the library in {bad} does not compute right on this CPU: {CRASH}."
        )


def test_a_cache_that_cannot_be_written_means_asking_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "verified").write_text("a file where the folder should be")
    monkeypatch.setenv("GGUFLOOP_CACHE", str(tmp_path))
    library = Backend(tmp_path, "cpu", False, "", "", (), "", "", "")
    verify.remember(backend.note(library))
    assert not backend.is_verified(library)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of file sizes")
def test_a_disk_that_is_full_is_no_broken_kernel(tmp_path: Path) -> None:
    """Else a build gives up the CPU's instructions for it, and `run` refuses a right library."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
    code += "from ggufloop.backend import library as backend, verify\nfrom ggufloop.errors import BackendError\n"
    code += "try: print(verify.check(backend.locate().directory, types=('Q5_1',)).failures)\n"
    code += "except BackendError as e: print('BackendError', e)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("BackendError"), done.stdout + done.stderr[-300:]


def test_modules_of_the_working_folder_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With -c Python looks there before its own library."""
    (tmp_path / "random.py").write_text("raise SystemExit('mine')")
    monkeypatch.chdir(tmp_path)
    try:
        found = verify.check(backend.locate().directory, types=("Q5_1",))
    except BackendError as e:
        pytest.fail(str(e))
    assert not found.failures
