"""A library for a device that cannot compute here, or is no GPU: built, and kept behind the others in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ggufloop.backend import library as backend

ROOT = Path(__file__).resolve().parent.parent


def library(name: str) -> Path:
    """Folder of the library of backend `name`, built if it is not in the cache, never the one used by default."""
    before = backend.installed()
    words = [sys.executable, "-c", "from ggufloop.cli import main; main()", "build", "--backend", name]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        sys.exit(done.returncode)
    built = Path(done.stdout.strip())
    others = [b.directory / backend.MANIFEST for b in before if b.directory != built]
    if others:  # it must not become what everything runs on
        oldest = min(manifest.stat().st_mtime for manifest in others) - 1
        os.utime(built / backend.MANIFEST, (oldest, oldest))
    return built
