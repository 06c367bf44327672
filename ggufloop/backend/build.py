"""`ggufloop build`: from the pinned source archive to a verified library in the cache.

    library = build(BuildRequest("auto"), progress)      # a backend.Backend

Steps: preflight, fetch, configure, compile, verify, install. All work happens in <cache>/tmp under one lock for the
whole cache, so two builds never meet, and a library appears in <cache>/backends in one rename. What a killed build
leaves in tmp is deleted by the next one. llama.cpp is configured directly, not through llama-cpp-python: only the
targets the binding loads are compiled, in a tree whose run path is its own folder, so that it can be moved.
A library that crashes or multiplies wrongly on the CPU is compiled again with fewer of the CPU's instructions, in the
same tree, and its manifest says what it gave up. Its key does not: asking again finds it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ggufloop.backend import download, library, toolchain
from ggufloop.backend.library import Backend
from ggufloop.backend.log import BuildLog
from ggufloop.backend.probe import probe
from ggufloop.backend.toolchain import Narrowing
from ggufloop.backend.verify import check, remember
from ggufloop.errors import BackendError, GgufloopError
from ggufloop.files import cache_dir, lock, remove, writing
from ggufloop.progress import Progress, Step

SERVER = "llama-server"
PROGRAMS = (
    "llama-cli", "llama-bench", "llama-perplexity", "llama-quantize", "llama-imatrix", "llama-mtmd-cli", SERVER,
)  # fmt: skip
"""llama.cpp's programs that `--with-tools` builds; `--server` builds the last alone."""

# Folders of llama.cpp a build reads; the others (models, docs, tests) are 80 % of the archive. Its .git is left out
# because it is a pointer into a repository that is not there.
_SOURCE = (
    "CMakeLists.txt", "LICENSE", "cmake", "common", "ggml", "include", "licenses", "scripts", "src", "tools", "vendor"
)  # fmt: skip
# Variables CMake and compilers read on their own: other values, another library.
_BUILD_ENV = (
    "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAARCHS", "CUDAHOSTCXX", "HIPFLAGS", "VULKAN_SDK",
)  # fmt: skip
_FREE_BYTES = {"cpu": 400e6, "metal": 400e6, "vulkan": 1e9, "cuda": 4e9, "hip": 4e9}
_ERROR_MARKS = ("error:", "Error ", "CMake Error", "FAILED:", "fatal", "Killed", "No space left", "ggufloop:")


@dataclass(frozen=True)
class BuildRequest:
    """What to build. name: auto or a backend. The rest as the flags of `ggufloop build`."""

    name: str = "auto"
    stock: bool = False
    tools: bool = False
    server: bool = False
    force: bool = False
    replace_binding: bool = False


@dataclass(frozen=True)
class Plan:
    """One library: its flags and the key that names it. programs: those built with it."""

    name: str
    stock: bool
    programs: tuple[str, ...]
    versions: tuple[str, ...]

    @property
    def flags(self) -> list[str]:
        whole = "ON" if self.programs else "OFF"  # the programs live in llama.cpp's tools folder
        flags = {
            "CMAKE_BUILD_TYPE": "Release",
            "BUILD_SHARED_LIBS": "ON",
            "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
            "CMAKE_INSTALL_RPATH": "@loader_path" if sys.platform == "darwin" else "$ORIGIN",
            "CMAKE_WINDOWS_EXPORT_ALL_SYMBOLS": "ON",
            "LLAMA_BUILD_COMMON": whole,
            "LLAMA_BUILD_TOOLS": whole,
            "LLAMA_BUILD_TESTS": "OFF",
            "LLAMA_BUILD_EXAMPLES": "OFF",
            "LLAMA_BUILD_SERVER": whole,
            "LLAMA_BUILD_UI": "OFF",  # needs npm, or a download
            "LLAMA_USE_PREBUILT_UI": "OFF",
            "LLAMA_BUILD_APP": "OFF",
            "LLAMA_OPENSSL": "OFF",
            "LLAMA_BUILD_NUMBER": "0",
            "LLAMA_BUILD_COMMIT": library.LLAMA_CPP_COMMIT,
            "GGML_RPC": "ON",  # every library can spread a model over machines, and serve: ggufloop rpc-server
            "GGML_METAL": "ON" if self.name == "metal" else "OFF",  # on by default on every Mac
        }
        if sys.platform == "linux":
            # the old kind of run path comes before LD_LIBRARY_PATH, where another llama.cpp may be
            for kind in ("SHARED", "EXE"):
                flags[f"CMAKE_{kind}_LINKER_FLAGS_INIT"] = "-Wl,--disable-new-dtags"
        if self.name == "metal":
            flags["GGML_METAL_EMBED_LIBRARY"] = "ON"
        elif self.name != "cpu":
            flags[f"GGML_{self.name.upper()}"] = "ON"
        if self.name == "cuda" and os.environ.get("CUDAARCHS"):  # which ggml overrides with the GPU that is here
            flags["CMAKE_CUDA_ARCHITECTURES"] = os.environ["CUDAARCHS"]
        return [f"-D{name}={value}" for name, value in flags.items()]

    @property
    def targets(self) -> list[str]:
        """What to compile."""
        return ["llama", *self.programs]

    @property
    def key(self) -> str:
        hook = (library.patches_dir() / "hook.cmake").read_text("utf-8")
        patch = hook + (library.mends_id() if self.stock else library.patch_id())
        if self.programs and not self.stock:
            patch += library.programs_id()
        env = {name: os.environ[name] for name in _BUILD_ENV if os.environ.get(name)}
        parts = [library.SDIST_SHA256, patch, self.name, self.flags, self.targets, self.versions, library.cpu_id(), env]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def directory(self) -> Path:
        return library.backends_dir() / f"{self.name}{'-stock' if self.stock else ''}-{self.key}"


