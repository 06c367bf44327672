"""What this machine can build: which backend, with which compiler and tools, and what is missing.

    chosen = choose("auto")                    # BackendChoice(name="cpu", why="no GPU toolkit with a GPU was found")
    compilers = preflight(chosen.name, stock=False)      # their versions, or one error that lists all that is missing
    for flags in narrowings(): ...       # what to compile the CPU's kernels with, from all it has to what is safe

A GPU toolkit without a GPU does not count for `auto`: nvcc is on many machines that only compile for others, and a
CUDA build takes the better part of an hour. `--backend cuda` builds there all the same.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ggufloop.backend.library import NAMES
from ggufloop.errors import BackendError, UsageError, nearest

CMAKE_MINIMUM = (3, 21)
_CUDA_ERROR_STUB_LIBRARY = 34  # of cuda.h

# Package that holds each thing, by package manager; "" where there is none and the thing is named instead.
_MANAGERS = {"apt-get": "sudo apt-get install", "dnf": "sudo dnf install", "brew": "brew install"}
_PACKAGES = {
    "a C compiler": ("build-essential", "gcc", ""),
    "a C++ compiler": ("build-essential", "gcc-c++", ""),
    "git": ("git", "git", "git"),
    "nvcc": ("nvidia-cuda-toolkit", "cuda-toolkit", ""),
    "hipcc": ("hipcc libhipblas-dev librocblas-dev", "rocm-hip-devel hipblas-devel rocblas-devel", ""),
    "glslc": ("glslc", "glslc", "shaderc"),
    "the Vulkan headers": ("libvulkan-dev", "vulkan-loader-devel", "vulkan-headers vulkan-loader"),
    "the SPIR-V headers": ("spirv-headers", "spirv-headers-devel", "spirv-headers"),
}
_COMPILERS = {
    "darwin": "xcode-select --install",
    "win32": "install the C++ build tools of Visual Studio and run this in their developer prompt",
}.get(sys.platform, "install gcc and g++, or clang")
_BY_HAND = {
    "a C compiler": _COMPILERS,
    "a C++ compiler": _COMPILERS,
    "git": "install git",
    "nvcc": "install NVIDIA's CUDA toolkit",
    "hipcc": "install AMD's ROCm",
    "glslc": "install the Vulkan SDK",
    "the Vulkan headers": "install the Vulkan SDK",
    "the SPIR-V headers": "install the Vulkan SDK",
    "pip": f"{shlex.quote(sys.executable)} -m ensurepip  (in an environment made by uv: uv pip install pip)",
    "macOS": "use another backend",
}


@dataclass(frozen=True)
class BackendChoice:
    """A backend to build, and the reason in a few words."""

    name: str
    why: str


@dataclass(frozen=True)
class Narrowing:
    """CMake definitions, and words for compilers, that leave out what `gives_up` names."""

    gives_up: str = ""
    defines: tuple[tuple[str, str], ...] = ()
    compiler: str = ""


# llama.cpp's options of a portable build and what /proc/cpuinfo calls the same
INSTRUCTIONS = {
    "GGML_SSE42": "sse4_2",
    "GGML_AVX": "avx",
    "GGML_AVX2": "avx2",
    "GGML_BMI2": "bmi2",
    "GGML_FMA": "fma",
    "GGML_F16C": "f16c",
}


def narrowings() -> list[Narrowing]:
    """What a build tries in turn until the library computes right: as found, without AMX if it is here, portable.

    As found, the compiler decides by the machine it runs on (-march=native), so a single feature can only be taken
    from the source: llama.cpp uses AMX where the compiler defines __AMX_INT8__, and -mno-amx-int8 would come too early
    on the command line. A portable build has what llama.cpp considers usual, less what this CPU lacks.
    """
    flags = cpu_flags()
    portable = {"GGML_NATIVE": "OFF"}
    if flags and platform.machine().lower() in ("x86_64", "amd64"):
        portable |= {option: "ON" if flag in flags else "OFF" for option, flag in INSTRUCTIONS.items()}
    found = [Narrowing()]
    if "amx_int8" in flags:
        found.append(Narrowing("AMX", compiler="-U__AMX_INT8__"))
    return [*found, Narrowing("the CPU's newer instructions", tuple(portable.items()))]


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU as Linux names them; empty elsewhere."""
    if sys.platform != "linux":
        return frozenset()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
        line = next((line for line in f.read(16384).splitlines() if line.startswith(("flags", "Features"))), ":")
    return frozenset(line.split(":", 1)[1].split())


def choose(name: str) -> BackendChoice:
    """Resolve `auto`, and check any other name. Raises UsageError."""
    if name != "auto":
        if name not in NAMES:
            raise UsageError(f"backend {name!r} is unknown.", nearest(name, ("auto", *NAMES)))
        return BackendChoice(name, "asked for")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return BackendChoice("metal", "Apple silicon")
    passed_over = []
    for candidate in ("cuda", "hip", "vulkan"):
        if _gpu_missing(candidate):
            continue
        if _has_gpu(candidate):
            return BackendChoice(candidate, "its toolkit and a GPU are here")
        passed_over.append(candidate)
    if passed_over:
        return BackendChoice("cpu", f"toolkits without a GPU: {_listed(passed_over)}")
    return BackendChoice("cpu", "no GPU toolkit was found")


