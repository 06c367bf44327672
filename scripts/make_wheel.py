#!/usr/bin/env python3
"""Make a wheel that needs no compiler where it is installed: Linux, x86-64, glibc; the library computes on CPUs.

    CMAKE_BUILD_PARALLEL_LEVEL=2 python3 scripts/bootstrap.py python scripts/make_wheel.py -o dist
    pip install dist/ggufloop-*.whl

In it are the patched llama.cpp with llama-server, libggml-cpu once per CPU generation (ggufloop/backend/bundled.py says
which, and takes one at first use), and the Python files of llama-cpp-python out of the same source archive, which pip
could only install with a compiler. Nothing of that is kept in the repository.

What a bare system may lack goes in: C++'s runtime is linked into each library and shown to no other, so that another
package's is not disturbed, and OpenMP's, libgomp, lies beside them, for with ggml's own threads speed on a busy machine
would be another one than measured (SPIN_COUNT in library.py). The tag names the oldest glibc that all of it loads with.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ggufloop.backend import build, bundled, download, library, toolchain  # noqa: E402  # found once the path is set
from ggufloop.backend.build import SERVER, Plan  # noqa: E402  # as above
from ggufloop.backend.library import Backend  # noqa: E402  # as above
from ggufloop.backend.log import BuildLog  # noqa: E402  # as above
from ggufloop.backend.toolchain import Narrowing  # noqa: E402  # as above
from ggufloop.errors import BackendError, GgufloopError  # noqa: E402  # as above
from ggufloop.files import cache_dir, lock, remove, writing  # noqa: E402  # as above
from ggufloop.interrupts import end_on_sigterm  # noqa: E402  # as above
from ggufloop.progress import Step  # noqa: E402  # as above

LINKER = "-static-libstdc++ -static-libgcc -Wl,--exclude-libs,libstdc++.a:libgcc.a:libgcc_eh.a -s"
OPENMP = "libgomp.so.1"
_GLIBC = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"}
_COPYRIGHT = Path("/usr/share/doc/libgomp1/copyright")  # Debian's

_HOOK = """
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

class Tag(BuildHookInterface):
    def initialize(self, version, build_data):
        build_data["pure_python"] = False
        build_data["tag"] = "{tag}"
"""


def say(step: Step) -> None:
    """One line for what begins; a compiler's thousand files are in the log."""
    if step.text and not step.total:
        print(f"make_wheel: {step.text}", file=sys.stderr, flush=True)


def output(*words: str | Path) -> str:
    """What a program says. Raises BackendError if it fails."""
    try:
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    except FileNotFoundError:
        raise BackendError(f"{words[0]} is not here.", "install gcc and binutils.") from None
    if done.returncode:
        raise BackendError(f"{words[0]} fails: {done.stderr.strip()}.", "mend that and run again.")
    return done.stdout


def compile_all(target: Path, log: BuildLog) -> Backend:
    """Compile the library in all variants into `target`, the folder that becomes library.BUNDLED; its manifest."""
    plan = Plan("cpu", False, (SERVER,), toolchain.preflight("cpu", False))
    work = cache_dir() / "tmp" / "wheel"  # always the same, as __FILE__ is part of what a compiler cache compares
    source, tree = work / "llama.cpp", work / "build"
    os.environ["LDFLAGS"] = LINKER
    remove(work)
    try:
        archive = download.sdist(log, say)
        build.unpack(archive, source)
        ninja = shutil.which("ninja") or download.build_tool("ninja", log, say)
        shared = target / bundled.SHARED
        shared.mkdir(parents=True)
        for variant in bundled.VARIANTS:
            say(Step(f"compiling {variant} (log: {log.path})"))
            values = {"GGML_NATIVE": False, **bundled.options(variant)}
            flags = Narrowing(variant, tuple((name, "ON" if on else "OFF") for name, on in values.items()))
            build._configure(plan, flags, source, tree, ninja, log, say)
            build._compile(plan, tree, ninja, log, say)
            shutil.copyfile(tree / "bin" / bundled.CPU, target / f"{variant}.so")
        for path in sorted((tree / "bin").iterdir()):
            if path.name == SERVER or (path.name.endswith((".so", ".so.0")) and not needless(path)):
                shutil.copy(path, shared / path.name)
        shutil.copyfile(output("gcc", f"-print-file-name={OPENMP}").strip(), shared / OPENMP)
        licences(source, target, archive)
    finally:
        remove(work)
    made = Backend(
        target, plan.name, False, library.patch_id(), f"wheel-{digest(target)}", plan.programs,
        library.BINDING_VERSION, "", "; ".join(plan.versions), programs_id=library.programs_id(),
    )  # fmt: skip
    made.save()
    return made


