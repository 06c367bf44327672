"""A loop against the next larger file: the pairs by hand, the correction, and where the user finds it."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from support.studies import HEADER

from ggufloop.loop import PLAIN
from ggufloop.measure.dependence import paired_mean
from ggufloop.measure.verdict import HELPS, UNSURE
from ggufloop.study import across, analysis, report
from ggufloop.study import file as studies
from ggufloop.study.file import Chunk, File, Study

MIB = 2**20
LOOPS = (PLAIN, "2:4 k=2", "2:4 k=3")
NLL = {"F32": (2.90, 2.95, 2.96), "Q5": (2.95, 2.96, 3.20), "Q4": (3.00, 2.90, 3.30)}
SIZES = {"F32": 400, "Q5": 60, "Q4": 50}


def written(
    path: Path, chunks: int = 12, nll: dict[str, tuple[float, ...]] = NLL, noise: float = 0.01
) -> tuple[Study, dict[str, np.ndarray]]:
    """A study of three files, and every chunk's NLL by "file loop"."""
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 0.5, chunks)
    s = studies.create(path, HEADER)
    values = {}
    for i, (name, means) in enumerate(nll.items()):
        snr = math.inf if name == "F32" else 20.0 + i
        s = studies.add_file(path, s, File(name, f"{i:064d}", SIZES[name] * MIB, 4.5, snr, snr))
        for loop, mean in zip(LOOPS, means, strict=False):
            values[f"{name} {loop}"] = mean + shared + rng.normal(0, noise, chunks)
            for j, x in enumerate(values[f"{name} {loop}"]):
                studies.add_chunk(path, name, loop, Chunk(j, 31, 90, float(x), 99, 0.1 * (name != "F32"), 0.9, 1))
    return studies.read(path), values


def test_pairs_by_hand(tmp_path: Path) -> None:
    study, values = written(tmp_path / "s.jsonl")
    found = {(c.file.type, c.loop, c.other.type): c for c in across.across(study)}
    assert set(found) == {(a, loop, b) for a, b in (("Q4", "Q5"), ("Q4", "F32"), ("Q5", "F32")) for loop in LOOPS}
    for (a, loop, b), c in found.items():
        diff = values[f"{b} {PLAIN}"] - values[f"{a} {loop}"]
        level = 0.95 if loop == PLAIN else 0.975
        assert c.gain == paired_mean(diff, [0] * 12, level)
    words = {key[:2]: c.word for key, c in found.items() if key[2] == "Q5"}
    assert words == {("Q4", PLAIN): "worse", ("Q4", "2:4 k=2"): "better", ("Q4", "2:4 k=3"): "worse"}
    assert found["Q5", "2:4 k=2", "F32"].word == "worse"


def test_the_next_larger_file_is_what_is_shown(tmp_path: Path) -> None:
    study, _ = written(tmp_path / "s.jsonl")
    assert {(c.file.type, c.other.type) for c in across.nearest(study)} == {("Q4", "Q5"), ("Q5", "F32")}
    said = across.summary([study])
    assert said[0].endswith("4 pairs: 1 better, 3 worse, 0 not told apart.")
    assert said[1].startswith("Q4 2:4 k=2 minus Q5 plain = +0.0")
    assert said[1].endswith("n = 12 chunks: better.")
    assert "A loop, or the next larger file" in report.html(study, {}, "again")
    rows = list(csv.DictReader(across.numbers([study]).render("csv").splitlines()))
    assert len(rows) == 9
    assert {row["verdict"] for row in rows if row["other"] == "Q5"} == {"better", "worse"}


def test_the_best_of_several_loops_is_not_taken_for_granted(tmp_path: Path) -> None:
    """One comparison at p just below 5 % is told; with a second loop beside it, it is not."""
    for i, mean in enumerate(np.arange(2.930, 2.950, 0.001)):
        nll = {"F32": (2.9,), "Q5": (2.95,), "Q4": (3.0, float(mean))}
        alone, _ = written(tmp_path / str(i) / "s.jsonl", nll=nll)
        (one,) = (c for c in across.nearest(alone) if c.loop != PLAIN)
        if one.p > 0.03:
            break
    assert one.p < 0.05
    assert one.word == across.BETTER
    both, _ = written(tmp_path / "b" / "s.jsonl", nll=nll | {"Q4": (3.0, float(mean), 2.95)})
    first = next(c for c in across.nearest(both) if c.loop == "2:4 k=2")
    assert first.p == pytest.approx(2 * one.p)
    assert first.word == across.UNSURE


def test_a_few_chunks_show_no_equality(tmp_path: Path) -> None:
    """Seven chunks that happen to be alike say as little as elsewhere."""
    nll = {"F32": (2.9,), "Q5": (2.95, 2.95), "Q4": (2.95, 2.95)}
    study, _ = written(tmp_path / "s.jsonl", 7, nll, noise=0.001)
    assert {c.word for c in across.nearest(study) if c.file.type == "Q4"} == {across.UNSURE}


def test_nothing_to_compare(tmp_path: Path) -> None:
    one, _ = written(tmp_path / "a" / "s.jsonl", nll={"F32": (2.9, 2.9)})
    few, _ = written(tmp_path / "b" / "s.jsonl", chunks=1)
    for study in (one, few):
        assert across.summary([study]) == []
        assert across.across(study) == []


def test_words_are_by_holms_p() -> None:
    """As the p that stands beside them: .04 of two loops, the other of which is sure, is no "cannot tell"."""
    rng = np.random.default_rng(1)
    sure, near = rng.normal(-0.5, 0.01, 40), rng.normal(0, 0.05, 40)
    near += 3.4 * near.std(ddof=1) / math.sqrt(40) - near.mean()
    alone, both = analysis.judged({"near": near}), analysis.judged({"sure": sure, "near": near})
    assert 0.025 < alone["near"].p < 0.05
    assert both["near"].p == pytest.approx(alone["near"].p)
    assert both["near"].word == alone["near"].word == HELPS
    assert analysis.judged({"other": near, "near": near})["near"].word == UNSURE