def preflight(name: str, stock: bool) -> tuple[str, ...]:
    """The line each compiler of a build of backend `name` prints about itself.

    Raises BackendError with all that is missing for the build and how to get it.
    """
    missing = []
    versions = [
        _first_line(_compiler("CC", ("cc", "gcc", "clang", "cl"))),
        _first_line(_compiler("CXX", ("c++", "g++", "clang++", "cl"))),
    ]
    if not versions[0]:
        missing.append("a C compiler")
    if not versions[1]:
        missing.append("a C++ compiler")
    if not stock and not (shutil.which("git") or shutil.which("patch")):
        missing.append("git")
    if importlib.util.find_spec("pip") is None:
        missing.append("pip")
    missing += _gpu_missing(name)
    if missing:
        raise BackendError(f"to build the {name} backend this machine lacks {_listed(missing)}.", remedy(missing))
    if name == "cuda":
        versions.append(_release(_nvcc()))
    if name == "hip":
        versions.append(_first_line("hipcc"))
    return tuple(versions)


def remedy(missing: Iterable[str]) -> str:
    """The commands that bring what is missing, as one line."""
    missing = list(missing)
    manager = next((m for m in _MANAGERS if shutil.which(m)), None)
    packages: list[str] = []
    by_hand: list[str] = []
    for thing in missing:
        package = _PACKAGES[thing][list(_MANAGERS).index(manager)] if manager and thing in _PACKAGES else ""
        if package:
            packages += [word for word in package.split() if word not in packages]
        elif _BY_HAND[thing] not in by_hand:
            by_hand.append(_BY_HAND[thing])
    commands = [f"{_MANAGERS[manager]} {' '.join(packages)}"] if manager and packages else []
    return "run: " + "; ".join(commands + by_hand) if commands else "; ".join(by_hand) + "."


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _gpu_missing(name: str) -> list[str]:
    """What the backend needs beyond compilers and is not here."""
    if name == "metal":
        return [] if sys.platform == "darwin" else ["macOS"]
    if name == "cuda":
        return [] if _nvcc() else ["nvcc"]
    if name == "hip":
        return [] if shutil.which("hipcc") or shutil.which("hipconfig") else ["hipcc"]
    if name == "vulkan":
        sdk = os.environ.get("VULKAN_SDK")
        roots = [Path(p) for p in ([sdk] if sdk else []) + ["/usr", "/usr/local", "/opt/homebrew"]]
        headers = any(next(root.glob("[Ii]nclude/vulkan/vulkan.h"), None) for root in roots)
        spirv = any(
            next(root.glob(pattern), None)
            for root in roots
            for pattern in ("share/cmake/SPIRV-Headers", "lib*/cmake/SPIRV-Headers", "lib/*/cmake/SPIRV-Headers")
        )
        glslc = shutil.which("glslc") or (sdk and shutil.which("glslc", path=str(Path(sdk, "bin"))))
        found = {"glslc": glslc, "the Vulkan headers": headers, "the SPIR-V headers": spirv}
        return [thing for thing, here in found.items() if not here]
    return []


def _has_gpu(name: str) -> bool:
    """Whether a GPU the backend can drive is visible, judged by device files: asking drivers takes seconds."""
    if sys.platform == "win32":
        return name != "cuda" or shutil.which("nvidia-smi") is not None
    patterns = {
        "cuda": ("nvidia[0-9]*", "dxg"),  # dxg: the GPU of Windows' Linux subsystem
        "hip": ("kfd",),
        "vulkan": ("dri/renderD*",),
    }
    return any(next(Path("/dev").glob(pattern), None) for pattern in patterns[name])


def lacks_driver(name: str) -> bool:
    """Whether a library of backend `name` does not load here: CUDA's is linked with the driver, GPU or none.

    A library that stands in for the driver, as toolkits have one to link with, says so itself and does not count.
    """
    if name != "cuda" or sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL("libcuda.so.1").cuInit(0) == _CUDA_ERROR_STUB_LIBRARY)
    except (OSError, AttributeError):
        return True


def _compiler(variable: str, names: tuple[str, ...]) -> str:
    """The compiler CMake would take: the environment's, else the first on PATH; "" if there is none."""
    if os.environ.get(variable):
        return shlex.split(os.environ[variable])[0]
    return next((found for found in map(shutil.which, names) if found), "")


def _nvcc() -> str:
    standard = "/usr/local/cuda/bin/nvcc"
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or (standard if os.access(standard, os.X_OK) else "")


def _output(program: str) -> list[str]:
    if not program:
        return []
    try:
        done = subprocess.run([program, "--version"], capture_output=True, encoding="utf-8", errors="replace")
    except OSError:
        return []
    # Microsoft's compiler knows no --version: it prints its banner on stderr and leaves with an error
    told = done.stdout.strip() or (done.stderr.strip() if "Microsoft" in done.stderr else "")
    return told.splitlines()


def _first_line(program: str) -> str:
    return next(iter(_output(program)), "")


def _release(nvcc: str) -> str:
    return next((line for line in _output(nvcc) if "release" in line), "")


def cmake() -> str | None:
    """Path of a cmake that is recent enough, None if this machine has none (PyPI has a wheel of it)."""
    found = re.search(r"(\d+)\.(\d+)", _first_line("cmake"))
    return shutil.which("cmake") if found and (int(found[1]), int(found[2])) >= CMAKE_MINIMUM else None
