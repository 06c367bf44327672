"""Sixty-four clients at one server for some seconds; scripts/serve_soak.py does it for a minute."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from support import ROOT

SCRIPT = ROOT / "scripts" / "serve_soak.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("serve_soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_in_a_crowd_no_answer_is_lost_and_none_is_anothers() -> None:
    counts = load().soak(clients=64, seconds=5.0, n=40, parallel=4)
    assert counts.wrong == []
    assert counts.lost == []
    assert counts.right > 60
    assert counts.turned < counts.right / 5
    assert counts.left > 0


def test_at_one_slot_a_crowd_is_answered_as_each_alone() -> None:
    """Whoever was served before, and whatever that left behind."""
    counts = load().soak(clients=16, seconds=3.0, n=40, parallel=1)
    assert (counts.wrong, counts.lost, counts.turned) == ([], [], 0)
    assert counts.right > 20
