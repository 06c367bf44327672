"""A machine made of shell scripts, on which each step of `ggufloop build` takes milliseconds and can be made to fail.

    machine = FakeMachine(tmp_path)
    machine.program("ninja", "echo '[1/1] x'; exit 1")        # replaces one program
    done = machine.build("--stock")                           # the real command line; .returncode, .stdout, .stderr

PATH holds only the fakes, the cache and the source archive are of this machine, pip is a fake package on PYTHONPATH,
and the library is a text file, so what it loads and computes is faked too. Everything else, the command line included,
is real.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from ggufloop.backend import library
from support import ROOT

_DRIVER = """
import os, sys
from ggufloop.backend import build, library as backend, toolchain
from ggufloop.backend.probe import Probe
from ggufloop.backend.verify import Failure, Verification
backend.SDIST_SHA256 = os.environ["FAKE_SHA"]
backend.binding_version = lambda: os.environ.get("FAKE_BINDING", backend.BINDING_VERSION) or None
stock = "--stock" in sys.argv
build.probe = lambda d: Probe(backend.BINDING_VERSION, None if stock else 1, None if stock else backend.patch_id(), ())
build.check = lambda d: Verification(("F32",), ("CPU",), ("plain",), (), 1.0)
exec(os.environ.get("FAKE_CODE", ""))
from ggufloop.cli import main
main(sys.argv[1:])
"""

_PIP = """
import os, pathlib, sys, time
open(os.environ["FAKE_EVENTS"], "a").write("pip " + sys.argv[sys.argv.index("--no-input") + 1] + "\\n")
exec(os.environ.get("FAKE_PIP", "sys.exit('ERROR: unexpected pip')"))
"""

CMAKE = """
if [ "$1" = --version ]; then echo "cmake version 3.30.1"; exit; fi
while [ $# -gt 0 ]; do if [ "$1" = -B ]; then tree=$2; fi; shift; done
mkdir -p "$tree"
"""

NINJA = """
echo "[1/2] compiled"
mkdir -p "$2/bin"
echo library > "$2/bin/libllama.so"
echo "[2/2] linked"
"""


class FakeMachine:
    """folder: where all of it lives; `events` lists what the logged fakes did, in order."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._events = folder / "events"
        self._events.touch()
        pip = folder / "python" / "pip"
        pip.mkdir(parents=True)
        (pip / "__init__.py").touch()
        (pip / "__main__.py").write_text(_PIP)
        self.program("cc", "echo 'fakecc 1.2'")
        self.program("c++", "echo 'fakec++ 1.2'")
        self.program("git", "exit 0")
        self.program("cmake", CMAKE)
        self.program("ninja", NINJA)
        self.sdist = self.cache / "sdist" / library.SDIST
        self.sdist.parent.mkdir(parents=True)
        self.sdist.write_bytes(_archive())
        self.env = {
            "PATH": str(self.bin),
            "PYTHONPATH": os.pathsep.join([str(pip.parent), str(ROOT)]),
            "GGUFLOOP_CACHE": str(self.cache),
            "HOME": str(folder),
            "FAKE_EVENTS": str(self._events),
            "FAKE_SHA": hashlib.sha256(self.sdist.read_bytes()).hexdigest(),
        }

    def program(self, name: str, body: str) -> None:
        """Put a shell script on PATH that logs its name and runs `body`."""
        path = self.bin / name
        event = f'[ "$1" = --version ] || echo {name} >> "$FAKE_EVENTS"'
        path.write_text(f"#!/bin/sh\n{event}\nPATH=/usr/bin:/bin\n{body}\n")
        path.chmod(0o755)

    @property
    def events(self) -> list[str]:
        return self._events.read_text().split("\n")[:-1]

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        """Start `ggufloop build --backend cpu ARGS`."""
        return subprocess.Popen(
            [sys.executable, "-c", _DRIVER, "build", "--backend", "cpu", *args],
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def build(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `ggufloop build --backend cpu ARGS` to its end."""
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def libraries(self) -> list[str]:
        """Names of what is installed."""
        return sorted(p.name for p in (self.cache / "backends").glob("*"))

    def leftovers(self) -> list[Path]:
        """Temporary files anywhere in the cache."""
        return [*(self.cache / "tmp").glob("*"), *self.cache.rglob("*.partial"), *self.cache.rglob(".download")]


def _archive() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        member = tarfile.TarInfo(f"llama_cpp_python-{library.BINDING_VERSION}/vendor/llama.cpp/CMakeLists.txt")
        tar.addfile(member, io.BytesIO())
    return out.getvalue()
