"""Which library a process gets: choosing among cached ones, refusing wrong ones, and the real ones in the cache.

The real libraries are those `scripts/bootstrap.py pytest` has built: the patched and the stock one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import PYTHONPATH

from ggufloop.backend import library as backend
from ggufloop.backend.capi import ABI
from ggufloop.backend.library import Backend
from ggufloop.backend.probe import probe
from ggufloop.errors import BackendError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGUFLOOP_CACHE", str(tmp_path))
    for name in ("GGUFLOOP_BACKEND", "GGUFLOOP_LIB_DIR", "GGUFLOOP_STOCK_LIB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def library(folder: Path, age: int = 0, **changed: object) -> Backend:
    """A manifest in the cache, like the one of a library built here and now, `age` seconds ago."""
    made = Backend(folder, "cpu", False, backend.patch_id(), "k", (), backend.BINDING_VERSION, backend.cpu_id(), "cc 1")
    made = replace(made, **changed)
    folder.mkdir(parents=True)
    made.save()
    stamp = 1_000_000_000 - age
    os.utime(folder / backend.MANIFEST, (stamp, stamp))
    return made


_PROGRAM = """
from ggufloop.errors import GgufloopError
try:
    exec({code!r})
except GgufloopError as e:
    raise SystemExit(f"{{e}} | {{e.hint}}")
"""


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own; an error of ours becomes 'message | hint' on stderr and exit code 1."""
    ours = ("LLAMA_CPP_LIB_PATH", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # this process may have activated a library
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(code=code)],
        env={**kept, "PYTHONPATH": PYTHONPATH, **env},
        capture_output=True,
        text=True,
    )


def ggufloop(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run(f"from ggufloop.cli import main; main({list(args)!r})", **env)


def test_manifest_round_trip(cache: Path) -> None:
    made = library(cache / "backends" / "cpu-k", programs=("llama-server",))
    assert Backend.load(made.directory) == made
    assert str(made) == "cpu-k with llama-server"
    assert str(replace(made, programs=("llama-cli", "llama-server"))) == "cpu-k with 2 programs"
    manifest = made.directory / backend.MANIFEST
    older = {k: v for k, v in json.loads(manifest.read_text()).items() if k not in ("verified", "gave_up")}
    manifest.write_text(json.dumps(older))
    assert Backend.load(made.directory) == made, "a manifest from before builds were verified"
    assert not backend.is_verified(made)
    for broken in ("", "[]", "{}", '{"name": "cpu"}', manifest.read_text()[:-9]):
        manifest.write_text(broken)
        assert Backend.load(made.directory) is None
    assert backend.installed() == []


def test_the_newest_fitting_library_is_chosen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / "backends"
    old = library(folder / "cpu-old", age=9)
    cuda = library(folder / "cuda-new", age=5, name="cuda")
    stock = library(folder / "cpu-stock", age=4, stock=True, patch_id="")
    library(folder / "cpu-other-patch", age=3, patch_id="0" * 12)
    library(folder / "cpu-other-machine", age=2, cpu="0" * 12)
    library(folder / "cpu-other-pin", age=1, binding="0.0.1")
    assert [backend.locate(), backend.locate(stock=True)] == [cuda, stock]
    monkeypatch.setenv("GGUFLOOP_BACKEND", "cpu")
    assert backend.locate() == old


def test_a_program_is_of_the_library_in_use(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, verified = cache / "backends", backend.cpu_id()
    now = {"verified": verified, "programs": ("llama-cli",), "programs_id": backend.programs_id()}
    stale = library(folder / "cpu-stale", **now | {"programs_id": "of an older patch"})
    fresh = library(folder / "cpu-fresh", age=5, **now)
    unknown = library(folder / "cpu-unknown", age=1, **now | {"verified": ""})
    for made in (stale, fresh, unknown):
        (made.directory / "llama-cli").write_text("")
    assert backend.program("llama-cli") == fresh.directory / "llama-cli"
    with pytest.raises(BackendError, match="llama-server is not built yet") as e:
        backend.program("llama-server")
    assert e.value.hint == "run: ggufloop build --server"
    own = cache / "own"
    own.mkdir()
    (own / "libllama.so").write_bytes(backend.LOOP_SYMBOL)
    monkeypatch.setenv("GGUFLOOP_LIB_DIR", str(own))
    with pytest.raises(BackendError, match="own, which GGUFLOOP_LIB_DIR names, has no llama-cli"):
        backend.program("llama-cli")
    (own / "llama-cli").write_text("")
    assert backend.program("llama-cli") == own / "llama-cli"


def test_a_verified_library_comes_first_then_one_of_this_cpu(cache: Path) -> None:
    folder = cache / "backends"
    foreign = library(folder / "cpu-foreign", age=1, cpu="0" * 12, verified="0" * 12)
    assert backend.locate() == foreign, "activate verifies it"
    local = library(folder / "cpu-local", age=5)
    assert backend.locate() == local
    older = library(folder / "cpu-older", age=9, cpu="0" * 12, verified=backend.cpu_id())
    assert backend.locate() == older
    (foreign.directory / "libllama.so").write_text("what was verified")
    backend.note(foreign).parent.mkdir()
    backend.note(foreign).touch()
    assert backend.locate() == foreign


REFUSALS = [
    ({}, {}, "no patched llama.cpp is built yet.", "run: ggufloop build"),
    ({"name": "cpu"}, {"GGUFLOOP_BACKEND": "cuda"},
     "no patched cuda llama.cpp is built yet.", "run: ggufloop build --backend cuda"),
    ({"stock": True, "patch_id": ""}, {}, "no patched llama.cpp is built yet.", "run: ggufloop build"),
    ({"patch_id": "0" * 12}, {},
     "the patched llama.cpp in the cache was built by another version of ggufloop.", "run: ggufloop build"),
    ({"binding": "0.0.1"}, {},
     "the patched llama.cpp in the cache was built by another version of ggufloop.", "run: ggufloop build"),
    ({}, {"GGUFLOOP_BACKEND": "cudo"}, "GGUFLOOP_BACKEND is 'cudo', which is no backend.",
     "did you mean cuda? Known: auto, cpu, cuda, metal, vulkan, hip."),
    ({}, {"GGUFLOOP_LIB_DIR": "/nowhere"}, "GGUFLOOP_LIB_DIR is /nowhere, which holds no llama library.",
     "name a folder with libllama in it, or unset it."),
]  # fmt: skip


@pytest.mark.parametrize(("manifest", "env", "message", "hint"), REFUSALS)
def test_refusal(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    manifest: dict[str, object],
    env: dict[str, str],
    message: str,
    hint: str,
) -> None:
    if manifest:
        library(cache / "backends" / "cpu-k", **manifest)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError) as caught:
        backend.locate()
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == (message, hint, 3)


def test_a_folder_of_ones_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("mine", b"..llama_loop_abi.."), ("plain", b"..llama_decode..")):
        (cache / name).mkdir()
        (cache / name / "libllama.so").write_bytes(content)
    monkeypatch.setenv("GGUFLOOP_LIB_DIR", str(cache / "mine"))
    monkeypatch.setenv("GGUFLOOP_STOCK_LIB_DIR", str(cache / "plain"))
    assert [backend.locate().directory, backend.locate(stock=True).directory] == [cache / "mine", cache / "plain"]
    monkeypatch.setenv("GGUFLOOP_LIB_DIR", str(cache / "plain"))
    with pytest.raises(BackendError, match=r"plain, whose library is not patched\."):
        backend.locate()
    monkeypatch.setenv("GGUFLOOP_STOCK_LIB_DIR", str(cache / "mine"))
    with pytest.raises(BackendError, match=r"mine, whose library is patched\."):
        backend.locate(stock=True)


