"""scripts/bootstrap.py in a small checkout, with fakes of venv, pip, ggufloop and pytest that log what they are asked.

The fakes lie on PYTHONPATH, where `python -m venv` and `python -m pip` find them first; the script is the real one.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
from support import ROOT

VENV = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[-1])
(folder / "bin").mkdir(parents=True, exist_ok=True)
(folder / "pyvenv.cfg").touch()
(folder / "bin" / "python").unlink(missing_ok=True)
(folder / "bin" / "python").symlink_to(sys.executable)
open(os.environ["FAKE_EVENTS"], "a").write("venv\\n")
"""

PIP = """
import os, pathlib, sys, time
open(os.environ["FAKE_EVENTS"], "a").write("pip " + sys.argv[-1].split("checkout")[1] + "\\n")
exec(os.environ.get("FAKE_PIP", ""))
for name in ("ggufloop", "pytest"):
    path = pathlib.Path(os.environ["FAKE_VENV"], "bin", name)
    path.write_text(os.environ["FAKE_PROGRAM"])
    path.chmod(0o755)
"""

PROGRAM = """#!/bin/sh
name=$(basename "$0")
if [ "$name $1" = "ggufloop build" ]; then
    echo "build $2${3:+ $3}" >> "$FAKE_EVENTS"
    [ "$FAKE_BUILD" ] && { echo "error: no compiler" >&2; exit 3; }
    mkdir -p "$GGUFLOOP_CACHE/lib$2" && touch "$GGUFLOOP_CACHE/lib$2/manifest.json" && echo "$GGUFLOOP_CACHE/lib$2"
    exit
fi
echo "$name of $VIRTUAL_ENV"
for word; do echo "<$word>"; done
exit 7
"""


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.venv = self.root / ".venv"
        self._events = folder / "events"
        self._events.touch()
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "bootstrap.py", self.root / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        shutil.copytree(ROOT / "patches", self.root / "patches")
        package = self.root / "ggufloop" / "backend"
        package.mkdir(parents=True)
        for name in ("library.py", "build.py"):
            shutil.copy(ROOT / "ggufloop" / "backend" / name, package)
        for name, code in (("venv", VENV), ("pip", PIP)):
            (folder / "python" / name).mkdir(parents=True)
            (folder / "python" / name / "__init__.py").touch()
            (folder / "python" / name / "__main__.py").write_text(code)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GGUFLOOP")}
        self.env = {
            **kept,
            "PYTHONPATH": str(folder / "python"),
            "GGUFLOOP_CACHE": str(folder / "cache"),
            "FAKE_EVENTS": str(self._events),
            "FAKE_VENV": str(self.venv),
            "FAKE_PROGRAM": PROGRAM,
        }

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, self.root / "scripts" / "bootstrap.py", *args],
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def events(self) -> list[str]:
        """What the fakes were asked since the last call."""
        found = self._events.read_text().splitlines()
        self._events.write_text("")
        return found

    def wait_for(self, event: str) -> None:
        deadline = time.monotonic() + 30
        while event not in self._events.read_text().splitlines():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_first_call_installs_and_passes_everything_through(checkout: Checkout) -> None:
    done = checkout.run("ggufloop", "run", "a model", "--K", "3", "-p", "two words")
    assert checkout.events() == ["venv", "pip [chat]", "build "]
    assert done.stdout.splitlines() == [
        f"ggufloop of {checkout.venv}", "<run>", "<a model>", "<--K>", "<3>", "<-p>", "<two words>",
    ]  # fmt: skip
    assert done.returncode == 7
    assert done.stderr.splitlines() == [
        f"bootstrap: making {checkout.venv}",
        f"bootstrap: installing ggufloop with chat into {checkout.venv} (log: {checkout.venv}/bootstrap.log)",
        "bootstrap: looking for the library, or building it: ggufloop build",
    ]


def test_second_call_does_nothing_and_takes_no_time(checkout: Checkout) -> None:
    checkout.run("ggufloop", "run")
    checkout.events()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = checkout.run("ggufloop", "run")
        seconds.append(time.perf_counter() - started)
        assert (done.returncode, done.stderr) == (7, "")
    assert checkout.events() == []
    assert min(seconds) < 0.3


