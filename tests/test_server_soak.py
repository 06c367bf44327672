"""Sixty-four clients at one server for some seconds; scripts/serve_soak.py does it for a minute."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "serve_soak.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("serve_soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_in_a_crowd_every_answer_is_the_one_computed_alone() -> None:
    """With little room for conversations, so that many are read anew."""
    counts, growth = load().soak(clients=64, seconds=6.0, conversations=40, parallel=3, cache_mib=1)
    assert counts.wrong == []
    assert counts.lost == []
    assert counts.right > 60
    assert counts.left > 0
    assert growth < 40, "MiB"