def test_the_cached_libraries_are_what_they_say(tmp_path: Path) -> None:
    patched = probe(backend.locate().directory)
    assert (patched.abi, patched.patch_id, patched.binding) == (ABI, backend.patch_id(), backend.BINDING_VERSION)
    assert "CPU" in [device.name for device in patched.devices]
    moved = shutil.copytree(backend.locate().directory, tmp_path / "moved", symlinks=True)
    assert probe(moved) == patched
    stock = probe(backend.locate(stock=True).directory)
    assert (stock.abi, stock.patch_id) == (None, None)


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "libllama.so").write_text("no library")
    with pytest.raises(BackendError, match=r"does not load: .*libllama\.so"):
        probe(tmp_path)


def test_activate_comes_before_the_import() -> None:
    done = run(
        "import time, sys; from ggufloop.backend import library as backend\n"
        "t = time.process_time(); a = backend.activate()\n"
        "print(time.process_time() - t < 0.2, 'llama_cpp' in sys.modules); import llama_cpp\n"
        "b = backend.activate(); print(a == b, hasattr(llama_cpp.llama_cpp._lib, 'llama_loop_abi'))"
    )
    assert (done.stdout, done.stderr) == ("True False\nTrue True\n", "")


@pytest.mark.parametrize(
    ("user", "found"),
    [
        ({}, f"{backend.SPIN_COUNT} None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "active"}, "None active"),
    ],
)
def test_threads_wait_as_the_user_said_or_spin_briefly(user: dict[str, str], found: str) -> None:
    """The words are in C's environment, where libgomp and children read them, before the library is loaded."""
    done = run(
        "import ctypes, sys; from ggufloop.backend import library as backend\n"
        "backend.activate(); get = ctypes.CDLL(None).getenv\n"
        "get.restype = ctypes.c_char_p; words = [get(n) for n in (b'GOMP_SPINCOUNT', b'OMP_WAIT_POLICY')]\n"
        "print(*(w and w.decode() for w in words), 'llama_cpp' in sys.modules)",
        **user,
    )
    assert (done.stdout, done.stderr) == (f"{found} False\n", "")


def test_stock_stays_stock() -> None:
    done = run(
        "from ggufloop.backend import library as backend; a = backend.activate(stock=True); import llama_cpp\n"
        "print(a.stock, backend.activate() == a, hasattr(llama_cpp.llama_cpp._lib, 'llama_loop_abi'))"
    )
    assert (done.stdout, done.stderr) == ("True True False\n", "")


IMPORTED_FIRST = [
    (True, "activate()",
     "llama_cpp was imported before ggufloop and has loaded a llama.cpp that cannot loop. | import ggufloop.engine "
     "before llama_cpp, or set LLAMA_CPP_LIB_PATH to the folder that `ggufloop build` prints.\n"),
    (False, "activate()", ""),
    (False, "activate(stock=True)",
     "this process has loaded the patched llama.cpp, so it cannot have the stock one too. | "
     "use the stock library in a process of its own.\n"),
    (True, "activate(stock=True)", ""),
]  # fmt: skip


@pytest.mark.parametrize(("stock", "call", "message"), IMPORTED_FIRST)
def test_llama_cpp_imported_first(stock: bool, call: str, message: str) -> None:
    folder = str(backend.locate(stock).directory)
    done = run(
        f"import llama_cpp; from ggufloop.backend import library as backend; backend.{call}", LLAMA_CPP_LIB_PATH=folder
    )
    assert done.stderr == message
    assert done.returncode == bool(message)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("__version__ = '0'", "llama-cpp-python unknown is installed"),
        ('__version__ = "0.3.35"', "llama-cpp-python 0.3.35 is installed, this version of ggufloop needs 0.3.36."),
    ],
)
def test_another_binding(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text(source)
    done = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from ggufloop.backend import library as backend; backend.activate()"
    )
    assert message in done.stderr
    assert done.stderr.endswith(" | run: ggufloop build --replace-binding\n")


