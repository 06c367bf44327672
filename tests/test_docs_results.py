"""docs/results*.md say what docs/data says: the tables that the scores by item make, and those of the ladders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import ROOT

pytest.importorskip("matplotlib")

import protocol_results
import results_quantisation
import signals
import wordnet_results

from ggufloop.measure.verdict import RECALL
from ggufloop.study import file as studies
from ggufloop.study.scores import Score
from ggufloop.table import Table

SIGNALS = ROOT / "docs" / "data" / "signals"


def look_for(tables: Sequence[Table], name: str) -> None:
    page = (ROOT / "docs" / name).read_text().splitlines()
    for table in tables:
        rows = table.render("md").strip().splitlines()
        assert len(rows) > 2
        begin = page.index(rows[0])
        while page[begin : begin + len(rows)] != rows:  # another model's has the same head
            begin = page.index(rows[0], begin + 1)


def test_the_tables_are_what_the_scores_say() -> None:
    judged, found = protocol_results.measured()
    look_for([protocol_results.headline(judged, found), protocol_results.normed(judged)], "results.md")
    look_for([table for _, table in protocol_results.long_contexts(found)], "longctx.md")


def test_the_windows_tables_are_what_was_measured() -> None:
    found = [w for path in sorted(SIGNALS.glob("*.csv")) for w in signals.read_windows(path)]
    look_for([signals.summary(found), signals.correlations(found)], "results.md")


def test_long_contexts_pair_samples_and_keep_models_apart() -> None:
    """The loop loses .2 on each sample of one task and nothing on the other. Samples are far apart, so that pairing
    them in the order they come in would widen the interval beyond what four samples without a change allow."""
    found = [
        Score(model, f"ruler {length}", RECALL, loop, "plain" if loop == "plain" else "2:4 k=8", f"{task} {i}",
              0.2 + 0.8 * i / 3 - (0.2 if loop != "plain" and task == "cwe" else 0.0))
        for model in "ab" for length in (1024, 2048) for task in ("vt", "cwe") for loop in ("k=8", "plain")
        for i in (range(4) if loop == "plain" else (3, 2, 1, 0))
    ]  # fmt: skip
    (first, table), (second, same) = protocol_results.long_contexts(found)
    assert (first, second, table.rows) == ("a", "b", same.rows)
    gains = {tuple(row[:3]): row[7] for row in table.rows}
    assert gains[1024, "all", "plain"] is None
    assert [gains[1024, task, "2:4 k=8"] for task in ("all", "cwe", "vt")] == pytest.approx([-0.1, -0.2, 0])
    lows = {tuple(row[:3]): row[8] for row in table.rows}
    assert lows[1024, "cwe", "2:4 k=8"] == pytest.approx(-0.2 - (1 - 0.025**0.25))


def test_a_plot_that_cannot_be_written_is_a_line(tmp_path: Path) -> None:
    ran = CliRunner().invoke(protocol_results.main, ["--plot", str(tmp_path / "none" / "x.png")])
    assert (ran.exit_code, ran.output.count("\n"), "cannot write" in ran.output) == (1, 1, True)


def test_the_tables_of_the_one_gain_are_what_the_scores_say() -> None:
    look_for(wordnet_results.tables(wordnet_results.measured()), "results.md")


def test_the_ladders_tables_are_what_the_chunks_say() -> None:
    found = [studies.read(path) for path in sorted(results_quantisation.LADDERS.glob("*.jsonl"))]
    assert [s.header.n_layer for s in found] == [30, 18]
    look_for([table for s in found for table in results_quantisation.tables(s)], "results-quantisation.md")