def needless(path: Path) -> bool:
    """Whether nothing is loaded by this name: the variants' library, and links that the cache will have again."""
    return path.name == bundled.CPU or (path.is_symlink() and path.suffix == ".so")


def licences(source: Path, target: Path, archive: Path) -> None:
    """The binding's Python files, and the licences of all that is not ours."""
    folder = target / "licenses"
    folder.mkdir()
    shutil.copyfile(source / "LICENSE", folder / "llama.cpp.txt")
    if not _COPYRIGHT.is_file():
        raise BackendError(f"the licence of {OPENMP} is not in {_COPYRIGHT}.", "run this on a Debian or Ubuntu.")
    shutil.copyfile(_COPYRIGHT, folder / "gcc-runtime.txt")
    for path in sorted((source / "licenses").glob("*")):
        shutil.copyfile(path, folder / f"{path.name}.txt")
    prefix = archive.name.removesuffix(".tar.gz") + "/"
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            binding = name.startswith("llama_cpp/") and not name.startswith("llama_cpp/server/")
            if member.isfile() and (binding or name == "LICENSE.md"):
                place = target / "binding" / name if binding else folder / "llama-cpp-python.txt"
                place.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                place.write_bytes(content.read())


def digest(folder: Path) -> str:
    """Names the library by its content, so that another one gets another folder in the cache."""
    found = hashlib.sha256()
    for path in libraries(folder):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]


def libraries(folder: Path) -> list[Path]:
    """What the loader will load."""
    return sorted(p for p in folder.rglob("*") if ".so" in p.name or p.name == SERVER)


def platform_tag(paths: Iterable[Path]) -> str:
    """The oldest glibc these load with, as a wheel's tag. Raises BackendError if they need what is not in the wheel."""
    paths = list(paths)
    here = {path.name for path in paths} | {bundled.CPU} | _GLIBC
    newest = (2, 17)
    for path in paths:
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-dW", path)))
        if needed - here:
            raise BackendError(f"{path.name} needs {', '.join(sorted(needed - here))}.", "link it in, or bring it.")
        versions = re.findall(r"GLIBC_(\d+)\.(\d+)", output("readelf", "-VW", path))
        newest = max([newest, *((int(a), int(b)) for a, b in versions)])
    return "manylinux_{}_{}_x86_64".format(*newest)


def project(parts: Path, tag: str, target: Path) -> None:
    """In `target` the project as it is here, with `parts` in its package and the tag in its wheel."""
    for folder in ("ggufloop", "patches"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("models.toml", "LICENSE", "README.md"):
        shutil.copyfile(ROOT / file, target / file)
    shutil.copytree(parts, target / "ggufloop" / library.BUNDLED.name)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = text.replace('["LICENSE"]', f'["LICENSE", "ggufloop/{library.BUNDLED.name}/licenses/*"]')
    (target / "pyproject.toml").write_text(text + "\n[tool.hatch.build.targets.wheel.hooks.custom]\n")
    (target / "hatch_build.py").write_text(_HOOK.format(tag=f"py3-none-{tag}"))


def assemble(parts: Path, target: Path) -> Path:
    """The wheel in `target`. Raises BackendError."""
    tag = platform_tag(libraries(parts))
    with tempfile.TemporaryDirectory(prefix="ggufloop-") as name:
        project(parts, tag, Path(name, "project"))
        output(*download.PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", target, Path(name, "project"))
    (made,) = target.glob(f"ggufloop-*-{tag}.whl")
    return made


def main() -> int:
    """Make the wheel; an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "dist", help="folder for it (default: dist)")
    parser.add_argument("--parts", type=Path, help="keep what was compiled in this folder, or take it from there")
    args = parser.parse_args()
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        parser.error(f"this is {sys.platform} on {platform.machine()}; the wheel is made on Linux on x86_64.")
    end_on_sigterm()
    try:
        with tempfile.TemporaryDirectory(prefix="ggufloop-") as name:
            parts = args.parts or Path(name, "parts")
            log = BuildLog(cache_dir() / "logs" / "wheel.log")
            found = Backend.load(parts)
            if found is None or found.patch_id != library.patch_id():
                remove(parts)
                with writing(cache_dir() / "tmp"), lock(cache_dir() / "build.lock"):
                    compile_all(parts, log)
            print(assemble(parts, args.output.absolute()))
    except GgufloopError as e:
        print(f"make_wheel: {e.message}\n  {e.hint}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