def test_each_command_gets_what_it_needs_and_no_more(checkout: Checkout) -> None:
    for words in (["version"], ["build", "--backend", "cuda"], ["-v", "doctor"], ["run", "--help"], []):
        checkout.run("ggufloop", *words)
    assert [e for e in checkout.events() if e != "build --backend cuda"] == ["venv", "pip [chat]"]
    assert checkout.run("pytest", "-k", "x").stdout.splitlines() == [f"pytest of {checkout.venv}", "<-k>", "<x>"]
    assert checkout.events() == [
        "pip [chat,dev,eval,lab,test]",
        "build --with-tools",
        "build --stock --with-tools",
    ]
    checkout.run("ggufloop", "run")
    checkout.run("ggufloop", "serve")
    assert checkout.events() == [], "what pytest needs includes what ggufloop needs"
    checkout.run("pytest", GGUFLOOP_LIB_DIR="/mine", GGUFLOOP_BACKEND="vulkan")
    assert checkout.events() == ["build --stock --with-tools"], (
        "another backend, and a library of one's own instead of the patched"
    )


def test_what_plots_need_is_installed_for_plots_only(checkout: Checkout) -> None:
    checkout.run("ggufloop", "trace", "m", "-p", "--plots")
    assert checkout.events() == ["venv", "pip [chat]", "build "]
    for words in (["--plot", "a.png"], ["--plot=a.png"]):
        checkout.run("ggufloop", "trace", "m", "-p", "x", *words)
    assert checkout.events() == ["pip [chat,lab]", "build "]


def test_what_a_server_needs_is_a_library_with_its_program(checkout: Checkout) -> None:
    checkout.run("ggufloop", "run", "serve")
    assert checkout.events() == ["venv", "pip [chat]", "build "]
    checkout.run("ggufloop", "serve", "m")
    assert checkout.events() == ["build --server"]
    checkout.run("ggufloop", "serve", "--help")
    assert checkout.events() == []


def test_what_tasks_need_is_installed_for_tasks_only(checkout: Checkout) -> None:
    checkout.run("ggufloop", "run", "eval", "-p", "tasks")
    assert checkout.events() == ["venv", "pip [chat]", "build "]
    checkout.run("ggufloop", "-v", "eval", "m")
    assert checkout.events() == ["pip [chat,eval]", "build "]
    checkout.run("ggufloop", "sweep", "m", "--tasks", "brackets")
    checkout.run("ggufloop", "longctx", "m")
    assert checkout.events() == []


@pytest.mark.parametrize("flag", ["--task", "--tasks=mine.csv"])
def test_what_tasks_need_is_installed_for_every_name_of_theirs(checkout: Checkout, flag: str) -> None:
    checkout.run("ggufloop", "sweep", "m", flag, "mine.csv")
    assert checkout.events() == ["venv", "pip [chat,eval]", "build "]


@pytest.mark.parametrize("command", [("answer", "m", "--text", "a.txt"), ("study", "run", "p.toml")])
def test_what_questions_and_figures_need_is_installed_at_once(checkout: Checkout, command: tuple[str, ...]) -> None:
    """Of the README's second command: nobody is to be told of an extra by the first one they try."""
    checkout.run("ggufloop", *command)
    assert checkout.events() == ["venv", "pip [chat,eval,lab]", "build "]


def test_what_reports_need_is_installed_for_compare_and_shannon(checkout: Checkout) -> None:
    checkout.run("ggufloop", "compare", "m")
    assert checkout.events() == ["venv", "pip [chat,lab]", "build "]
    checkout.run("ggufloop", "shannon", "fit", "pythia")
    assert checkout.events() == []


def test_changes_are_noticed(checkout: Checkout) -> None:
    checkout.run("ggufloop", "run")
    checkout.events()
    library = Path(json.loads((checkout.venv / "bootstrap.json").read_text())["libraries"].popitem()[1])

    def append(path: Path) -> None:
        path.write_text(path.read_text() + "\n")

    (library / "manifest.json").unlink()
    assert (checkout.run("ggufloop", "run").returncode, checkout.events()) == (7, ["build "])
    append(checkout.root / "patches" / "llama-loop.cpp")
    assert (checkout.run("ggufloop", "run").returncode, checkout.events()) == (7, ["build "])
    append(checkout.root / "pyproject.toml")
    assert (checkout.run("ggufloop", "run").returncode, checkout.events()) == (7, ["pip [chat]", "build "])
    (checkout.venv / "bootstrap.json").write_text("{ half a")
    assert (checkout.run("ggufloop", "run").returncode, checkout.events()) == (7, ["pip [chat]", "build "])
    (checkout.venv / "bin" / "python").unlink()
    (checkout.venv / "bin" / "python").symlink_to("/nowhere/python")  # the Python it was made with was removed
    append(checkout.root / "pyproject.toml")
    assert (checkout.run("ggufloop", "run").returncode, checkout.events()) == (7, ["venv", "pip [chat]", "build "])


