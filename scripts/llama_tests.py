#!/usr/bin/env python3
"""llama.cpp's own tests, compiled in the patched tree and run against the library that is in the cache.

    python scripts/llama_tests.py            # a table: test, result, seconds; at once where they have passed before
    python scripts/llama_tests.py --force    # again
    python scripts/llama_tests.py --stock    # in the unpatched tree, against the unpatched library: whose fault is it?

llama.cpp's CMake compiles the tests and the common library, which is where a patched header that cannot be included
shows. The library itself is not compiled again: the objects are linked with the one everybody runs. What passed is
noted under the library's key in <cache>/llama-tests, so a new library pays once, about four CPU minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import tiny  # noqa: E402  # found once the path is set

from ggufloop.backend import build, download, toolchain  # noqa: E402  # found once the path is set
from ggufloop.backend import library as backend  # noqa: E402  # found once the path is set
from ggufloop.backend.library import Backend  # noqa: E402  # found once the path is set
from ggufloop.backend.log import BuildLog  # noqa: E402  # found once the path is set
from ggufloop.errors import BackendError, GgufloopError  # noqa: E402  # found once the path is set
from ggufloop.files import atomic_path, cache_dir, lock  # noqa: E402  # found once the path is set
from ggufloop.progress import Step  # noqa: E402  # found once the path is set

# What a loop adds to a graph, in the types it adds it in, not in the largest shapes; all of them take minutes.
_OPS = "ADD,SUB,MUL,DIV,SCALE,SQR,SQRT,STEP,SUM,SUM_ROWS,CPY,CONT"
_TYPES = r"^(?!.*\d{4})(type=f32|type_src=f32,type_dst=(f32|f16|bf16|q8_0|q4_0)),"
# One of each kind of cache; test-llama-archs knows them all, these are written as files for the tests of saved states.
_WRITTEN = "^(llama|qwen3moe|gemma3|deepseek2|mamba2|qwen35|granitehybrid|rwkv7)$"
_TIMEOUT = 900.0


@dataclass(frozen=True)
class Test:
    """One run of a test program. {MODEL}: a tiny llama file; {MODELS}: a folder of what _WRITTEN names."""

    program: str
    words: str = ""
    common: bool = True  # whether it needs the common library


TESTS = (
    # the graph, the cache and the scheduler, from outside and from inside
    Test("test-llama-archs"),  # every architecture: the graph, a saved state, against another device if there is one
    Test("test-llama-archs", f"-o {{MODELS}}/ -a {_WRITTEN}"),
    Test("test-save-load-state", "--models {MODELS}"),
    Test("test-recurrent-state-rollback", "--models {MODELS}"),
    Test("test-state-restore-fragmented", "-m {MODEL}"),
    Test("test-thread-safety", "-m {MODEL} -p the -n 32 -c 256 -ub 32 -np 4 -t 1 --temp 0"),
    Test("test-batch-alloc"),
    # ggml, of which the library carries a patch too
    Test("test-alloc", common=False),
    Test("test-backend-ops", f"test -b CPU -o {_OPS} -p {_TYPES}", common=False),
    Test("test-barrier", common=False),
    Test("test-gguf", common=False),
    Test("test-rope", common=False),
    Test("test-opt", common=False),
)

LEFT_OUT = {
    "test-tokenizer-*, test-chat*, test-jinja, test-json*, test-grammar*, test-gbnf*, test-llama-grammar, "
    "test-peg-parser, test-unicode, test-reasoning-budget, test-sampling, test-arg-parser, test-log":
        "text, templates, arguments, samplers: nothing the patch touches",
    "test-model-resolution, test-gguf-model-data, test-quant-type-selection, test-export-graph-ops, "
    "test-model-load-cancel, test-autorelease": "download, or need a real model",
    "test-mtmd-*": "images and sound, of a library we do not build",
    "test-fusion": "compares with a list of fused operations that exists for Metal alone",
    "test-backend-sampler": "decodes token 3834 of the model it downloads",
    "test-quantize-fns, test-quantize-perf, test-quantize-stats, test-double-float": "kernels of types, for their time",
    "test-tiled-mulmat, test-col2im-1d, test-rpc-multi-server, test-rset-release": "kernels and devices we leave alone",
}  # fmt: skip

_FLAGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_CXX_FLAGS_RELEASE": "-O1 -DNDEBUG",  # what is tested is compiled already
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_BUILD_COMMON": "ON",
    "LLAMA_BUILD_TESTS": "ON",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_NUMBER": "0",
    "LLAMA_BUILD_COMMIT": backend.LLAMA_CPP_COMMIT,
}


@dataclass(frozen=True)
class Result:
    """How one test ended: "ok", or what it said last."""

    name: str
    outcome: str
    seconds: float


def stamp(library: Backend) -> Path:
    """Where it is noted that a library has passed these tests."""
    parts = [library.directory.name, Path(__file__).read_text("utf-8"), Path(tiny.__file__).read_text("utf-8")]
    return cache_dir() / "llama-tests" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}.json"


def compile_tests(library: Backend, work: Path, log: BuildLog) -> Path:
    """Unpack, patch, compile and link into `work`. Returns the folder of the programs. Raises BackendError."""
    report = _report
    source, tree, programs = work / "llama.cpp", work / "build", work / "bin"
    shutil.rmtree(source, ignore_errors=True)  # a tree is patched once, and this may be another patch
    build.unpack(download.sdist(log, report), source, ("tests",))
    ninja = shutil.which("ninja") or download.build_tool("ninja", log, report)
    cmake = toolchain.cmake() or download.build_tool("cmake", log, report)
    flags = [f"-D{name}={value}" for name, value in _FLAGS.items()]
    hook = backend.patches_dir() / "hook.cmake"
    flags += [f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={hook}", f"-DGGUFLOOP_PATCH_ID={library.patch_id or 'stock'}"]
    configure = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", source, "-B", tree, *flags]
    _run(log, "configuring", configure, {"GIT_CEILING_DIRECTORIES": str(work)})

    names = sorted({test.program for test in TESTS})
    targets = subprocess.run([ninja, "-C", tree, "-t", "targets", "all"], capture_output=True, text=True).stdout
    common = re.findall(r"^((?:common|vendor/cpp-httplib)/\S+\.o): ", targets, re.MULTILINE)
    objects = {name: f"tests/CMakeFiles/{name}.dir/{name}.cpp.o" for name in names}
    _run(log, "compiling", [ninja, "-C", tree, *objects.values(), *common])

    compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", (tree / "CMakeCache.txt").read_text(), re.MULTILINE)
    assert compiler
    programs.mkdir(exist_ok=True)
    libraries = ["-L", library.directory, "-lllama", "-lggml", "-lggml-cpu", "-lggml-base", "-pthread"]
    where = [f"-Wl,-rpath,{library.directory}"]
    if sys.platform == "linux":
        where.append("-Wl,--disable-new-dtags")  # before LD_LIBRARY_PATH, where another llama.cpp may be
    needs = {test.program: test.common for test in TESTS}
    for name, test in objects.items():
        extra = [tree / o for o in common] if needs[name] else []
        _run(log, "linking", [compiler[1], "-o", programs / name, tree / test, *extra, *libraries, *where])
    return programs


def _report(step: Step) -> None:
    print(step.text, file=sys.stderr)


def _run(log: BuildLog, what: str, words: list[str | Path], env: dict[str, str] | None = None) -> None:
    print(what, file=sys.stderr)
    if log.run(words, env=env):
        for line in log.tail(6, ("error:", "Error", "FAILED:", "undefined")):
            print(f"  {line}", file=sys.stderr)
        raise BackendError(f"{what} llama.cpp's tests failed.", f"log: {log.path}")


def run_tests(programs: Path, work: Path, log: BuildLog) -> list[Result]:
    """Run all tests, each with a time limit, and return how they ended."""
    model = tiny.write(work / "model.gguf", tiny.FAMILIES["llama"])
    models = work / "models"
    shutil.rmtree(models, ignore_errors=True)
    models.mkdir()
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # spinning threads starve each other on a busy machine
    results = []
    for test in TESTS:
        name = f"{test.program} {test.words}".replace(f"-o {_OPS} -p {_TYPES}", "-o ADD,...").strip()
        given = test.words.replace("{MODELS}", str(models)).replace("{MODEL}", str(model))
        words = [str(programs / test.program), *given.split()]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                words, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", timeout=_TIMEOUT,
            )  # fmt: skip
            said, code = done.stdout, done.returncode
            outcome = "ok" if code == 0 else f"status {code}: {' '.join(said.split()[-12:])}"
        except subprocess.TimeoutExpired as e:
            said, outcome = (e.stdout or b"").decode(errors="replace"), f"no end within {_TIMEOUT:g} s"
        with log.path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"$ {' '.join(words)}\n{said}\n{outcome}\n")
        results.append(Result(name, outcome, time.perf_counter() - start))
        print(f"{name:60} {outcome:8} {results[-1].seconds:6.1f} s", flush=True)
    return results


def main() -> int:
    """Run what the command line asks for; 0 if every test passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", action="store_true", help="the unpatched tree and library")
    parser.add_argument("--force", action="store_true", help="even where they have passed before")
    args = parser.parse_args()
    if sys.platform == "win32":
        raise BackendError("llama.cpp's tests use what its library does not export on Windows.", "run them elsewhere.")
    library = backend.locate(args.stock)
    passed = stamp(library)
    if passed.exists() and not args.force:
        for name, seconds in json.loads(passed.read_text()).items():
            print(f"{name:60} {'ok':8} {seconds:6.1f} s")
        print(f"{library} passed before")
        return 0
    work = passed.with_suffix("")
    with lock(cache_dir() / "llama-tests" / "lock", lambda: _report(Step("waiting for another run of these tests"))):
        work.mkdir(parents=True, exist_ok=True)
        log = BuildLog(cache_dir() / "logs" / f"llama-tests-{library.directory.name}.log")
        start = time.perf_counter()
        programs = compile_tests(library, work, log)
        print(f"{'compiled':60} {'ok':8} {time.perf_counter() - start:6.1f} s", flush=True)
        results = run_tests(programs, work, log)
        failed = [result.name for result in results if result.outcome != "ok"]
        if failed:
            raise BackendError(
                f"{len(failed)} of {len(results)} tests fail with {library}: {'; '.join(failed)}.",
                f"log: {log.path}; is it llama.cpp's fault? run: python scripts/llama_tests.py --stock",
            )
        with atomic_path(passed) as partial:
            partial.write_text(json.dumps({result.name: round(result.seconds, 1) for result in results}, indent=1))
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GgufloopError as e:
        print(f"error: {e.message}\n  {e.hint}", file=sys.stderr)
        sys.exit(3)
