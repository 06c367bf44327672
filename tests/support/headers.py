"""The headers of the pinned llama.cpp, for what the tests compile themselves.

folder = headers.unpack(tmp_path / "include")      # llama.h, ggml.h, ggml-backend.h, ... in one folder
"""

from __future__ import annotations

import tarfile
from pathlib import Path

from ggufloop.backend import download
from ggufloop.backend.log import BuildLog


def unpack(folder: Path) -> Path:
    """Write the public headers, and ggml's for devices of one's own, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = download.sdist(BuildLog(folder / "log"), lambda step: None)
    prefix = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    public = (f"{prefix}include/", f"{prefix}ggml/include/", f"{prefix}ggml/src/ggml-backend-impl.h")
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith(public) and member.name.endswith(".h"):
                stream = tar.extractfile(member)
                assert stream is not None
                (folder / Path(member.name).name).write_bytes(stream.read())
    return folder
