"""The patch fits the pinned source and stays small, and the CMake hook applies it, wherever the tree happens to be."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from ggufloop.backend import download, toolchain
from ggufloop.backend import library as backend
from ggufloop.backend.log import BuildLog

CHANGED_LINES = 250
"""Most lines the patch may add and remove: what loops is in llama-loop.cpp, the patch holds call sites only."""


PATCHES = ("ggml-amx.patch", "common-log.patch", "ggml-loop.patch", "llama-loop.patch")
SERVER_PATCH = "llama-server-loop.patch"
"""Of llama.cpp's own programs: a library alone does without."""


def files_of(patch: str) -> list[str]:
    return [line.removeprefix("+++ b/") for line in patch.splitlines() if line.startswith("+++ ")]


def changed_lines(patch: str) -> list[str]:
    return [line for line in patch.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the pinned llama.cpp that the patch names."""
    folder = tmp_path_factory.mktemp("source")
    archive = download.sdist(BuildLog(folder / "log"), lambda step: None)
    prefix = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    patches = [(backend.patches_dir() / name).read_text() for name in (*PATCHES, SERVER_PATCH)]
    wanted = {prefix + name for patch in patches for name in files_of(patch)}
    tree = folder / "llama.cpp"
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in wanted:
                target = tree / member.name.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                stream = tar.extractfile(member)
                assert stream is not None
                target.write_bytes(stream.read())
    return tree


def contents(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in sorted(tree.rglob("*")) if p.is_file()}


MODELS = {"granite", "granite-hybrid", "granite-swa", "granite-switch", "nemotron-h", "plamo2"}
"""The model files with a call site of their own: their layers end without build_cvec, or in a function that has a copy
of the layer's index."""


def test_the_patch_is_small_and_stays_in_its_places() -> None:
    patch = (backend.patches_dir() / "llama-loop.patch").read_text()
    assert 0 < len(changed_lines(patch)) <= CHANGED_LINES
    models = {Path(name).stem for name in files_of(patch) if name.startswith("src/models/")}
    assert models == MODELS
    outside = {name for name in files_of(patch) if not name.startswith(("src/llama-", "src/models/"))}
    assert not outside, "what is mended in ggml has patches of its own"


def test_the_mends_of_ggml_are_few() -> None:
    for name, files, most in (
        ("ggml-amx.patch", {"ggml/src/ggml-cpu/amx/mmq.cpp"}, 10),
        ("common-log.patch", {"common/log.cpp"}, 10),
        ("ggml-loop.patch", {"ggml/src/ggml-backend.cpp", "ggml/src/ggml-backend-meta.cpp"}, 40),
    ):
        patch = (backend.patches_dir() / name).read_text()
        assert set(files_of(patch)) == files
        assert len(changed_lines(patch)) <= most


def test_the_server_s_patch_stays_in_its_places() -> None:
    patch = (backend.patches_dir() / SERVER_PATCH).read_text()
    assert len(changed_lines(patch)) <= 640
    elsewhere = {name for name in files_of(patch) if not name.startswith(("common/", "tools/server/"))}
    assert elsewhere == {"src/llama-context.cpp"}, "the logits of an echo want room"


def test_the_patches_apply_and_reverse(source: Path) -> None:
    before = contents(source)
    patches = [backend.patches_dir() / name for name in (*PATCHES, SERVER_PATCH)]
    assert before.keys() == {name for patch in patches for name in files_of(patch.read_text())}
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(source.parent)}
    for patch in patches:
        subprocess.run(["git", "apply", patch], cwd=source, env=env, check=True)
    after = contents(source)
    assert all(before[name] != after[name] for name in before), "every file the patches name has changed"
    for patch in reversed(patches):
        subprocess.run(["git", "apply", "--reverse", patch], cwd=source, env=env, check=True)
    assert contents(source) == before


