"""The tiny families looped on Vulkan against the CPU, where a Vulkan library of this patch is in the cache.

scripts/build_vulkan.py builds it, on Mesa's software device where there is no GPU. Every check of scripts/gpu_check.py
that compares numbers runs here, in processes of its own; numbers.py there says what the bounds are.
"""

from __future__ import annotations

import os
from pathlib import Path

import gpu_check
import pytest

from ggufloop.backend import library as backend

NUMBERS = [check for check in gpu_check.CHECKS if not check.sized]


def library() -> Path | None:
    """Folder of the Vulkan library that fits this checkout and CPU."""
    for built in backend.installed():
        if built.name == "vulkan" and built.patch_id == backend.patch_id() and built.cpu == backend.cpu_id():
            return built.directory
    return None


@pytest.mark.skipif(
    library() is None, reason="no Vulkan library in the cache: python scripts/build_vulkan.py makes one"
)
@pytest.mark.parametrize("check", NUMBERS, ids=lambda check: check.name)
def test_vulkan(check: gpu_check.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFLOOP_LIB_DIR", str(library()))
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)  # this process may have another library
    if "GGML_VK_VISIBLE_DEVICES" not in os.environ:
        monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "0")  # llama.cpp overlooks a software device unless it is named
    rows = gpu_check.run(check, tmp_path, "tiny", 600)
    assert rows
    assert [row for row in rows if row.ok is False] == []
