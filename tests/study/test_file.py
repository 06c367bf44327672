"""Studies: what is written is read, what does not belong together is refused, and the numbers drawn from one."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from support.studies import FILES, HEADER, LOOPS, numbers, written

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import PLAIN
from ggufloop.measure import stats
from ggufloop.study import analysis, pareto, report
from ggufloop.study import file as study
from ggufloop.study.collection import collect
from ggufloop.study.file import Chunk, TaskResult


def test_what_is_written_is_read(tmp_path: Path) -> None:
    s = written(tmp_path / "s.jsonl")
    assert (s.header, s.files) == (HEADER, FILES)
    assert (s.types, s.loops) == (("F32", "Q4_0"), (PLAIN, *LOOPS))
    cell = s.cell("Q4_0", LOOPS[0])
    assert cell.values("nll") == pytest.approx(numbers(1)["nll"] - 0.1, abs=1e-15)
    assert cell.n == 8 * 31
    mean = cell.values("nll").mean()
    deviation = math.sqrt((cell.values("nll") ** 2 + 2).mean() - mean**2)
    assert cell.ppl == pytest.approx((math.exp(mean), math.exp(mean) * deviation / math.sqrt(8 * 31 - 1)))
    assert cell.bits_per_byte == pytest.approx(mean / math.log(2) * 31 / 90)
    assert s.lacks("Q4_0", LOOPS[0], range(10)) == [8, 9]
    assert s.lacks("Q2_K", PLAIN, [3]) == [3]
    with pytest.raises(UsageError, match="no type 'Q4_1'"):
        s.cell("Q4_1")
    with pytest.raises(UsageError, match="nothing of F32 under '2:5 k=4'"):
        s.cell("F32", "2:5 k=4")


def test_a_study_goes_on_after_a_crash(tmp_path: Path) -> None:
    """Half a line at the end is dropped, and the next one does not continue it."""
    path = tmp_path / "s.jsonl"
    before = written(path)
    with path.open("a") as f:
        f.write('{"kind": "chunk", "type": "Q4_0", "lo')
    assert study.read(path) == before
    assert study.create(path, HEADER) == before
    chunk = dataclasses.replace(before.cell("Q4_0").chunks[0], index=8)
    study.add_chunk(path, "Q4_0", PLAIN, chunk)
    after = study.read(path)
    assert after.cell("Q4_0").chunks == (*before.cell("Q4_0").chunks, chunk)
    assert [len(c.chunks) for c in after.paired(("Q4_0", PLAIN), ("Q4_0", LOOPS[0]))] == [8, 8]


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    s = written(path)
    other = dataclasses.replace(HEADER, window=(2, 4), text_sha256="e" * 64, patch_id="p2", settings={"threads": "2"})
    said = (
        "window 2:5 and 2:4; text_sha256 bbbbbbbbbbbb... and eeeeeeeeeeee...; flash_attn True and None; "
        "threads 1 and 2; patch_id p1 and p2."
    )
    with pytest.raises(GgufloopError) as e:
        study.create(path, other)
    assert e.value.message == f"{path} holds another study: {said}"
    with pytest.raises(GgufloopError, match=r"the studies of m\.gguf and m\.gguf cannot be compared: text_sha256"):
        study.check_comparable(s, dataclasses.replace(s, header=other))
    study.check_comparable(s, dataclasses.replace(s, header=dataclasses.replace(HEADER, model="n.gguf", n_layer=9)))
    with pytest.raises(GgufloopError, match=r"Q4_0 was measured on a file dddddddddddd\.\.\., and is eeeeeeeeeeee"):
        study.add_file(path, s, dataclasses.replace(FILES[1], sha256="e" * 64))
    with pytest.raises(GgufloopError, match="Q4_0 under plain has no finite nll on chunk 0"):
        study.add_chunk(path, "Q4_0", PLAIN, Chunk(0, 31, 90, math.nan, 1, 0, 1, 1))
    assert study.read(path) == s


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no study"),
        ("{}", "holds no study"),  # no line feed: not a whole line
        ("{}\n", "schema version None is not 1"),
        ("no json\n", "is no study, or damaged: line 1: "),
        ('{"kind": "study", "schema_version": 2}\n', "schema version 2 is not 1"),
        ('{"kind": "study", "schema_version": 1, "model": "m"}\n', "is no study, or damaged: line 1: "),
    ],
)
def test_files_that_are_no_studies(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(content)
    with pytest.raises(GgufloopError, match=said):
        study.read(path)
    with pytest.raises(GgufloopError, match="cannot read"):
        study.read(tmp_path / "none.jsonl")


def test_what_a_study_says(tmp_path: Path) -> None:
    s = written(tmp_path / "s.jsonl")
    ratio = analysis.amplification(s, "Q4_0", LOOPS[0])
    assert ratio is not None
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((2.5, 2.5, 2.5))
    assert analysis.amplification(s, "Q4_0", PLAIN) == stats.Estimate(1.0, 1.0, 1.0, 8)
    assert analysis.amplification(s, "F32", LOOPS[0]) is None
    found = analysis.verdicts(s, "Q4_0")
    assert {loop: v.word for loop, v in found.items()} == {LOOPS[0]: analysis.HELPS, LOOPS[1]: analysis.UNSURE}
    assert found[LOOPS[0]].gain.mean == pytest.approx(0.1)
    assert found[LOOPS[0]].p == pytest.approx(2 * found[LOOPS[0]].gain.p)  # of two loops
    assert analysis.lost(s, "Q4_0").mean == 0
    assert analysis.interaction(s, "Q4_0", LOOPS[1]).mean == 0  # both files change alike
    assert analysis.kld(s, "Q4_0").mean == pytest.approx(numbers(1)["kl"].mean())
    assert analysis.tokens_per_second(s, s.cell("F32")) == 64 / np.median(numbers(1)["seconds"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([analysis.HELPS, analysis.UNSURE], "Looping helps in 1 of 2 cells: Q4_0 under x, by +0.1000 ["),
        ([analysis.HELPS, analysis.HELPS], "Looping helps in 2 of 2 cells, most Q4_0 under x, by +0.1000 ["),
        ([analysis.UNSURE, analysis.UNSURE], "Not enough data to tell whether looping helps: 8 chunks cannot in any"),
        ([analysis.UNSURE, analysis.HURTS], "No loop was found to help; in 1 of 2 cells 8 chunks cannot tell."),
        ([analysis.SAME, analysis.HURTS], "No loop helps: of 2 cells looping hurts in 1, in 1 it has no effect larger"),
        ([], "Front of "),
    ],
)
def test_the_headline_says_what_the_cells_say(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = written(tmp_path / "s.jsonl")
    gain = analysis.verdicts(s, "Q4_0")[LOOPS[0]].gain
    found = {loop: analysis.LoopGain(gain, 0.5, word) for loop, word in zip("xy", words, strict=False)}
    monkeypatch.setattr(analysis, "verdicts", lambda study, type_: found if type_ == "Q4_0" else {})
    monkeypatch.setattr(pareto, "summary", lambda studies: ["front of pydoc: Q4_0."])
    assert report.headline(s).startswith(said)


def test_a_report_s_table_says_a_verdict_beside_its_loop(tmp_path: Path) -> None:
    """And an interval below its number, so that all columns are in sight at 1,280 px."""
    page = report.html(written(tmp_path / "s.jsonl"), {}, "again")
    table = page[page.index("<h2>Every cell</h2>") :]
    assert re.findall(r"<th[^>]*>([^<]*)</th>", table)[:4] == ["type", "loop", "verdict", "gain by looping"]
    assert "<small>[+0.1000, +0.1000]</small>" in table
    assert '<td class="word verdict helps">helps</td>' in table
    assert page.index('class="headline">Looping helps in 2 of 4 cells') < page.index("<ul>")


def test_no_interval_without_0_stands_beside_cannot_tell(tmp_path: Path) -> None:
    """Eight loops of small effects, many of which one test alone would call real: the interval is of all together."""
    rng, alone = np.random.default_rng(3), 0
    s = written(tmp_path / "s.jsonl", chunks=12)
    for k in range(2, 10):
        for i, chunk in enumerate(s.cell("Q4_0").chunks):
            nll = chunk.nll - 0.01 * (k - 5) + float(rng.normal(0, 0.015))
            study.add_chunk(tmp_path / "s.jsonl", "Q4_0", f"2:5 k={k} beta=0.5", Chunk(i, 31, 90, nll, 12, 0, 1, 1))
    s = study.read(tmp_path / "s.jsonl")
    for loop, found in analysis.verdicts(s, "Q4_0").items():
        if found.word == analysis.UNSURE:
            assert found.gain.low <= 0 <= found.gain.high, loop
            assert found.p > analysis.LEVEL
            plain, looped = (s.cell("Q4_0", name).values("nll") for name in (PLAIN, loop))
            one = analysis.judge(plain - looped, analysis.WORTH, documents=[0] * 12).gain
            alone += not one.low <= 0 <= one.high
    assert alone, "or the level of one would have done"


def test_an_answer_that_nothing_flipped_has_an_interval(tmp_path: Path) -> None:
    """The rule of three, and not [0, 0], in `ggufloop results` as in the study's own table."""
    path = tmp_path / "m" / "study.jsonl"
    path.parent.mkdir()
    written(path)
    docs = tuple(("t", i) for i in range(40))
    for loop in (PLAIN, LOOPS[0]):
        study.add_task(path, "Q4_0", loop, "t", TaskResult(docs, (0.0, 1.0) * 20, (None,) * 40))
    rows = collect(tmp_path).table().records()
    row = next(r for r in rows if (r["type"], r["measure"], r["loop"]) == ("Q4_0", "t", LOOPS[0]))
    own = analysis.task_gain(study.read(path), "Q4_0", LOOPS[0], "t").difference
    assert (row["gain"], row["low"], row["high"]) == (0, own.low, own.high)
    assert own.low < -0.05 < 0.05 < own.high


