#!/usr/bin/env python3
"""Build the Vulkan library where there is no GPU, and compute with it on Mesa's software device, llvmpipe.

    python3 scripts/bootstrap.py python scripts/build_vulkan.py             # build what is missing, then check
    python3 scripts/bootstrap.py python scripts/build_vulkan.py --no-check

Real shaders and real queues on two CPU cores: slow, but what a GPU needs of the graph. Three things are missed on a
Debian 12: glslc and the driver, installed with apt-get by root, and headers as new as llama.cpp wants them (the
extension of layer settings). Those are taken from Debian 13's packages, which only hold headers: unpacked into a folder
of the cache that looks like a Vulkan SDK, from a sources list of their own, and never installed. $VULKAN_SDK then names
it, as it does for anybody who has the SDK.

The library is put behind the others in the cache: GGUFLOOP_BACKEND=vulkan chooses it, nothing else does.
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu_library import library  # noqa: E402  # found once the path is set

from ggufloop.errors import BackendError, GgufloopError  # noqa: E402  # found once the path is set
from ggufloop.files import atomic_path, cache_dir  # noqa: E402  # found once the path is set

NEWER = "trixie"  # the Debian whose headers are new enough
HEADERS = ("libvulkan-dev", "spirv-headers")
NEEDED = "VK_EXT_layer_settings"  # what ggml-vulkan includes that older headers lack
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def run(words: list[str], cwd: Path | None = None) -> str:
    """Output of a program. Raises BackendError with its last line."""
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        told = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or [f"status {done.returncode}"]
        raise BackendError(f"{' '.join(words[:2])} failed: {told[0]}", "mend that and run again.")
    return done.stdout


def programs() -> None:
    """See that glslc, the loader and a software driver are here; root installs them. Raises BackendError."""
    missing = [] if shutil.which("glslc") else ["glslc"]
    missing += [] if ctypes.util.find_library("vulkan") else ["libvulkan1"]
    drivers = [p for place in ("/usr/share", "/etc") for p in Path(place, "vulkan/icd.d").glob("lvp_icd*")]
    missing += [] if drivers or os.environ.get("VK_DRIVER_FILES") else ["mesa-vulkan-drivers"]
    if not missing:
        return
    if not shutil.which("apt-get") or os.geteuid():
        raise BackendError(
            f"{', '.join(missing)} (Debian's names) are missing.", f"run: sudo apt-get install {' '.join(missing)}"
        )
    print(f"installing {' '.join(missing)}", file=sys.stderr, flush=True)
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    run(["apt-get", "update"])
    run(["apt-get", "install", "-y", "--no-install-recommends", *missing])


def has_headers(root: Path) -> bool:
    """Whether Vulkan headers below `root` are new enough and SPIR-V's are beside them."""
    core = root / "include" / "vulkan" / "vulkan_core.h"
    known = core.is_file() and NEEDED in core.read_text("utf-8", errors="replace")
    return known and any(root.glob("share/cmake/SPIRV-Headers"))


def sdk() -> Path | None:
    """The folder for $VULKAN_SDK, made if it is needed; None if the system's own headers will do."""
    given = os.environ.get("VULKAN_SDK")
    if given:
        return Path(given)
    if has_headers(Path("/usr")):
        return None
    folder = cache_dir() / "vulkan-sdk"
    if not has_headers(folder):
        print(f"unpacking {' and '.join(HEADERS)} of Debian's {NEWER} into {folder}", file=sys.stderr, flush=True)
        if folder.exists():
            shutil.rmtree(folder)
        with atomic_path(folder) as partial:
            _unpack(partial)
    return folder


def _unpack(target: Path) -> None:
    """Headers, CMake's files about them and a link to the loader that is installed."""
    loader = next((p for p in Path("/usr/lib").glob("*-linux-gnu*/libvulkan.so.1")), None)
    if loader is None:
        raise BackendError("the Vulkan loader is not in /usr/lib.", "set VULKAN_SDK to the folder of a Vulkan SDK.")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for package in _download(work):
            run(["dpkg", "-x", str(package), str(work / "root")])
        (target / "lib").mkdir(parents=True)
        for part in ("include", "share"):
            shutil.move(work / "root" / "usr" / part, target / part)
    (target / "lib" / "libvulkan.so").symlink_to(loader)


def _download(work: Path) -> list[Path]:
    """The packages, through apt from the mirror this machine uses, with lists and archives of their own."""
    if not shutil.which("apt-get"):
        raise BackendError(
            "the Vulkan headers here are missing or too old, and there is no apt-get to fetch newer ones.",
            "install a Vulkan SDK and set VULKAN_SDK to its folder.",
        )
    fields = run(["apt-get", "indextargets", "--format", "$(LABEL) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"])
    mirror = next((line.split()[2] for line in fields.splitlines() if line.startswith("Debian main ")), None)
    if mirror is None:
        raise BackendError(
            "the Vulkan headers here are missing or too old, and apt knows no mirror of Debian.",
            "install a Vulkan SDK and set VULKAN_SDK to its folder.",
        )
    signed = f"[signed-by={KEYRING}] " if KEYRING.is_file() else ""
    (work / "sources.list").write_text(f"deb {signed}{mirror} {NEWER} main\n", encoding="utf-8")
    for folder in ("lists/partial", "cache/archives/partial", "debs"):
        (work / folder).mkdir(parents=True)
    places = {
        "Dir::Etc::sourcelist": work / "sources.list", "Dir::Etc::sourceparts": "-", "APT::Sandbox::User": "root",
        "Dir::State::lists": work / "lists", "Dir::Cache": work / "cache",
    }  # fmt: skip
    apt = ["apt-get", *[word for key, value in places.items() for word in ("-o", f"{key}={value}")]]
    run([*apt, "update"])
    run([*apt, "download", *HEADERS], cwd=work / "debs")
    return sorted((work / "debs").glob("*.deb"))


def check() -> int:
    """Run the tests of the library; their exit status."""
    words = [sys.executable, "-m", "pytest", "-q", "-rs", str(ROOT / "tests" / "test_vulkan.py")]
    return subprocess.run(words, cwd=ROOT).returncode


def main() -> int:
    """Build, then check; an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-check", dest="check", action="store_false", help="build only")
    args = parser.parse_args()
    try:
        programs()
        folder = sdk()
        if folder:
            os.environ["VULKAN_SDK"] = str(folder)
        print(library("vulkan"))
    except GgufloopError as e:
        print(f"build_vulkan: {e.message}\n  {e.hint}", file=sys.stderr)
        return 3
    return check() if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