def build(request: BuildRequest, progress: Progress) -> Backend:
    """The library `request` asks for, built if it is not in the cache, and the binding installed for it.

    A cached library with more programs than were asked for will do, if it computes right. Raises UsageError for an
    unknown backend and BackendError, with the step, the log and the remedy, for everything else; nothing half-built
    stays.
    """
    choice = toolchain.choose(request.name)
    download.check_binding(request.replace_binding)
    versions = toolchain.preflight(choice.name, request.stock)
    least = PROGRAMS if request.tools else (SERVER,) if request.server else ()
    enough = [programs for programs in ((), (SERVER,), PROGRAMS) if set(least) <= set(programs)]
    wider = [Plan(choice.name, request.stock, programs, versions) for programs in enough]
    plan = wider[0]
    bound = library.binding_version() == library.BINDING_VERSION
    ready = _cached(wider) if bound and not request.force else None
    if ready:
        progress(Step(f"up to date: {ready} ({choice.name}: {choice.why})"))
        return ready
    progress(Step(f"backend {choice.name}: {choice.why}"))
    waiting = "another build is running; waiting for it to finish"
    try:
        with writing(cache_dir() / "tmp"), lock(cache_dir() / "build.lock", lambda: progress(Step(waiting))):
            shutil.rmtree(cache_dir() / "tmp", ignore_errors=True)  # a killed build's compilers may still write there
            download.binding(BuildLog(cache_dir() / "logs" / "binding.log"), progress, request.replace_binding)
            ready = None if request.force else _cached(wider)  # the build waited for may have been this one
            if ready is None:
                ready = _build(plan, BuildLog(cache_dir() / "logs" / f"{plan.directory.name}.log"), progress)
            else:
                progress(Step(f"up to date: {ready}"))
    except GgufloopError as e:
        raise e if isinstance(e, BackendError) else BackendError(e.message, e.hint) from e
    return ready


def _cached(plans: list[Plan]) -> Backend | None:
    """The first of `plans` that is in the cache and computes right; made the newest, as that one `activate` chooses."""
    for plan in plans:
        found = Backend.load(plan.directory)
        if found is None:
            continue
        if not library.is_verified(found) and not toolchain.lacks_driver(found.name):
            note = library.note(found)
            if check(found.directory).failures:
                continue  # built before builds were verified: it is built again
            remember(note)
        (plan.directory / library.MANIFEST).touch()
        return found
    return None


def _build(plan: Plan, log: BuildLog, progress: Progress) -> Backend:
    work = cache_dir() / "tmp" / f"{plan.directory.name}-{os.getpid()}"
    source, tree = work / "llama.cpp", work / "build"
    try:
        _check_space(plan.name)
        archive = download.sdist(log, progress)
        progress(Step("unpacking llama.cpp"))
        unpack(archive, source)
        ninja = shutil.which("ninja") or download.build_tool("ninja", log, progress)
        gave_up = ""
        narrower = toolchain.narrowings()
        while True:
            narrowing = narrower.pop(0)
            progress(Step("configuring"))
            _configure(plan, narrowing, source, tree, ninja, log, progress)
            progress(Step(f"compiling (takes minutes; log: {log.path})"))
            _compile(plan, tree, ninja, log, progress)
            if toolchain.lacks_driver(plan.name):
                progress(Step("not verified: the GPU's driver is not here; the first run where it is does that"))
                break
            progress(Step("verifying"))
            found = check(tree / "bin")
            if not found.failures:
                break
            # what happens while it loads may be a GPU's driver
            ours = all(f.device == "CPU" and (f.kind or plan.name == "cpu") for f in found.failures)
            if not narrower or not ours:
                raise BackendError(
                    f"the library just built does not compute right: {found}.",
                    f"another compiler or driver may do better (CC and CXX name a compiler); log: {log.path}",
                )
            gave_up = f"{narrower[0].gives_up} ({found})"
            progress(Step(f"giving up {gave_up}"))
        built = _manifest(plan, tree / "bin", gave_up)
        _install(tree / "bin", plan.directory)
        progress(Step(f"built {plan.directory.name}"))
        return Backend.load(plan.directory) or built
    finally:
        remove(work)