# What GCC 12 makes of _tile_loadconfig, with a copy in place of the instruction: asm that says it reads 8 bytes.
TILES = """
#include <cstdint>
#include <cstdio>
#include <cstdlib>
extern "C" { __attribute__((used)) volatile unsigned char loaded[64]; }
static inline void load(const void * from) {
    __asm__ volatile("lea %0, %%rsi; lea loaded(%%rip), %%rdi; mov $64, %%ecx; rep movsb"
                     : : "m"(*((const void **) from)) : "rsi", "rdi", "rcx");
}
#define _tile_loadconfig load
@SOURCE@
int main() {
    ggml_tile_config_init();
    for (unsigned char byte : loaded) printf("%d ", byte);
}
"""


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="the copy is x86 assembly")
@pytest.mark.parametrize("mended", [True, False])
def test_the_tile_configuration_is_stored_before_it_is_loaded(source: Path, tmp_path: Path, mended: bool) -> None:
    """On any x86 CPU: the function of the patched source, compiled as it is for AMX. Without the mend the stores go."""
    text = (source / "ggml/src/ggml-cpu/amx/mmq.cpp").read_text()
    tree = tmp_path / "tree" / "ggml" / "src" / "ggml-cpu" / "amx"
    tree.mkdir(parents=True)
    (tree / "mmq.cpp").write_text(text)
    if mended:
        env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        patch = backend.patches_dir() / "ggml-amx.patch"
        subprocess.run(["git", "apply", patch], cwd=tmp_path / "tree", env=env, check=True)
        text = (tree / "mmq.cpp").read_text()
    starts = ("struct tile_config_t", "inline void ggml_tile_config_init")
    parts = [re.search(rf"^{start}.*?^}}", text, re.MULTILINE | re.DOTALL) for start in starts]
    assert all(parts)
    code = "\n".join(part[0] + (";" if i == 0 else "") for i, part in enumerate(parts) if part)
    (tmp_path / "a.cpp").write_text(TILES.replace("@SOURCE@", code))
    subprocess.run(["c++", "-O2", "-std=c++17", "a.cpp", "-o", "a"], cwd=tmp_path, check=True)
    said = subprocess.run(["./a"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()
    columns = [64, 64, 32, 32, 64, 64, 64, 64]
    right = [1, *[0] * 15, *(b for n in columns for b in (n, 0)), *[0] * 16, 8, 8, *[16] * 6, *[0] * 8]
    if mended:
        assert [int(byte) for byte in said] == right
    elif [int(byte) for byte in said] == right:
        pytest.skip("this compiler keeps the stores anyway")


CMAKELISTS = """
cmake_minimum_required(VERSION 3.21)
project("llama.cpp" CXX)
add_subdirectory(src)
"""
SRC_CMAKELISTS = """
add_library(llama SHARED a.cpp b.cpp)
set_target_properties(llama PROPERTIES UNITY_BUILD ON)
"""
A_CPP = "static int clash = 1;\nint a() {\n    return clash;\n}\n"
LOOP_CPP = """
#include "llama-loop.h"
static int clash = 2;
extern "C" const char * llama_loop_patch_id(void) { return GGUFLOOP_PATCH_ID; }
extern "C" int llama_loop_abi(void) { return clash; }
"""
MEND = """diff --git a/src/b.cpp b/src/b.cpp
--- a/src/b.cpp
+++ b/src/b.cpp
@@ -1,1 +1,1 @@
-int b() { return 0; }
+int b() { return 1; }
"""
LOG = MEND.replace("b.cpp", "c.cpp").replace("int b", "int c")
MEND_FOR_LOOPS = MEND.replace("return 1", "return 2").replace("return 0", "return 1")
PATCH = """diff --git a/src/a.cpp b/src/a.cpp
--- a/src/a.cpp
+++ b/src/a.cpp
@@ -1,3 +1,4 @@
+#include "llama-loop.h"
 static int clash = 1;
 int a() {
     return clash;
"""


class MiniTree:
    """A llama.cpp of three files, and patches for it, with the real hook."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.patches = folder / "llama.cpp", folder / "patches"
        (self.tree / "src").mkdir(parents=True)
        self.patches.mkdir()
        (self.tree / "CMakeLists.txt").write_text(CMAKELISTS)
        (self.tree / "src" / "CMakeLists.txt").write_text(SRC_CMAKELISTS)
        (self.tree / "src" / "a.cpp").write_text(A_CPP)
        (self.tree / "src" / "b.cpp").write_text("int b() { return 0; }\n")
        (self.tree / "src" / "c.cpp").write_text("int c() { return 0; }\n")
        shutil.copy(backend.patches_dir() / "hook.cmake", self.patches)
        (self.patches / "llama-loop.h").write_text("#pragma once\n")
        (self.patches / "llama-loop.cpp").write_text(LOOP_CPP)
        for name, patch in zip(PATCHES, (MEND, LOG, MEND_FOR_LOOPS, PATCH), strict=True):
            (self.patches / name).write_text(patch)
        log = BuildLog(folder / "log")
        self.cmake = toolchain.cmake() or download.build_tool("cmake", log, lambda step: None)
        self.ninja = shutil.which("ninja") or download.build_tool("ninja", log, lambda step: None)

    def configure(self, patch_id: str = "abc", **env: str) -> tuple[int, str]:
        """Exit status and output of cmake."""
        words = [self.cmake, "-S", self.tree, "-B", self.tree / "build", "-G", "Ninja"]
        words += [f"-DCMAKE_MAKE_PROGRAM={self.ninja}", f"-DGGUFLOOP_PATCH_ID={patch_id}"]
        words += [f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={self.patches / 'hook.cmake'}"]
        done = subprocess.run(words, env={**os.environ, **env}, capture_output=True, text=True)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    def is_patched(self) -> bool:
        return "llama-loop.h" in (self.tree / "src" / "a.cpp").read_text()


def test_the_hook_patches_once_and_adds_our_source(tmp_path: Path) -> None:
    mini = MiniTree(tmp_path)
    assert mini.configure()[0] == 0
    first = (mini.tree / "src" / "a.cpp").read_text()
    assert first == '#include "llama-loop.h"\n' + A_CPP
    assert mini.configure()[0] == 0, "again in the same tree"
    assert (mini.tree / "src" / "a.cpp").read_text() == first
    subprocess.run([mini.ninja, "-C", mini.tree / "build"], check=True, capture_output=True)
    (library,) = (mini.tree / "build" / "src").glob("libllama.*")
    lib = ctypes.CDLL(str(library))
    lib.llama_loop_patch_id.restype = ctypes.c_char_p
    assert (lib.llama_loop_patch_id(), lib.llama_loop_abi()) == (b"abc", 2)

    (mini.patches / "llama-loop.patch").write_text(PATCH + "\n")
    status, output = mini.configure()
    assert status != 0
    assert "start from a fresh tree" in output


def test_the_hook_is_not_fooled_by_a_repository_around_the_tree(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    mini = MiniTree(tmp_path)
    fooled = subprocess.run(["git", "apply", mini.patches / "llama-loop.patch"], cwd=mini.tree)
    assert (fooled.returncode, mini.is_patched()) == (0, False), "the trap this test is about"
    status, output = mini.configure(GIT_DIR=str(tmp_path / ".git"), GIT_WORK_TREE=str(tmp_path))
    assert (status, mini.is_patched()) == (0, True), output


def test_the_hook_works_with_patch_instead_of_git(tmp_path: Path) -> None:
    mini = MiniTree(tmp_path)
    hook = mini.patches / "hook.cmake"
    hook.write_text(
        "set(GGUFLOOP_GIT GGUFLOOP_GIT-NOTFOUND)\n" + hook.read_text().replace("find_program(GGUFLOOP_GIT git)", "")
    )
    status, output = mini.configure()
    assert (status, mini.is_patched()) == (0, True), output


def test_the_hook_stops_the_configure_when_the_patch_does_not_fit(tmp_path: Path) -> None:
    mini = MiniTree(tmp_path)
    (mini.tree / "src" / "a.cpp").write_text("int another() { return 0; }\n")
    status, output = mini.configure()
    assert status != 0
    assert "ggufloop: llama-loop.patch does not apply to this llama.cpp: error: patch failed: src/a.cpp:1" in output
    assert not mini.is_patched()
