"""What the scripts that build for a GPU without one do before they build, and what of it `ggufloop build` takes up."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import build_cuda
import build_vulkan
import pytest
from support import ROOT
from support.fake_machine import FakeMachine
from support.rpc_worker import environment

from ggufloop.backend import toolchain
from ggufloop.backend.build import Plan
from ggufloop.backend.library import Backend
from ggufloop.errors import BackendError


def sdk(root: Path, header: str) -> Path:
    (root / "include" / "vulkan").mkdir(parents=True)
    (root / "include" / "vulkan" / "vulkan.h").write_text("")
    (root / "include" / "vulkan" / "vulkan_core.h").write_text(header)
    (root / "share" / "cmake" / "SPIRV-Headers").mkdir(parents=True)
    return root


def test_headers_are_new_enough_or_not(tmp_path: Path) -> None:
    assert build_vulkan.has_headers(sdk(tmp_path / "new", "#define VK_EXT_layer_settings 1\n"))
    assert not build_vulkan.has_headers(sdk(tmp_path / "old", "#define VK_VERSION_1_3 1\n"))
    assert not build_vulkan.has_headers(tmp_path / "none")


def test_a_vulkan_sdk_is_all_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, path="": path and f"{path}/{name}")
    monkeypatch.setenv("VULKAN_SDK", str(sdk(tmp_path, "")))
    assert toolchain._gpu_missing("vulkan") == []


def test_without_a_mirror_of_debian_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_vulkan.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(build_vulkan, "run", lambda words, cwd=None: "Ubuntu main http://mirror/ubuntu/\n")
    with pytest.raises(BackendError) as e:
        build_vulkan._download(tmp_path)
    assert "apt knows no mirror of Debian" in e.value.message
    assert "VULKAN_SDK" in e.value.hint


def test_the_architecture_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a flag: of the variable itself CMake sees nothing, because ggml asks for the GPU that is here first."""
    plan = Plan("cuda", stock=False, programs=(), versions=())
    monkeypatch.delenv("CUDAARCHS", raising=False)
    native = plan.key
    assert not any("CUDA_ARCHITECTURES" in flag for flag in plan.flags)
    monkeypatch.setenv("CUDAARCHS", "90")
    assert "-DCMAKE_CUDA_ARCHITECTURES=90" in plan.flags
    assert plan.key != native


@pytest.mark.skipif(sys.platform != "linux", reason="libcuda.so.1 is Linux's")
def test_the_stand_in_for_the_driver_has_its_functions_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cuda.h").write_text(
        "#define cuMemFree cuMemFree_v2\ntypedef int CUresult;\nCUresult cuInit(unsigned flags);\n"
        "CUresult cuMemFree(unsigned long p);\n"
    )
    build_cuda.driver(tmp_path / "stub", tmp_path)
    library = ctypes.CDLL(str(tmp_path / "stub" / "libcuda.so"))
    assert [library.cuInit(0), library.cuMemFree_v2(None)] == [build_cuda.STUB_ERROR] * 2
    assert not hasattr(library, "cuMemFree")
    with monkeypatch.context() as m:
        m.setattr(toolchain.ctypes, "CDLL", lambda name: library)
        assert toolchain.lacks_driver("cuda")
        assert not toolchain.lacks_driver("vulkan")


def test_without_nvcc_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_cuda.py"],
        env=environment(PATH=str(tmp_path), CUDACXX=str(tmp_path / "nvcc")), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.splitlines()[0] == "build_cuda: nvcc is not here."


def test_a_cuda_library_is_kept_where_there_is_no_driver_and_verified_nowhere(tmp_path: Path) -> None:
    """`check` and `probe` would load it, which fails; a second build finds it, and does not load it either."""
    machine = FakeMachine(tmp_path)
    machine.program("nvcc", 'echo "Cuda compilation tools, release 13.0"')
    without = (
        "toolchain.lacks_driver = lambda name: name == 'cuda'\n"
        "build.check = build.probe = lambda d: sys.exit('it was loaded')"
    )
    done = machine.build("--backend", "cuda", FAKE_CODE=without)
    assert done.returncode == 0, done.stderr
    assert "not verified: the GPU's driver is not here" in done.stderr
    built = Backend.load(Path(done.stdout.strip()))
    assert built is not None
    assert (built.name, built.verified) == ("cuda", "")
    again = machine.build("--backend", "cuda", FAKE_CODE=without)
    assert again.stdout == done.stdout
    assert "up to date" in again.stderr
