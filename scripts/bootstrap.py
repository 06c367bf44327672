#!/usr/bin/env python3
"""Run a command of this checkout, after installing what it needs: the only step between a clone and a result.

    python3 scripts/bootstrap.py ggufloop run smollm2-135m --window 12:16 --K 3 -p "Why is the sky blue?"
    python3 scripts/bootstrap.py pytest

Makes .venv in the checkout, installs the project into it (editable, with the extras the command needs), builds the
llama.cpp library if it is not in the cache, and becomes the command, arguments and exit code unchanged. A stamp file
remembers what was installed, so a second call costs a few file reads. Standard library only; nothing outside .venv and
ggufloop's cache is touched. The syntax is kept to what Python 3.6 can read, so that an old Python gets a sentence and
not a syntax error.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 10)
FAILED = 3  # as ggufloop's own exit code for a broken installation; pytest uses 1 and 2

# Extras and libraries by command; a command that is not listed is treated like ggufloop, whose own commands and
# options add to them.
EXTRAS = {
    "ggufloop": {"chat"},
    "pytest": {"chat", "dev", "eval", "lab", "test"},
    "ruff": {"dev"},
    "mypy": {"dev"},
}
OF_SUBCOMMAND = {
    "answer": {"eval", "lab"},
    "compare": {"lab"},
    "eval": {"eval"},
    "longctx": {"eval"},
    "shannon": {"lab"},
    "study": {"eval", "lab"},
}
OF_OPTION = {"--plot": {"lab"}, "--task": {"eval"}, "--tasks": {"eval"}}
LIBRARIES = {"ggufloop": [[]], "pytest": [["--with-tools"], ["--stock", "--with-tools"]], "ruff": [], "mypy": []}
# Commands of ggufloop that run no model, or that build the library themselves.
NO_LIBRARY = {"", "build", "doctor", "version", "pull", "list", "inspect", "completion"}


class Failed(Exception):
    """A step that did not work: what happened and what to do about it."""

    def __init__(self, message, remedy):
        super().__init__(message)
        self.message = message
        self.remedy = remedy


def say(text):
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


def main(argv):
    """Install what `argv` needs and run it; returns an exit code (on POSIX only after a failure)."""
    if not argv:
        print(
            "usage: python3 scripts/bootstrap.py COMMAND [ARGUMENT]...   (COMMAND: ggufloop, pytest, ...)",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, terminated)
    try:
        check_python()
        prepare(ROOT / ".venv", argv)
        return become(ROOT / ".venv", argv)
    except Failed as e:
        say(f"error: {e.message}\n  {e.remedy}")
        return FAILED
    except OSError as e:
        say(f"error: {e.filename or ROOT}: {e.strerror or e}\n  mend that and run the same command again")
        return FAILED
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on")
        return 130


def check_python():
    if sys.version_info >= OLDEST:
        return
    names = [f"python3.{minor}" for minor in range(20, OLDEST[1] - 1, -1)]
    newer = next(filter(runs, names), None)
    has = ".".join(map(str, sys.version_info[:3]))
    wanted = ".".join(map(str, OLDEST))
    raise Failed(
        f"this is Python {has}, ggufloop needs {wanted} or newer.",
        f"run: {newer} {sys.argv[0]} ..." if newer else f"install Python {wanted} or newer and run this with it",
    )


def runs(python):
    """Whether a Python of this name is there; version managers keep names of some that are not."""
    return shutil.which(python) and subprocess.call([python, "-c", ""], stderr=subprocess.DEVNULL) == 0


def terminated(signum, frame):
    sys.exit(128 + signum)


def prepare(venv, argv):
    """Bring .venv and the libraries to what the command needs. Raises Failed."""
    extras = EXTRAS.get(argv[0], EXTRAS["ggufloop"])
    libraries = LIBRARIES.get(argv[0], LIBRARIES["ggufloop"])
    subcommand = next((word for word in argv[1:] if not word.startswith("-")), "")
    if argv[0] == "ggufloop":
        options = [OF_OPTION.get(word.split("=")[0], set()) for word in argv]
        extras = extras.union(OF_SUBCOMMAND.get(subcommand, set()), *options)
    if argv[0] == "ggufloop" and (subcommand in NO_LIBRARY or {"-h", "--help"} & set(argv)):
        libraries = []
    elif argv[0] == "ggufloop" and subcommand == "serve":
        libraries = [["--server"]]
    if os.environ.get("GGUFLOOP_LIB_DIR"):  # the user brings the library
        libraries = [flags for flags in libraries if "--stock" in flags]
    if is_ready(venv, extras, libraries):
        return
    with only_one():
        stamp = read_stamp(venv)
        if not is_installed(stamp, extras):
            extras = extras | set(stamp.get("extras", []))
            if stamp:
                (venv / "bootstrap.json").unlink()
            make_venv(venv)
            install(venv, extras)
            stamp = {"project": project_key(), "extras": sorted(extras), "libraries": {}}
            write_stamp(venv, stamp)  # written last: without it the next call does all of this again
        for flags in libraries:
            if not has_library(stamp, flags):
                stamp["libraries"][library_key(flags)] = build(venv, flags)
                write_stamp(venv, stamp)


def is_ready(venv, extras, libraries):
    stamp = read_stamp(venv)
    return is_installed(stamp, extras) and all(has_library(stamp, flags) for flags in libraries)


def is_installed(stamp, extras):
    return stamp.get("project") == project_key() and extras <= set(stamp["extras"])


def has_library(stamp, flags):
    """Whether the library is there, or one with more programs beside it."""
    more = {(): [["--server"], ["--with-tools"]], ("--server",): [["--with-tools"]]}.get(tuple(flags), [])
    folders = [stamp["libraries"].get(library_key(each)) for each in [flags, *more]]
    return any(folder is not None and Path(folder, "manifest.json").is_file() for folder in folders)


def project_key():
    """What an installation depends on: the Python and the project's list of dependencies."""
    python = f"{sys.version_info[:2]} {sys.base_prefix} {ROOT}"
    return hashlib.sha256(python.encode() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()


def library_key(flags):
    """What a library depends on, as far as this checkout and the environment decide it."""
    digest = hashlib.sha256(json.dumps(flags).encode())
    for name in ("GGUFLOOP_CACHE", "GGUFLOOP_BACKEND", "XDG_CACHE_HOME", "HOME"):
        digest.update(f"{name}={os.environ.get(name)}\n".encode())
    sources = [ROOT / "ggufloop" / "backend" / name for name in ("library.py", "build.py")]
    for path in sorted((ROOT / "patches").glob("*")) + sources:
        if path.suffix != ".md":
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp(venv):
    try:
        return json.loads((venv / "bootstrap.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_stamp(venv, stamp):
    partial = venv / "bootstrap.json.partial"
    partial.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    os.replace(str(partial), str(venv / "bootstrap.json"))


def program(venv, name):
    return venv / "Scripts" / f"{name}.exe" if os.name == "nt" else venv / "bin" / name


def make_venv(venv):
    """Make .venv unless one of this Python is there and works."""
    python = program(venv, "python")
    if python.is_file():
        check = f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
        if subprocess.run([str(python), "-c", check], stderr=subprocess.DEVNULL).returncode == 0:
            return
    if venv.is_dir() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").is_file():
        raise Failed(f"{venv} is in the way: it is not a virtual environment.", "move it away")
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        name = "python{}.{}-venv".format(*sys.version_info[:2])
        raise Failed(
            "this Python cannot make virtual environments: its modules venv and ensurepip are missing.",
            f"run: sudo apt-get install {name}   (or use another Python)",
        )
    say(f"making {venv}")
    log = Path(tempfile.gettempdir(), f"ggufloop-venv-{os.getpid()}.log")  # .venv itself is about to be emptied
    words = [sys.executable, "-m", "venv", "--clear", str(venv)]
    run_logged("making the virtual environment", words, log, f"delete {venv} and run the same command again")
    log.unlink()


def install(venv, extras):
    """Install the project and its extras into .venv."""
    names = ",".join(sorted(extras))
    log = venv / "bootstrap.log"
    say(f"installing ggufloop with {names} into {venv} (log: {log})")
    words = [str(program(venv, "python")), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    words += ["-e", f"{ROOT}[{names}]"]
    run_logged("installing the project", words, log, "check the network and pip's settings, run the same command again")


def build(venv, flags):
    """Build or find a library with `ggufloop build`, which shows its own progress; returns the library's folder."""
    command = " ".join(["ggufloop", "build", *flags])
    say(f"looking for the library, or building it: {command}")
    process = subprocess.Popen([str(program(venv, "ggufloop")), "build", *flags], stdout=subprocess.PIPE)
    with stopping(process):
        folder = process.communicate()[0]
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode:
        raise Failed(f"`{command}` failed, see above.", "mend it and run the same command again")
    return os.fsdecode(folder).strip()


@contextmanager
def stopping(process):
    """Take a child along when this process is interrupted, with the time it needs to clean up."""
    try:
        yield
    except BaseException:
        process.terminate()
        process.wait()
        raise


def run_logged(step, words, log, remedy):
    """Run a program with its output in `log`; every ten seconds say how far it is. Raises Failed."""
    started = told = time.monotonic()
    with open(str(log), "wb") as out:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        with stopping(process):
            while process.poll() is None:
                time.sleep(0.1)
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    say(f"  {told - started:.0f} s: {' '.join(lines_of(log)[-1:])[:100]}")
    if process.returncode:
        lines = lines_of(log)
        for line in [line for line in lines if line.startswith("ERROR") or "rror:" in line][-5:] or lines[-5:]:
            print(f"  {line}", file=sys.stderr)
        raise Failed(f"{step} failed with status {process.returncode}; log: {log}", remedy)


def lines_of(log):
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


@contextmanager
def only_one():
    """Let one bootstrap of this checkout work at a time. The system frees the lock of a process that dies.

    The lock is on this very file: it is always there and never replaced while a bootstrap runs.
    """
    with open(__file__, "rb") as held:
        if not try_lock(held):
            say("another bootstrap of this checkout is running; waiting for it to finish")
            while not try_lock(held):
                time.sleep(0.2)
        yield


def try_lock(held):
    try:
        if os.name == "nt":
            import msvcrt

            held.seek(1 << 30)  # locked bytes cannot be read on Windows, so one far behind the end
            msvcrt.locking(held.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def become(venv, argv):
    """Turn into the command; where a process cannot do that, run it and return its exit code. Raises Failed."""
    path = program(venv, argv[0])
    if not path.is_file():
        raise Failed(f"{argv[0]} is not a command of this project.", f"the commands are in {path.parent}")
    os.environ["VIRTUAL_ENV"] = str(venv)
    os.environ["PATH"] = str(path.parent) + os.pathsep + os.environ.get("PATH", "")
    sys.stdout.flush()
    if os.name == "nt":
        return subprocess.call([str(path), *argv[1:]])
    os.execv(str(path), [str(path), *argv[1:]])
    return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
