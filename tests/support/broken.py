"""Copies of the built library that are broken in one kernel: it crashes, or its results are 3 % too large.

    folder = broken.library(tmp_path, "crash")        # or "wrong", "hang" (while it is loaded)

A shim takes the place of libllama.so and brings the real one along. Symbols are looked up in it first, so its kernel is
the one that ggml's table of kernels points to. Q5_1 is multiplied by that kernel alone: no other layout takes it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from ggufloop.backend import library as backend

_SHIM = """
#include <dlfcn.h>
#include <stddef.h>
#include <unistd.h>
#include <atomic>

using kernel_t = void (*)(int, float *, size_t, const void *, size_t, const void *, size_t, int);

extern "C" const char * shim_of() { return "llama_loop_abi"; }  // by which a patched library is known

#ifdef HANG
__attribute__((constructor)) static void hang() { sleep(600); }
#else
extern "C" void ggml_vec_dot_q5_1_q8_1(
        int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
#ifdef CRASH
    __builtin_trap();
#endif
    static const kernel_t real = (kernel_t) dlsym(RTLD_NEXT, "ggml_vec_dot_q5_1_q8_1");
    real(n, s, bs, vx, bx, vy, by, nrc);
    *s *= 1.03f;
}
#endif
"""


def library(folder: Path, how: str) -> Path:
    """A broken copy of the library in use, below `folder`; with its manifest, which says that it is verified."""
    copy = folder / how
    shutil.copytree(backend.locate().directory, copy, symlinks=True)
    real = os.path.basename(os.readlink(copy / "libllama.so"))
    (copy / "libllama.so").unlink()
    source = folder / f"{how}.cpp"
    source.write_text(_SHIM)
    words = ["c++", "-shared", "-fPIC", f"-D{how.upper()}", source, "-o", copy / "libllama.so", "-L", copy]
    words += ["-Wl,--no-as-needed", f"-l:{real}", "-Wl,-rpath,$ORIGIN,--disable-new-dtags", "-ldl"]
    subprocess.run(words, check=True)
    return copy
