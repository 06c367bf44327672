#!/usr/bin/env python3
"""Build the CUDA library for one architecture on a machine without a GPU, to see that it compiles and to carry it.

    CMAKE_BUILD_PARALLEL_LEVEL=2 python3 scripts/bootstrap.py python scripts/build_cuda.py --arch 90   # H100, H200

nvcc has to be here (PyPI's wheels of it will do). What else is missing is made in a folder of the cache: cuBLAS from
its wheel, and a library to link with that stands in for the driver, libcuda.so.1. The new library is not loaded here
and no kernel runs: it is kept behind the others in the cache, as not verified. A run where the driver is does that.

Hundreds of template instances: an hour or more on a few cores, minutes once ccache has them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu_library import library  # noqa: E402  # found once the path is set

from ggufloop.backend import download, toolchain  # noqa: E402  # found once the path is set
from ggufloop.errors import BackendError, GgufloopError  # noqa: E402  # found once the path is set
from ggufloop.files import atomic_path, cache_dir  # noqa: E402  # found once the path is set

DRIVER = "libcuda.so.1"
STUB_ERROR = 34  # CUDA_ERROR_STUB_LIBRARY


def release() -> str:
    """The toolkit's release, as 13.0. Raises BackendError without one."""
    nvcc = toolchain._nvcc()
    found = re.search(r"release (\d+\.\d+)", toolchain._release(nvcc)) if nvcc else None
    if not found:
        raise BackendError(
            "nvcc is not here.", "install NVIDIA's CUDA toolkit, or its wheels nvidia-cuda-nvcc and others."
        )
    return found[1]


def toolkit() -> tuple[Path, Path]:
    """Folders of the toolkit's headers and libraries, as nvcc names them."""
    told = subprocess.run([toolchain._nvcc(), "-dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", told.stderr, re.MULTILINE)
    if not top:
        raise BackendError(
            "nvcc does not say where its toolkit is.", f"run: {toolchain._nvcc()} -dryrun -E -x cu /dev/null"
        )
    root = Path(top[1]).resolve()
    libraries = [p for p in (root / "lib64", root / "lib") if p.is_dir()]
    return root / "include", libraries[0] if libraries else root


def cublas(folder: Path, version: str) -> None:
    """Put cuBLAS of the toolkit's release into `folder`, from its wheel."""
    package = f"nvidia-cublas=={version}.*" if int(version.split(".")[0]) >= 13 else "nvidia-cublas-cu12"
    print(f"getting {package}, which the toolkit here lacks (400 MB)", file=sys.stderr, flush=True)
    words = [
        *download.PIP,
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--target",
        str(folder / "wheel"),
    ]
    if subprocess.run([*words, package]).returncode:
        raise BackendError(f"pip could not install {package}.", "see above, or install the whole CUDA toolkit.")
    home = next((folder / "wheel").glob("nvidia/*/include/cublas_v2.h")).parent.parent
    shutil.move(home / "include", folder / "include")
    shutil.move(home / "lib", folder / "lib")
    shutil.rmtree(folder / "wheel")
    for name in ("libcublas", "libcublasLt"):
        (found,) = (folder / "lib").glob(f"{name}.so.*")
        (folder / "lib" / f"{name}.so").symlink_to(found.name)


def driver(folder: Path, headers: Path) -> None:
    """Compile a library with the name and the functions of the driver; every one fails."""
    compiler = toolchain._compiler("CC", ("cc", "gcc", "clang"))
    text = subprocess.run(
        [compiler, "-E", "-x", "c", f"-I{headers}", "-"], input="#include <cuda.h>\n", capture_output=True, text=True
    ).stdout
    names = sorted(set(re.findall(r"\bCUresult\s+(cu\w+)\s*\(", text)))
    if not names:
        raise BackendError(f"{headers} holds no cuda.h that can be read.", "install the headers of the CUDA toolkit.")
    folder.mkdir(parents=True, exist_ok=True)
    source = "".join(f"int {name}(void) {{ return {STUB_ERROR}; }}\n" for name in names)
    words = [compiler, "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{DRIVER}", "-o", str(folder / DRIVER)]
    done = subprocess.run(words, input=source, capture_output=True, text=True)
    if done.returncode:
        raise BackendError("the stand-in for the driver does not compile.", done.stderr.strip().splitlines()[-1])
    (folder / "libcuda.so").symlink_to(DRIVER)


def prepare() -> Path:
    """The folder with what the toolkit lacks; the environment then names it to compilers, CMake and the loader."""
    version = release()
    headers, libraries = toolkit()
    folder = cache_dir() / f"cuda-{version}"
    if not folder.is_dir():
        with atomic_path(folder) as partial:
            partial.mkdir(parents=True)
            if not (headers / "cublas_v2.h").is_file():
                cublas(partial, version)
            driver(partial / "stub", headers)
    places = [folder / "lib", libraries]
    link = [*places, folder / "stub"]
    for variable, value in (
        ("CUDAFLAGS", f"-I{shlex.quote(str(folder / 'include'))}"),
        ("CMAKE_LIBRARY_PATH", os.pathsep.join(map(str, link))),
        ("LD_LIBRARY_PATH", os.pathsep.join(map(str, places))),
    ):
        joint = " " if variable == "CUDAFLAGS" else os.pathsep
        os.environ[variable] = joint.join(filter(None, [os.environ.get(variable), value]))
    return folder


def main() -> int:
    """Build; an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="90", help="compute capability without its dot, as CMake has it (default 90)")
    args = parser.parse_args()
    if not re.fullmatch(r"\d+[af]?", args.arch):
        parser.error(f"--arch {args.arch!r} is no compute capability without its dot, such as 90.")
    os.environ["CUDAARCHS"] = args.arch
    try:
        folder = prepare()
        print(library("cuda"))
    except GgufloopError as e:
        print(f"build_cuda: {e.message}\n  {e.hint}", file=sys.stderr)
        return 3
    if toolchain.lacks_driver("cuda"):
        print(
            "No NVIDIA driver is here: the library was neither loaded nor verified.\n"
            f"Carry the folder to a machine that has one ({folder / 'lib'} too, if cuBLAS is missing there), and run\n"
            f"  python scripts/gpu_check.py --lib THE_FOLDER",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
