"""docs/results*.md say what docs/data says: the tables that the scores by item make, and those of the ladders."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from support import ROOT

pytest.importorskip("matplotlib")

import protocol_results
import results_quantisation

from ggufloop.study import file as studies
from ggufloop.table import Table


def look_for(tables: Sequence[Table], name: str) -> None:
    page = (ROOT / "docs" / name).read_text().splitlines()
    for table in tables:
        rows = table.render("md").strip().splitlines()
        assert len(rows) > 5
        begin = page.index(rows[0])
        while page[begin : begin + len(rows)] != rows:  # another model's has the same head
            begin = page.index(rows[0], begin + 1)


def test_the_tables_are_what_the_scores_say() -> None:
    judged, found = protocol_results.measured()
    look_for([protocol_results.headline(judged, found), protocol_results.normed(judged)], "results.md")


def test_the_ladders_tables_are_what_the_chunks_say() -> None:
    found = [studies.read(path) for path in sorted(results_quantisation.LADDERS.glob("*.jsonl"))]
    assert [s.header.n_layer for s in found] == [30, 18]
    look_for([table for s in found for table in results_quantisation.tables(s)], "results-quantisation.md")
