"""docs/results.md says what docs/data says: its first table, and that of acc_norm, are what the scores by item make."""

from __future__ import annotations

import pytest
from support import ROOT

pytest.importorskip("matplotlib")

import protocol_results


def test_the_tables_are_what_the_scores_say() -> None:
    judged, found = protocol_results.measured()
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    for table in (protocol_results.headline(judged, found), protocol_results.normed(judged)):
        rows = table.render("md").strip().splitlines()
        begin = page.index(rows[0])
        assert page[begin : begin + len(rows)] == rows
        assert len(rows) > 5
