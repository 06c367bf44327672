"""A wheel's library: nothing to compile, in one variant per CPU generation, put into the cache at its first use.

    library.locate()                  # says that it would be used: nothing that fits is in the cache
    unpack(library.of_wheel())        # a library.Backend, verified on this CPU

scripts/make_wheel.py writes what is read here. Only libggml-cpu differs from one CPU to another, so the wheel has it
once per variant and all else once; beside the package no folder would be a whole library. In the cache it is one like
any that was built, and everything that looks for libraries and programs finds it there. The richest variant whose
instructions Linux says are here is tried first, and the next one if that does not compute right, as a build gives up
instructions one after the other.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

from ggufloop.backend import library
from ggufloop.backend.library import Backend
from ggufloop.backend.toolchain import INSTRUCTIONS, cpu_flags
from ggufloop.backend.verify import check
from ggufloop.errors import BackendError, GgufloopError
from ggufloop.files import atomic_path, cache_dir, lock, writing

SHARED = "shared"
"""Folder of the files that all variants share, by the names that they are loaded by; the variants are beside it."""
CPU = "libggml-cpu.so.0"

NEEDS = INSTRUCTIONS | {
    "GGML_AVX_VNNI": "avx_vnni",
    "GGML_AVX512": "avx512f avx512cd avx512vl avx512dq avx512bw",
    "GGML_AVX512_VBMI": "avx512vbmi",
    "GGML_AVX512_VNNI": "avx512_vnni",
    "GGML_AVX512_BF16": "avx512_bf16",
    "GGML_AMX_TILE": "amx_tile",
    "GGML_AMX_INT8": "amx_int8",
}
"""llama.cpp's options of a build for another CPU than this one, and what /proc/cpuinfo calls the same."""

_AVX2 = "SSE42 AVX F16C FMA AVX2 BMI2"
VARIANTS = {
    "sapphirerapids": f"{_AVX2} AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16 AMX_TILE AMX_INT8",
    "zen4": f"{_AVX2} AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16",
    "icelake": f"{_AVX2} AVX512 AVX512_VBMI AVX512_VNNI",
    "alderlake": f"{_AVX2} AVX_VNNI",
    "haswell": _AVX2,
    "x64": "",
}
"""The richest first, with llama.cpp's names and options: those of its variants that many CPUs are best with. What a CPU
lacks takes it to the next one, in the end to the last, which is slow and runs everywhere."""


def options(variant: str) -> dict[str, bool]:
    """Whether each option of NEEDS is on in a variant."""
    on = {f"GGML_{word}" for word in VARIANTS[variant].split()}
    return {option: option in on for option in NEEDS}


def fitting(flags: frozenset[str]) -> list[str]:
    """The variants that a CPU with these instructions can run, the richest first; the last one runs everywhere."""
    return [v for v in VARIANTS if all(set(NEEDS[o].split()) <= flags for o, on in options(v).items() if on)]


def unpack(brought: Backend) -> Backend:
    """Make the folder of `library.of_wheel()` in the cache, of the richest variant that computes right here.

    Raises BackendError if none does, or the cache cannot be written.
    """
    try:
        with writing(brought.directory), lock(cache_dir() / "wheel.lock"):
            return Backend.load(brought.directory) or _unpack(brought)  # another process may have been first
    except GgufloopError as e:
        raise e if isinstance(e, BackendError) else BackendError(e.message, e.hint) from e


def _unpack(brought: Backend) -> Backend:
    gave_up = ""
    with atomic_path(brought.directory) as folder:
        folder.mkdir()
        for path in (library.BUNDLED / SHARED).iterdir():
            shutil.copyfile(path, folder / path.name)
        for variant in fitting(cpu_flags()):
            shutil.copyfile(library.BUNDLED / f"{variant}.so", folder / CPU)
            for path in [p for p in folder.iterdir() if p.name.endswith(".so.0")]:
                link = path.with_suffix("")  # the name that the binding looks for
                link.unlink(missing_ok=True)
                link.symlink_to(path.name)
            found = check(folder)
            if not found.failures:
                made = replace(brought, directory=folder, variant=variant, verified=library.cpu_id(), gave_up=gave_up)
                for program in made.programs:
                    os.chmod(folder / program, 0o755)
                made.save()
                break
            gave_up = f"what {variant} has ({found})"
        else:
            raise BackendError(
                f"the library that came with ggufloop does not compute right on this CPU: {found}.",
                "build one here: ggufloop build",
            )
    return replace(made, directory=brought.directory)
