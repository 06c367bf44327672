"""`ggufloop build`: what it says and leaves behind when all goes well, and for each way it can fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from support.fake_machine import CMAKE, NINJA, FakeMachine

from ggufloop.backend import library, toolchain
from ggufloop.backend.build import PROGRAMS, Plan

WAIT_PIP = """
open(os.environ["FAKE_EVENTS"], "a").write(f"pid {os.getpid()}\\nwaiting\\n")
time.sleep(60)
"""
WAIT_NINJA = """
sleep 60 &
printf 'pid %s\\nwaiting\\n' $! >> $FAKE_EVENTS
wait
"""
NO_PIP = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == 'pip' else find(n)"


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def wait_for(machine: FakeMachine, event: str, count: int = 1) -> None:
    deadline = time.monotonic() + 30
    while machine.events.count(event) < count:
        assert time.monotonic() < deadline, machine.events
        time.sleep(0.02)


def test_builds_once_and_then_finds_it(machine: FakeMachine) -> None:
    done = machine.build()
    (name,) = machine.libraries()
    assert done.returncode == 0
    assert done.stdout == f"{machine.cache}/backends/{name}\n"
    assert done.stderr.splitlines() == [
        "backend cpu: asked for",
        "unpacking llama.cpp",
        "configuring",
        f"compiling (takes minutes; log: {machine.cache}/logs/{name}.log)",
        "verifying",
        f"built {name}",
    ]
    assert machine.leftovers() == []

    again = machine.build()
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert again.stderr == f"up to date: {name} (cpu: asked for)\n"
    assert machine.events == ["cmake", "ninja"]

    assert machine.build("--force").returncode == 0
    assert machine.events == ["cmake", "ninja"] * 2
    assert machine.libraries() == [name]


def test_a_library_with_more_will_do(machine: FakeMachine) -> None:
    machine.build("--with-tools")
    (name,) = machine.libraries()
    for flags in (["--with-tools"], []):
        assert machine.build(*flags).stderr == f"up to date: {name} with {len(PROGRAMS)} programs (cpu: asked for)\n"
    machine.build("--stock")
    assert machine.events == ["cmake", "ninja"] * 2
    assert [n.startswith("cpu-stock-") for n in machine.libraries()].count(True) == 1


CRASHES = """
from ggufloop.backend.verify import Failure, Verification
toolchain.cpu_flags = lambda: frozenset(["amx_int8", "sse4_2", "avx", "avx2", "fma", "f16c"])
toolchain.platform.machine = lambda: "x86_64"
checked = []
def check(folder):
    checked.append(folder)
    failure = Failure("Q4_1", 65, {device!r}, "naive", "signal SIGSEGV")
    return Verification((), (), (), (failure,) if len(checked) <= {times} else (), 1.0)
build.check = check
"""
CRASH = "Q4_1, 65 columns, CPU, naive loop: signal SIGSEGV"
GIVEN_UP = ["", "AMX", "the CPU's newer instructions"]


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_library_that_crashes_is_built_with_less(machine: FakeMachine, tmp_path: Path, times: int) -> None:
    configured = tmp_path / "configured"
    told = f'[ "$1" = --version ] || echo "$CFLAGS|$CXXFLAGS|$*" >> {configured}'
    machine.program("cmake", f"{told}\n{CMAKE}")
    done = machine.build(FAKE_CODE=CRASHES.format(device="CPU", times=times), CFLAGS="-O1")
    (name,) = machine.libraries()
    assert (done.returncode, done.stdout) == (0, f"{machine.cache}/backends/{name}\n")
    given_up = [f"giving up {what} ({CRASH})" for what in GIVEN_UP[1 : times + 1]]
    assert [line for line in done.stderr.splitlines() if "giv" in line] == given_up
    manifest = json.loads((machine.cache / "backends" / name / library.MANIFEST).read_text())
    assert manifest["gave_up"] == (f"{GIVEN_UP[times]} ({CRASH})" if times else "")
    assert manifest["verified"] == library.cpu_id()
    assert machine.events == ["cmake", "ninja"] * (times + 1)

    lines = configured.read_text().splitlines()
    flags = ["-O1|", "-O1 -U__AMX_INT8__|-U__AMX_INT8__", "-O1|"]
    assert [line.rpartition("|")[0] for line in lines] == flags[: times + 1]
    assert [("GGML_NATIVE=OFF" in line, "GGML_AVX2=ON" in line, "GGML_BMI2=OFF" in line) for line in lines] == [
        (False,) * 3, (False,) * 3, (True,) * 3,
    ][: times + 1]  # fmt: skip
    again = machine.build(CFLAGS="-O1")
    assert again.stderr == f"up to date: {name} (cpu: asked for)\n"


@pytest.mark.parametrize(("device", "builds"), [("CPU", 3), ("CUDA0", 1)])
def test_a_library_that_never_computes_is_not_installed(machine: FakeMachine, device: str, builds: int) -> None:
    """With fewer of the CPU's instructions a GPU computes what it did before, so that is not tried."""
    done = machine.build(FAKE_CODE=CRASHES.format(device=device, times=9))
    log = next((machine.cache / "logs").glob("cpu-*.log"))
    assert done.stderr.splitlines()[-2:] == [
        f"error: the library just built does not compute right: {CRASH.replace('CPU', device)}.",
        f"  another compiler or driver may do better (CC and CXX name a compiler); log: {log}",
    ]
    assert (done.returncode, done.stdout) == (3, "")
    assert machine.events == ["cmake", "ninja"] * builds
    assert machine.libraries() == machine.leftovers() == []