def test_gains_are_above_0_where_the_loop_is_better(tmp_path: Path) -> None:
    """Everywhere: the table, the csv, `ggufloop results`. Looped Q4_0 is better by 0.1."""
    path = tmp_path / "m" / "study.jsonl"
    path.parent.mkdir()
    s = written(path)
    (told,) = (row for row in report.numbers(s).records() if (row["type"], row["loop"]) == ("Q4_0", LOOPS[0]))
    (kept,) = (row for row in collect(tmp_path).table().records() if (row["type"], row["loop"]) == ("Q4_0", LOOPS[0]))
    (eyes,) = (row for row in report.shown(s).records() if (row["type"], row["loop"]) == ("Q4_0", LOOPS[0]))
    assert told["gain"] == pytest.approx(0.1) == kept["gain"]
    assert eyes["gain by looping"].startswith("+0.1000 [")
    assert not any(
        "change" in column.name for table in (report.numbers(s), report.shown(s)) for column in table.columns
    )


def test_tasks_of_a_study(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    written(path)
    docs = tuple(("t", i) for i in range(4))
    study.add_task(path, "Q4_0", PLAIN, "t", TaskResult(docs, (0.0, 0.0, 1.0, 1.0), (-2.0, -2.0, -1.0, None)))
    study.add_task(path, "Q4_0", LOOPS[0], "t", TaskResult(docs, (1.0, 1.0, 1.0, 0.0), (-1.0, -1.0, -1.0, None)))
    c = analysis.task_gain(study.read(path), "Q4_0", LOOPS[0], "t")
    assert (c.n, c.gained, c.lost, c.difference.mean, c.gold) == (4, 2, 1, 0.25, None)
    with pytest.raises(UsageError, match="Q4_0 was not asked u under 'plain'"):
        analysis.task_gain(study.read(path), "Q4_0", LOOPS[0], "u")