def _check_space(name: str) -> None:
    free = shutil.disk_usage(cache_dir()).free
    if free < _FREE_BYTES[name]:
        raise BackendError(
            f"the disk of {cache_dir()} has {free / 1e6:.0f} MB free, "
            f"a {name} build needs {_FREE_BYTES[name] / 1e6:.0f} MB.",
            "free some space, or set GGUFLOOP_CACHE to a folder on another disk.",
        )


def unpack(archive: Path, target: Path, more: tuple[str, ...] = ()) -> None:
    """Put the parts of llama.cpp a build reads into `target`, and `more` of its folders."""
    prefix = archive.name.removesuffix(".tar.gz") + "/vendor/llama.cpp/"
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            relative = member.name.removeprefix(prefix)
            if relative != member.name and relative.split("/")[0] in (*_SOURCE, *more):
                member.name = relative
                members.append(member)
        if hasattr(tarfile, "data_filter"):  # Python 3.10 has it from 3.10.12
            tar.extractall(target, members, filter="data")
        else:
            tar.extractall(target, members)


def _configure(
    plan: Plan, narrowing: Narrowing, source: Path, tree: Path, ninja: str, log: BuildLog, progress: Progress
) -> None:
    remove(tree / "CMakeCache.txt")  # llama.cpp's defaults depend on GGML_NATIVE, and stay what they were once
    cmake = toolchain.cmake() or download.build_tool("cmake", log, progress)
    words: list[str | Path] = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", source, "-B", tree]
    words += [*plan.flags, *(f"-D{name}={value}" for name, value in narrowing.defines)]
    hook = library.patches_dir() / "hook.cmake"
    patch_id = "stock" if plan.stock else library.patch_id()
    words += [f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={hook}", f"-DGGUFLOOP_PATCH_ID={patch_id}"]
    # llama.cpp asks git for its commit: without the ceiling a repository around the cache would answer
    env = {"GIT_CEILING_DIRECTORIES": str(source.parent)}
    if narrowing.compiler:
        env |= {name: f"{os.environ.get(name, '')} {narrowing.compiler}".strip() for name in ("CFLAGS", "CXXFLAGS")}
    _run("configuring llama.cpp", words, log, progress, env=env)


def _compile(plan: Plan, tree: Path, ninja: str, log: BuildLog, progress: Progress) -> None:
    def count(line: str) -> None:
        counted = re.match(r"\[(\d+)/(\d+)\]", line)
        if counted:
            progress(Step("compiling", int(counted[1]), int(counted[2]), "file"))

    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
    words: list[str | Path] = [ninja, "-C", tree, *(["-j", jobs] if jobs else []), *plan.targets]
    _run("compiling llama.cpp", words, log, progress, on_line=count)


def _run(
    step: str,
    words: list[str | Path],
    log: BuildLog,
    progress: Progress,
    env: dict[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> None:
    status = log.run(words, env=env, on_line=on_line)
    if status == 0:
        return
    lines = log.tail(6, _ERROR_MARKS)
    for line in lines:
        progress(Step(f"  {line}"))
    text = "\n".join(lines)
    if "No space left" in text:
        remedy = "the disk is full: free some space, or set GGUFLOOP_CACHE to a folder on another disk"
    elif "Killed" in text:
        remedy = "the memory ran out: set CMAKE_BUILD_PARALLEL_LEVEL=1 and run again"
    elif "unsupported GNU version" in text:
        remedy = "set CUDAHOSTCXX to a compiler this CUDA supports and run again"
    else:
        remedy = "mend what the lines above name and run again"
    raise BackendError(f"{step} failed with status {status}.", f"{remedy}; log: {log.path}")


def _manifest(plan: Plan, directory: Path, gave_up: str) -> Backend:
    """Write the manifest of the new library, which computes right, after a look whether it is what was asked for.

    One whose driver is not here is neither loaded nor looked at, and counts as verified nowhere.
    """
    loads = not toolchain.lacks_driver(plan.name)
    expected = None if plan.stock else library.patch_id()
    found = probe(directory) if loads else None
    if found and found.patch_id != expected:
        raise BackendError(
            f"the library just built carries patch {found.patch_id or 'none'}, it must carry {expected or 'none'}.",
            "a compiler cache may have brought in another build; run: CCACHE_DISABLE=1 ggufloop build --force",
        )
    built = Backend(
        directory, plan.name, plan.stock, expected or "", plan.key, plan.programs,
        library.BINDING_VERSION, library.cpu_id(), "; ".join(plan.versions), library.cpu_id() if loads else "", gave_up,
        library.programs_id() if plan.programs and not plan.stock else "",
    )  # fmt: skip
    built.save()
    return built


def _install(built: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # --force; processes that have the old library loaded keep it
        os.replace(target, built.with_name("replaced"))
    os.replace(built, target)