@pytest.mark.parametrize("right", [True, False])
def test_a_cached_library_that_nobody_verified_is_verified(machine: FakeMachine, right: bool) -> None:
    machine.build()
    (name,) = machine.libraries()
    manifest = machine.cache / "backends" / name / library.MANIFEST
    older = {k: v for k, v in json.loads(manifest.read_text()).items() if k not in ("verified", "gave_up")}
    manifest.write_text(json.dumps(older))
    done = machine.build(FAKE_CODE=CRASHES.format(device="CPU", times=0 if right else 2))  # asked twice, then built
    assert done.returncode == 0
    assert machine.events == ["cmake", "ninja"] * (1 if right else 2)
    assert machine.build(FAKE_CODE=CRASHES.format(device="CPU", times=9)).stderr.startswith("up to date"), "remembered"


COMPILING = "compiling llama.cpp failed with status 1."
FAILURES = {
    "cmake fails": (
        {"cmake": '[ "$1" = --version ] && echo cmake version 3.30.1 && exit; echo "CMake Error: boom"; exit 1'},
        {},
        ["  CMake Error: boom", "error: configuring llama.cpp failed with status 1."],
        "  mend what the lines above name and run again; log: {LOG}",
    ),
    "compiler fails": (
        {"ninja": "echo '[1/2] a.cpp'; echo 'a.cpp:1: error: boom'; exit 1"},
        {},
        ["  a.cpp:1: error: boom", f"error: {COMPILING}"],
        "  mend what the lines above name and run again; log: {LOG}",
    ),
    "disk full while compiling": (
        {"ninja": "echo 'a.cpp: fatal error: a.o: No space left on device'; exit 1"},
        {},
        ["  a.cpp: fatal error: a.o: No space left on device", f"error: {COMPILING}"],
        "  the disk is full: free some space, or set GGUFLOOP_CACHE to a folder on another disk; log: {LOG}",
    ),
    "memory full while compiling": (
        {"ninja": "echo 'c++: fatal error: Killed signal terminated program cc1plus'; exit 1"},
        {},
        ["  c++: fatal error: Killed signal terminated program cc1plus", f"error: {COMPILING}"],
        "  the memory ran out: set CMAKE_BUILD_PARALLEL_LEVEL=1 and run again; log: {LOG}",
    ),
    "disk nearly full": (
        {},
        {"FAKE_CODE": "import shutil; shutil.disk_usage = lambda p: shutil._ntuple_diskusage(9e9, 9e9, 7e6)"},
        ["error: the disk of {CACHE} has 7 MB free, a cpu build needs 400 MB."],
        "  free some space, or set GGUFLOOP_CACHE to a folder on another disk.",
    ),
    "disk full while unpacking": (
        {},
        {"FAKE_CODE": "def full(*a): raise OSError(28, 'No space left on device')\nbuild.unpack = full"},
        ["error: the disk is full: cannot write {CACHE}/tmp."],
        "  free some space, or set GGUFLOOP_CACHE to another folder.",
    ),
    "another library comes out": (
        {},
        {"FAKE_CODE": "build.probe = lambda d: Probe('0.3.36', 1, 'ffffffffffff', ())"},
        ["error: the library just built carries patch ffffffffffff, it must carry {PATCH}."],
        "  a compiler cache may have brought in another build; run: CCACHE_DISABLE=1 ggufloop build --force",
    ),
    "no tools at all": (
        {"cc": "exit 1", "c++": "", "git": None},
        {"FAKE_CODE": NO_PIP},
        ["error: to build the cpu backend this machine lacks a C compiler, a C++ compiler, git and pip."],
        "  install gcc and g++, or clang; install git; "
        "{PYTHON} -m ensurepip  (in an environment made by uv: uv pip install pip).",
    ),
    "no compiler, with apt": (
        {"cc": None, "c++": None, "apt-get": ""},
        {},
        ["error: to build the cpu backend this machine lacks a C compiler and a C++ compiler."],
        "  run: sudo apt-get install build-essential",
    ),
    "another binding": (
        {},
        {"FAKE_BINDING": "0.3.35"},
        ["error: llama-cpp-python 0.3.35 is installed, this version of ggufloop needs 0.3.36."],
        "  run: ggufloop build --replace-binding   (or use ggufloop in an environment of its own)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_failure(machine: FakeMachine, case: str) -> None:
    programs, env, expected, hint = FAILURES[case]
    for name, body in programs.items():
        if body is None:
            (machine.bin / name).unlink()
        else:
            machine.program(name, body)
    done = machine.build(**env)
    log = next((machine.cache / "logs").glob("cpu-*.log"), "none")
    words = {"LOG": log, "CACHE": machine.cache, "PATCH": library.patch_id(), "PYTHON": sys.executable}
    told = [line.format(**words) for line in (*expected, hint)]
    assert done.stderr.splitlines()[-len(told) :] == told
    assert (done.returncode, done.stdout) == (3, "")
    assert machine.libraries() == []
    assert machine.leftovers() == []


DOWNLOADS = {
    "no network": (
        "sys.exit('ERROR: Could not find a version that satisfies the requirement (from versions: none)')",
        "error: pip could not download llama-cpp-python==0.3.36: "
        "the package index cannot be reached or does not have it.",
        "  check the network and pip's settings, then run again, "
        "or put {FILE} into {CACHE}/sdist; log: {CACHE}/logs/{NAME}.log",
    ),
    "disk full": (
        "sys.exit('ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device')",
        "error: pip could not download llama-cpp-python==0.3.36: the disk is full.",
        "  free some space and run again; log: {CACHE}/logs/{NAME}.log",
    ),
    "wrong file": (
        "d = pathlib.Path(sys.argv[-1]); d.mkdir(); (d / 'FILE').write_bytes(b'junk')",
        "error: the package index gave another {FILE}: its sha256 is "
        "ef875a1705a5fdac206be996f4dc1f726ea6b68861eb741c37def7277f179e37, it must be {SHA}.",
        "  point pip to an index that carries the original file (pip config list shows which one is used).",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DOWNLOADS)
@pytest.mark.parametrize("cached", ["nothing", "half of it"])
def test_download_failure(machine: FakeMachine, case: str, cached: str) -> None:
    code, *expected = DOWNLOADS[case]
    if cached == "nothing":
        machine.sdist.unlink()
    else:
        machine.sdist.write_bytes(machine.sdist.read_bytes()[:50])
    done = machine.build(FAKE_PIP=code.replace("FILE", library.SDIST))
    name = next((machine.cache / "logs").glob("cpu-*.log")).stem
    words = {"FILE": library.SDIST, "CACHE": machine.cache, "NAME": name, "SHA": machine.env["FAKE_SHA"]}
    assert done.stderr.splitlines()[-2:] == [line.format(**words) for line in expected]
    assert (done.returncode, done.stdout) == (3, "")
    assert ("is damaged and is downloaded again" in done.stderr) == (cached == "half of it")
    assert list(machine.sdist.parent.iterdir()) == []
    assert machine.leftovers() == []


def test_cmake_and_ninja_come_from_the_index_into_the_cache(machine: FakeMachine) -> None:
    machine.program("cmake", "echo cmake version 3.20.9")  # too old
    (machine.bin / "ninja").unlink()
    wheels = """
name, target = sys.argv[-1], pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
program = target / ("cmake/data/bin/cmake" if name == "cmake" else "bin/ninja")
program.parent.mkdir(parents=True)
program.write_text("#!/bin/sh\\necho own " + name + ' >> "$FAKE_EVENTS"\\nPATH=/usr/bin:/bin\\n' + os.environ[name])
program.chmod(0o755)
"""
    done = machine.build(FAKE_PIP=wheels, cmake=CMAKE, ninja=NINJA)
    assert done.returncode == 0, done.stderr
    assert machine.events == ["pip install", "pip install", "own cmake", "own ninja"]
    assert "getting cmake from the package index, because this machine has no usable one\n" in done.stderr


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return state.strip()[:1] not in ("", "Z")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("where", ["downloading", "compiling"])
def test_interrupt(machine: FakeMachine, where: str, stop: signal.Signals) -> None:
    archive = machine.sdist.read_bytes()
    if where == "compiling":
        machine.program("ninja", WAIT_NINJA)
    else:
        machine.sdist.unlink()
    with machine.start(FAKE_PIP=WAIT_PIP) as process:
        wait_for(machine, "waiting")
        process.send_signal(stop)
        process.communicate(timeout=20)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[stop]
    assert machine.libraries() == []
    child = int(next(event for event in machine.events if event.startswith("pid ")).split()[1])
    if stop == signal.SIGKILL:
        os.kill(child, signal.SIGKILL)  # nobody was left to do it
    else:
        assert not is_running(child)
        assert machine.leftovers() == []

    machine.program("ninja", NINJA)
    machine.sdist.write_bytes(archive)
    assert machine.build().returncode == 0
    assert machine.leftovers() == []


def test_two_builds_at_once(machine: FakeMachine) -> None:
    machine.program("ninja", f"echo waiting >> $FAKE_EVENTS; sleep 0.7\n{NINJA}")
    first = machine.start()
    wait_for(machine, "waiting")
    second = machine.build()
    out, err = first.communicate(timeout=20)
    assert (first.returncode, second.returncode) == (0, 0), err + second.stderr
    assert out == second.stdout
    (name,) = machine.libraries()
    assert second.stderr.splitlines() == [
        "backend cpu: asked for",
        "another build is running; waiting for it to finish",
        f"up to date: {name}",
    ]
    assert machine.events == ["cmake", "ninja", "waiting"]


AUTO = [
    ("darwin", "arm64", (), (), "metal", "Apple silicon"),
    ("darwin", "x86_64", (), (), "cpu", "no GPU toolkit was found"),
    ("linux", "x86_64", ("cuda", "vulkan"), ("cuda", "vulkan"), "cuda", "its toolkit and a GPU are here"),
    ("linux", "x86_64", ("cuda", "vulkan"), ("vulkan",), "vulkan", "its toolkit and a GPU are here"),
    ("linux", "x86_64", ("cuda",), ("vulkan",), "cpu", "toolkits without a GPU: cuda"),
    ("linux", "x86_64", ("cuda", "hip"), (), "cpu", "toolkits without a GPU: cuda and hip"),
]


@pytest.mark.parametrize(("system", "machine_type", "toolkits", "gpus", "name", "why"), AUTO)
def test_auto(
    monkeypatch: pytest.MonkeyPatch, system: str, machine_type: str,
    toolkits: tuple[str, ...], gpus: tuple[str, ...], name: str, why: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(toolchain, "sys", Mock(platform=system))
    monkeypatch.setattr(toolchain, "platform", Mock(machine=lambda: machine_type))
    monkeypatch.setattr(toolchain, "_gpu_missing", lambda name: [] if name in toolkits else ["a thing"])
    monkeypatch.setattr(toolchain, "_has_gpu", lambda name: name in gpus)
    assert toolchain.choose("auto") == toolchain.BackendChoice(name, why)
    assert toolchain.choose("hip") == toolchain.BackendChoice("hip", "asked for")


def test_the_key_changes_with_everything_a_library_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = Plan("cpu", stock=False, programs=("llama-server",), versions=("cc 1", "c++ 1"))
    keys = [plan.key, replace(plan, name="cuda").key, replace(plan, programs=()).key]
    keys += [replace(plan, stock=True).key, replace(plan, versions=("cc 1", "c++ 2")).key]
    stock = replace(plan, stock=True)
    for name, value in (("cpu_id", lambda: "another"), ("SDIST_SHA256", "another")):
        with monkeypatch.context() as m:
            m.setattr(library, name, value)
            keys += [plan.key, stock.key]
    with monkeypatch.context() as m:
        m.setenv("CFLAGS", "-O1")
        keys += [plan.key, stock.key]
    patched = len(keys)
    files = sorted(path.name for path in library.patches_dir().iterdir() if path.name != "README.md")
    for file in files:
        with monkeypatch.context() as m:
            folder = shutil.copytree(library.patches_dir(), tmp_path / file)
            (folder / file).write_text((folder / file).read_text() + "\n")
            m.setattr(library, "patches_dir", lambda folder=folder: folder)
            keys.append(plan.key)
            mended = file in ("hook.cmake", "ggml-amx.patch", "common-log.patch")
            assert (stock.key != keys[3]) == mended, "the stock library depends on what mends it, not on the loop"
    assert len(keys) == patched + len(files)
    assert len(set(keys)) == len(keys)
    assert plan.key == keys[0]