def test_version() -> None:
    done = ggufloop("version")
    located = backend.locate()
    own = done.stdout.splitlines()[0].removeprefix("ggufloop ")
    assert done.stdout.splitlines() == [
        f"ggufloop {own}",
        f"python {sys.version.split()[0]}",
        "llama-cpp-python 0.3.36",
        "llama.cpp 0c1e57098",
        f"library {located.directory.name} (patch {backend.patch_id()})",
    ]
    assert json.loads(ggufloop("version", "-o", "json").stdout) == {
        "schema_version": 1,
        "ggufloop": own,
        "python": sys.version.split()[0],
        "binding": "0.3.36",
        "llama_cpp": "0c1e57098",
        "library": located.directory.name,
        "patch_id": backend.patch_id(),
    }


def test_version_without_a_library(tmp_path: Path) -> None:
    done = ggufloop("version", GGUFLOOP_CACHE=str(tmp_path))
    assert done.stdout.splitlines()[-1] == "library none (run: ggufloop build)"
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_doctor_when_all_is_well() -> None:
    done = ggufloop("doctor")
    assert done.returncode == 0, done.stdout
    for line in (
        rf"library +{backend.locate().directory.name} \(patch {backend.patch_id()}\)",
        rf"folder +{backend.locate().directory}",
        f"loop interface +{ABI}",
        r"device CPU +.+, [\d.]+ GiB",
        r"computes +16 weight types on CPU(, \w+)*, plain, naive, euler: right \([\d.]+ s\)",
        rf"stock library +{backend.locate(stock=True).directory}",
        "everything is fine",
    ):
        assert re.search(f"^{line}$", done.stdout, re.MULTILINE), (line, done.stdout)
    data = json.loads(ggufloop("doctor", "-o", "json").stdout)
    assert list(data) == [
        "schema_version", "ggufloop", "python", "binding", "llama_cpp", "library", "patch_id", "directory", "stock",
        "abi", "devices", "gave_up", "variant", "computes", "cache", "cache_libraries", "cache_bytes", "problems",
    ]  # fmt: skip
    assert (data["problems"], data["abi"], data["computes"]["failures"]) == ([], ABI, [])


def test_doctor_lists_each_problem_with_its_remedy(tmp_path: Path) -> None:
    broken = tmp_path / "backends" / "cpu-k"
    library(broken)
    (broken / "libllama.so").write_text("no library")
    done = ggufloop("doctor", GGUFLOOP_CACHE=str(tmp_path))
    assert done.returncode == 3
    assert re.search(
        rf"problem: the library in {broken} does not load: .*\n  run: ggufloop build --force\n", done.stdout
    )

    empty = tmp_path / "empty"
    done = ggufloop("doctor", GGUFLOOP_CACHE=str(empty), PATH=str(empty))
    assert done.returncode == 3
    assert [line for line in done.stdout.splitlines() if line.startswith(("problem", "  "))] == [
        "problem: no patched llama.cpp is built yet.",
        "  run: ggufloop build",
        "problem: to build the cpu backend this machine lacks a C compiler, a C++ compiler and git.",
        "  install gcc and g++, or clang; install git.",
    ]


def test_unknown_words_are_usage_errors() -> None:
    done = ggufloop("build", "--backend", "cudo")
    assert (done.returncode, done.stderr) == (
        2,
        "error: backend 'cudo' is unknown.\n  did you mean cuda? Known: auto, cpu, cuda, metal, vulkan, hip.\n",
    )
    done = ggufloop("doctor", "-o", "xml")
    assert (done.returncode, done.stderr) == (2, "error: output form 'xml' is not known.\n  known: text, json.\n")
