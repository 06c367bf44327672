"""The library that a wheel brings: which variant a CPU gets, when it is used at all, and what a wheel is made of.

A wheel stands in here whose libraries are text files; the real one takes a compiler many minutes.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make_wheel
import pytest
from support import ROOT

from ggufloop.backend import bundled, doctor, library
from ggufloop.backend.library import Backend
from ggufloop.backend.verify import Failure, Verification
from ggufloop.errors import BackendError
from ggufloop.files import PACKAGE

HASWELL = frozenset(["sse4_2", "avx", "f16c", "fma", "avx2", "bmi2", "popcnt"])
ALL = frozenset(" ".join(bundled.NEEDS.values()).split())
OTHER_CPU = "0" * 12


def parts(folder: Path) -> Path:
    """What make_wheel.py puts into a wheel, but for the content of libraries."""
    shared = folder / bundled.SHARED
    shared.mkdir(parents=True)
    for name in ("libllama.so.0", "libggml.so.0", "libgomp.so.1", "llama-server"):
        (shared / name).write_text(name)
    for variant in bundled.VARIANTS:
        (folder / f"{variant}.so").write_text(variant)
    Backend(
        folder, "cpu", False, library.patch_id(), "wheel-abc", ("llama-server",), library.BINDING_VERSION, "", "cc 1",
        programs_id=library.programs_id(),
    ).save()  # fmt: skip
    (folder / "binding" / "llama_cpp").mkdir(parents=True)
    (folder / "binding" / "llama_cpp" / "__init__.py").write_text(f'__version__ = "{library.BINDING_VERSION}"\n')
    (folder / "licenses").mkdir()
    (folder / "licenses" / "llama.cpp.txt").write_text("MIT")
    return folder


class Wheel:
    """An installation from a wheel. wrong: variants that compute wrongly here; checked: those that were looked at."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.wrong: set[str] = set()
        self.checked: list[str] = []

    def check(self, folder: Path) -> Verification:
        assert (folder / "libggml-cpu.so").resolve() == (folder / bundled.CPU).resolve(), "the binding's name for it"
        variant = (folder / bundled.CPU).read_text()
        self.checked.append(variant)
        failures = (Failure("Q4_0", 32, "CPU", "plain", "SIGILL"),) if variant in self.wrong else ()
        return Verification(("F32",), ("CPU",), ("plain",), failures, 1.0)

    def built(self, name: str, **changed: object) -> Backend:
        """A library that the user has built."""
        folder = self.cache / "backends" / f"{name}-own"
        made = Backend(folder, name, False, library.patch_id(), "own", (), library.BINDING_VERSION, "", "cc 1")
        made = replace(made, cpu=library.cpu_id(), verified=library.cpu_id(), **changed)  # type: ignore[arg-type]
        folder.mkdir(parents=True)
        made.save()
        return made


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    made = Wheel(tmp_path)
    for name in ("GGUFLOOP_BACKEND", "GGUFLOOP_LIB_DIR", "GGUFLOOP_STOCK_LIB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GGUFLOOP_CACHE", str(made.cache))
    monkeypatch.setattr(library, "BUNDLED", parts(tmp_path / "bundled"))
    monkeypatch.setattr(bundled, "cpu_flags", lambda: HASWELL)
    monkeypatch.setattr(bundled, "check", made.check)
    return made


@pytest.mark.parametrize(
    ("flags", "best", "number"),
    [
        (ALL, "sapphirerapids", 6),
        (ALL - {"amx_int8"}, "zen4", 5),
        (ALL - {"amx_tile", "avx512_bf16"}, "icelake", 4),
        (ALL - {"avx512bw"}, "alderlake", 3),
        (HASWELL, "haswell", 2),
        (HASWELL - {"fma"}, "x64", 1),
        (frozenset({"sse2"}), "x64", 1),
    ],
)
def test_a_cpu_gets_the_richest_variant_it_can_run(flags: frozenset[str], best: str, number: int) -> None:
    found = bundled.fitting(flags)
    assert (found[0], found[-1], len(found)) == (best, "x64", number)


def test_a_variant_names_every_option_that_a_portable_build_has() -> None:
    words = [word for variant in bundled.VARIANTS.values() for word in variant.split()]
    assert {f"GGML_{word}" for word in words} == bundled.NEEDS.keys()
    counts = [sum(bundled.options(variant).values()) for variant in bundled.VARIANTS]
    assert counts[-1] == 0


def test_a_wheel_is_used_at_once_and_put_into_the_cache_once(wheel: Wheel) -> None:
    located = library.locate()
    assert located.directory.parent == wheel.cache / "backends"
    assert not wheel.cache.exists(), "saying which library it would be writes nothing"
    used = library.usable()
    assert (used.directory, used.variant, used.gave_up) == (located.directory, "haswell", "")
    assert used == Backend.load(used.directory) == library.locate() == library.usable()
    assert library.is_verified(used)
    assert wheel.checked == ["haswell"]
    assert (used.directory / "libllama.so").read_text() == "libllama.so.0"
    server = library.program("llama-server")
    assert (server.parent, os.access(server, os.X_OK)) == (used.directory, True)


