"""docs/results.md says what docs/data says: its first table is what the scores by item make."""

from __future__ import annotations

import pytest
from support import ROOT

pytest.importorskip("matplotlib")

import protocol_results


def test_the_first_table_is_what_the_scores_say() -> None:
    rows = protocol_results.headline(*protocol_results.measured()).render("md").strip().splitlines()
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    begin = page.index(rows[0])
    assert page[begin : begin + len(rows)] == rows
    assert len(rows) > 5