def test_failures_name_the_step_the_log_and_the_remedy(checkout: Checkout) -> None:
    done = checkout.run("ggufloop", "run", FAKE_PIP="print('ERROR: no network'); sys.exit(1)")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[-3:] == [
        "  ERROR: no network",
        f"bootstrap: error: installing the project failed with status 1; log: {checkout.venv}/bootstrap.log",
        "  check the network and pip's settings, run the same command again",
    ]
    done = checkout.run("ggufloop", "run", FAKE_BUILD="fails")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[-3:] == [
        "error: no compiler",
        "bootstrap: error: `ggufloop build` failed, see above.",
        "  mend it and run the same command again",
    ]
    assert checkout.events() == ["venv", "pip [chat]", "pip [chat]", "build "]
    assert checkout.run("ggufloop", "run").returncode == 7
    assert checkout.events() == ["build "]

    done = checkout.run("no-such-command")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        "bootstrap: error: no-such-command is not a command of this project.\n"
        f"  the commands are in {checkout.venv}/bin\n"
    )
    assert checkout.run().returncode == 2


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_install_is_done_again(checkout: Checkout, stop: signal.Signals, status: int) -> None:
    slow = 'open(os.environ["FAKE_EVENTS"], "a").write(f"waiting\\n"); time.sleep(2)'
    with checkout.start("ggufloop", "run", FAKE_PIP=slow) as process:
        checkout.wait_for("waiting")
        process.send_signal(stop)
        process.communicate(timeout=20)
    assert process.returncode == status
    assert not (checkout.venv / "bootstrap.json").exists()
    checkout.events()
    assert checkout.run("ggufloop", "run").returncode == 7
    assert checkout.events() == ["pip [chat]", "build "]


def test_two_at_once(checkout: Checkout) -> None:
    slow = 'open(os.environ["FAKE_EVENTS"], "a").write(f"waiting\\n"); time.sleep(0.7)'
    with checkout.start("ggufloop", "run", FAKE_PIP=slow) as first:
        checkout.wait_for("waiting")
        second = checkout.run("ggufloop", "run")
        first.communicate(timeout=20)
    assert (first.returncode, second.returncode) == (7, 7)
    assert second.stderr == "bootstrap: another bootstrap of this checkout is running; waiting for it to finish\n"
    assert checkout.events() == ["venv", "pip [chat]", "waiting", "build "]


def test_a_folder_in_the_way_is_not_touched(checkout: Checkout) -> None:
    checkout.venv.mkdir()
    (checkout.venv / "mine").write_text("data")
    done = checkout.run("ggufloop", "run")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"bootstrap: error: {checkout.venv} is in the way: it is not a virtual environment.\n  move it away\n"
    )
    assert [p.name for p in checkout.venv.iterdir()] == ["mine"]


@pytest.fixture
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("newer", ["python3.12", None])
def test_an_old_python_gets_a_sentence(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], newer: str | None
) -> None:
    old = SimpleNamespace(version_info=(3, 9, 2), argv=["scripts/bootstrap.py"], stderr=sys.stderr)
    monkeypatch.setattr(bootstrap, "sys", old)
    monkeypatch.setattr(bootstrap, "signal", Mock())
    monkeypatch.setattr(bootstrap, "runs", lambda name: name == newer)
    assert bootstrap.main(["pytest"]) == 3
    remedy = f"run: {newer} scripts/bootstrap.py ..." if newer else "install Python 3.10 or newer and run this with it"
    assert (
        capsys.readouterr().err
        == f"bootstrap: error: this is Python 3.9.2, ggufloop needs 3.10 or newer.\n  {remedy}\n"
    )


def test_a_python_without_ensurepip(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    debian = SimpleNamespace(find_spec=lambda name: None if name == "ensurepip" else name)
    monkeypatch.setattr(bootstrap, "importlib", SimpleNamespace(util=debian))
    with pytest.raises(bootstrap.Failed, match="its modules venv and ensurepip are missing") as caught:
        bootstrap.make_venv(tmp_path / ".venv")
    version = "{}.{}".format(*sys.version_info[:2])
    assert caught.value.remedy == f"run: sudo apt-get install python{version}-venv   (or use another Python)"
    assert not (tmp_path / ".venv").exists()


def test_the_script_stays_readable_for_old_pythons() -> None:
    """The sentence above reaches nobody if an old Python cannot parse the file."""
    ast.parse((ROOT / "scripts" / "bootstrap.py").read_text(), feature_version=(3, 6))