def test_a_variant_that_computes_wrongly_is_passed_over(wheel: Wheel) -> None:
    wheel.wrong = {"haswell"}
    assert library.program("llama-server").is_file(), "asking for a program is a first use too"
    used = library.usable()
    assert (used.variant, used.gave_up) == ("x64", "what haswell has (Q4_0, 32 columns, CPU: SIGILL)")
    assert wheel.checked == ["haswell", "x64"]
    assert [p.name for p in (wheel.cache / "backends").iterdir()] == [used.directory.name]


def test_no_variant_computes_right(wheel: Wheel) -> None:
    wheel.wrong = set(bundled.VARIANTS)
    with pytest.raises(BackendError) as e:
        library.usable()
    assert e.value.message == (
        "the library that came with ggufloop does not compute right on this CPU: Q4_0, 32 columns, CPU: SIGILL."
    )
    assert e.value.hint == "build one here: ggufloop build"
    assert list((wheel.cache / "backends").iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundled.shutil, "copyfile", full)
    with pytest.raises(BackendError, match=r"^the disk is full: cannot write .*wheel-abc") as e:
        library.usable()
    assert "GGUFLOOP_CACHE" in e.value.hint
    assert list((wheel.cache / "backends").iterdir()) == []


def test_what_the_user_built_goes_before(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = wheel.built("cuda")
    assert library.usable() == cuda
    monkeypatch.setenv("GGUFLOOP_BACKEND", "cpu")
    assert library.usable().variant == "haswell"
    monkeypatch.delenv("GGUFLOOP_BACKEND")
    assert library.locate() == cuda, "though the other one is newer"
    monkeypatch.setenv("GGUFLOOP_BACKEND", "vulkan")
    with pytest.raises(BackendError, match=r"^no patched vulkan llama.cpp is built yet\.$"):
        library.locate()
    with pytest.raises(BackendError, match="no stock"):
        library.locate(stock=True)


def test_a_cache_of_several_machines(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    here = library.usable()
    monkeypatch.setattr(library, "cpu_id", lambda: OTHER_CPU)
    monkeypatch.setattr(bundled, "cpu_flags", lambda: frozenset({"sse2"}))
    there = library.usable()
    assert (there.variant, there.cpu) == ("x64", OTHER_CPU)
    assert there.directory != here.directory


def test_another_wheel_brings_its_own(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = library.usable()
    newer = Backend.load(library.BUNDLED)
    assert newer is not None
    replace(newer, key="wheel-def").save()
    second = library.usable()
    assert (second.variant, second.directory) != ("", first.directory)
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "none")
    assert library.locate().variant == "haswell", "an installation without one uses what is in the cache"


def test_doctor_takes_it_and_says_so(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check", wheel.check)
    monkeypatch.setattr(doctor, "_loaded", lambda backend: doctor.Probe("", 1, backend.patch_id, ()))
    report = doctor.diagnose()
    assert (report.variant, report.problems) == ("haswell", ())
    assert report.directory is not None
    assert report.directory.is_dir()


def test_the_binding_of_a_wheel_goes_before_another(tmp_path: Path) -> None:
    package = tmp_path / "site" / "ggufloop"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    parts(package / "bundled")
    other = tmp_path / "other" / "llama_cpp"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text('__version__ = "0.2.1"\n')
    code = "from ggufloop.backend import library; print(library.binding_version(), library.of_wheel().key)"
    paths = os.pathsep.join([str(tmp_path / "other"), str(package.parent)])
    env = {"PYTHONPATH": paths, "GGUFLOOP_CACHE": str(tmp_path / "cache"), "PATH": os.environ["PATH"]}
    shutil.copytree(ROOT / "patches", package / "patches")
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{library.BINDING_VERSION} wheel-abc\n", done.stderr


# the script


def test_what_a_wheel_is_made_of(tmp_path: Path) -> None:
    make_wheel.project(parts(tmp_path / "parts"), "manylinux_2_36_x86_64", tmp_path / "project")
    made = tmp_path / "project" / "ggufloop" / "bundled"
    assert Backend.load(made) == replace(Backend.load(tmp_path / "parts"), directory=made)  # type: ignore[type-var]
    assert (made / "sapphirerapids.so").read_text() == "sapphirerapids"
    assert (tmp_path / "project" / "patches" / "llama-loop.h").is_file()
    hook = (tmp_path / "project" / "hatch_build.py").read_text()
    assert '"py3-none-manylinux_2_36_x86_64"' in hook
    text = (tmp_path / "project" / "pyproject.toml").read_text()
    assert 'license-files = ["LICENSE", "ggufloop/bundled/licenses/*"]' in text


def test_a_library_that_needs_what_is_not_in_the_wheel_is_refused() -> None:
    folder = library.locate().directory  # compiled here, for here
    with pytest.raises(BackendError, match=r"^libllama\.so\.0 needs .*libstdc\+\+\.so\.6"):
        make_wheel.platform_tag([folder / "libllama.so.0", folder / "libggml.so.0", folder / "libggml-base.so.0"])
