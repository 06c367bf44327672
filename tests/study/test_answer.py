"""`ggufloop answer`: parts that do not meet, a judge that is right as often as it says, the paragraph, the command."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.cli import Cli
from support.rewrite import rewritten
from support.sweeps import FakeEngine, FakeMeasure

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import PLAIN, LoopSpec
from ggufloop.measure.dependence import paired_mean
from ggufloop.measure.endpoints import guard
from ggufloop.measure.journal import Journal
from ggufloop.measure.perplexity import chunk_at, tokenize
from ggufloop.measure.sweep_run import SweepPlan
from ggufloop.measure.verdict import HELPS, HURTS, SAME, UNSURE, judge_flips
from ggufloop.study import answer, answer_report
from ggufloop.study.answer import Finding, run_answer, seen, told_apart
from ggufloop.study.collection import collect

TinyModel = Callable[[str], Path]
LOOPS = [LoopSpec((a, a + 4), k=2) for a in range(1, 25, 2)]
PLAN = SweepPlan(tasks=("fake",), pooled=True)


class Quiz(FakeMeasure):
    """Questions, which a loop turns right or wrong now and then. gains: in accuracy."""

    name, item, unit, least = "quiz", "question", "accuracy", 30

    def value(self, name: str, item: int) -> float:
        plain = bool(np.random.default_rng([item, self.seed]).random() < 0.7)
        if name == PLAIN:
            return float(plain)
        turned = np.random.default_rng([item, self.seed, *name.encode()]).random()
        up, down = 0.03 + max(self.gains.get(name, 0.0), 0), 0.03 + max(-self.gains.get(name, 0.0), 0)
        return float(turned >= down / 0.7) if plain else float(turned < up / 0.3)

    seed = 0


Ask = Callable[..., Finding]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """run_answer of fake measures: the first file's, then one for each it is compared with."""

    def call(measures: Sequence[FakeMeasure], loops: Sequence[LoopSpec] = LOOPS, folder: str = "f",
             plan: SweepPlan = PLAN) -> Finding:  # fmt: skip
        files = [tmp_path / f"{name}.gguf" for name in "abcd"[: len(measures)]]
        for i, file in enumerate(files):
            file.write_bytes(bytes(2**20 * (i + 1)))
        of = dict(zip(files, measures, strict=True))

        @contextmanager
        def opened(path: Path, loops: Any, plan: Any, target: Path, *rest: Any) -> Iterator[Any]:
            with Journal.open(target, of[path].identity()) as journal:
                yield FakeEngine(), [of[path]], journal, {}

        monkeypatch.setattr(answer, "opened_sweep", opened)
        monkeypatch.setattr(answer, "describe", lambda path: SimpleNamespace(files=[path]))
        return run_answer(files[0], loops, plan, tmp_path / folder, against=files[1:])

    return call


def test_what_chooses_does_not_judge(ask: Ask) -> None:
    best = str(LOOPS[4])
    measure = FakeMeasure(240, {best: 0.05})
    found = ask([measure])
    assert str(found.loop) == best
    assert found.verdict.word == HELPS
    others = {i for name, i in measure.asked if name not in (PLAIN, best)}
    assert others
    assert not others & set(found.judging)
    assert len(found.judging) == 144
    mine = [measure.value(best, i) - measure.value(PLAIN, i) for i in found.judging]
    assert found.verdict.gain == paired_mean(np.array(mine))
    assert found.plain == pytest.approx(np.mean([measure.value(PLAIN, i) for i in found.judging]))


def test_the_same_again_computes_nothing(ask: Ask) -> None:
    first = ask([FakeMeasure(120, {str(LOOPS[4]): 0.05}), FakeMeasure(120)])
    again = [FakeMeasure(120, {str(LOOPS[4]): 0.05}), FakeMeasure(120)]
    second = ask(again)
    assert [m.asked for m in again] == [[], []]
    assert answer_report.paragraph(second) == answer_report.paragraph(first)
    assert (first.look, second.look) == (1, 1)
    other = ask([FakeMeasure(120)], plan=SweepPlan(tasks=("fake",), seed=2))
    assert other.look == 2
    assert "look 2 at these data" in answer_report.paragraph(other)


def test_a_stopped_run_goes_on(ask: Ask) -> None:
    whole = ask([FakeMeasure(120, {str(LOOPS[2]): 0.05})], folder="whole")
    for stop in (1, 60, 200):
        with pytest.raises(KeyboardInterrupt):
            ask([FakeMeasure(120, {str(LOOPS[2]): 0.05}, stop_after=stop)], folder=f"s{stop}")
        found = ask([FakeMeasure(120, {str(LOOPS[2]): 0.05})], folder=f"s{stop}")
        assert (found.loop, found.verdict) == (whole.loop, whole.verdict)


def test_no_item_changes_parts_and_a_text_is_cut_in_two() -> None:
    """The chunks before and behind one that judges say something of it: where they choose, the gain is too good."""
    text = FakeMeasure(240)
    text.places = [(0, int(i)) for i in np.random.default_rng(3).permutation(240)]
    for measure in (FakeMeasure(240), text):
        parts = [answer._parted(measure, n, 12, 1) for n in (20, 100, 101, 240)]
        for less, more in pairwise(parts):
            assert set(less.choosing) <= set(more.choosing)
            assert set(less.judging) <= set(more.judging)
        assert [len(p.choosing) for p in parts] == [8, 40, 40, 96]
        assert sorted(parts[-1].choosing + parts[-1].judging) == list(range(240))
    places = [text.places[i] for i in parts[-1].choosing + parts[-1].judging]
    assert places == sorted(places)


def test_stopped_while_timing_is_timed_alike(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items that were scored before the stop take no time after it, and are not what an item takes."""
    clock = [0.0]

    class Slow(FakeMeasure):
        def value(self, name: str, item: int) -> float:
            clock[0] += 1
            return super().value(name, item)

    monkeypatch.setattr("ggufloop.measure.sweep.time.perf_counter", lambda: clock[0])
    plan = SweepPlan(tasks=("fake",), budget="500s")
    whole = ask([Slow(1000)], LOOPS[:1], "whole", plan)
    with pytest.raises(KeyboardInterrupt):
        ask([Slow(1000, stop_after=2)], LOOPS[:1], "stopped", plan)
    assert ask([Slow(1000)], LOOPS[:1], "stopped", plan).used == whole.used == 234


def test_of_loops_without_effect_few_are_said_to_help(ask: Ask) -> None:
    """At most 5 % of 60 runs, and what a binomial allows on top; a loop that gains is found."""
    words = []
    for seed in range(60):
        quiz = Quiz(200)
        quiz.seed = seed
        words.append(ask([quiz], LOOPS[:6], f"q{seed}").verdict.word)
    assert sum(word in (HELPS, HURTS) for word in words) <= 7
    good = Quiz(1200, {str(LOOPS[3]): 0.10})
    found = ask([good], LOOPS[:6], "good")
    assert (str(found.loop), found.verdict.word) == (str(LOOPS[3]), HELPS)
    assert found.paired is not None
    assert found.paired.gained - found.paired.lost == round(found.verdict.gain.mean * len(found.judging))


def test_against_other_files_on_the_same_items(ask: Ask) -> None:
    best = str(LOOPS[4])
    mine, better, worse = (FakeMeasure(240, gains) for gains in ({best: 0.05}, {PLAIN: 0.2}, {PLAIN: -0.2}))
    found = ask([mine, better, worse])
    assert {i for _, i in better.asked} == set(found.judging)
    for other, measure, word in zip(found.others, (better, worse), (HURTS, HELPS), strict=True):
        looped = [mine.value(best, i) - measure.value(PLAIN, i) for i in found.judging]
        assert other.looped.gain == paired_mean(np.array(looped))
        assert other.looped.word == word
    said = answer_report.paragraph(found)
    assert "b without a loop is better than this file with it: -0.1" in said
    assert "This file with the loop is better than c without: +0.2" in said
    assert "1 MiB against 3" in said
    rows = list(csv.DictReader(answer_report.comparisons(found).render("csv").splitlines()))
    assert [(r["loop"], r["minus plain"], r["verdict"]) for r in rows] == [
        (best, "a", HELPS), (best, "b", "worse"), (PLAIN, "a", "better"), (best, "c", "better"),
        (PLAIN, "a", "worse"),
    ]  # fmt: skip
    columns = answer_report.items(found).render("csv").splitlines()
    assert columns[0] == f"item,plain,{best},b.gguf,c.gguf"
    assert len(columns) == 1 + len(found.judging)


@pytest.mark.parametrize(
    ("gain", "n", "word", "first", "last"),
    [
        (0.1, 240, HELPS, "Looping helps a on fake.", "Use it: --window 1:5 --K 2."),
        (-0.1, 240, HURTS, "Looping hurts a on fake.", "Leave the loop off here."),
        (0.0, 240, SAME, "none larger than 0.01 nats per token.", "Leave the loop off here."),
        (0.002, 20, UNSURE, "20 chunks cannot tell whether looping helps a on fake.", "Leave it off until then."),
    ],
)
def test_the_paragraph(ask: Ask, gain: float, n: int, word: str, first: str, last: str) -> None:
    found = ask([FakeMeasure(n, {str(LOOPS[0]): gain})], LOOPS[:1])
    said = answer_report.paragraph(found)
    assert (found.verdict.word, found.chosen) == (word, None)
    assert first in said
    assert said.endswith(last)
    assert f"{found.verdict.gain.mean:+.4f} nats [" in said
    assert "It evaluates 1.13 times the layers" in said


def test_what_is_said_of_a_chosen_loop_is_of_that_loop(ask: Ask) -> None:
    """That the one that was chosen hurts says nothing of the eleven others."""
    harm = {str(loop): -0.1 for loop in LOOPS}
    said = answer_report.paragraph(ask([FakeMeasure(240, harm)]))
    assert said.startswith("The loop that was chosen hurts a on fake.")


def test_nothing_is_left_to_go_on_with(ask: Ask) -> None:
    """All items were judged, which 80 % of the time are enough: no budget has more of them."""
    found = ask([FakeMeasure(20, {str(LOOPS[0]): 0.002})], LOOPS[:1])
    enough = replace(found, verdict=replace(found.verdict, needed=20))
    said = answer_report.paragraph(enough)
    assert "if there is an effect it is hardly larger: take a longer text. Leave it off until then." in said
    assert "with the 0 left" not in said


def test_a_model_at_chance_judges_no_loop(ask: Ask) -> None:
    found = ask([Quiz(1200, {str(LOOPS[3]): 0.10})], [LOOPS[3]])
    assert (found.paired is not None, found.verdict.word) == (True, HELPS)
    guessing = replace(found, paired=replace(found.paired, guard=guard([0, 1] * 50, [0] * 100, [2] * 100)))
    said = answer_report.paragraph(guessing)
    assert said.startswith("Whether looping helps a on quiz cannot be told: plain is not known to be above chance.")
    assert said.endswith("Leave the loop off, and ask a task that this model can answer.")
    assert "Use it" not in said
    assert answer_report.comparisons(guessing).rows[0][-1] == "at chance"


def test_a_later_look_says_its_level_everywhere(ask: Ask) -> None:
    ask([FakeMeasure(120)], LOOPS[:1])
    found = ask([FakeMeasure(120), FakeMeasure(120, {PLAIN: 0.01})], LOOPS[1:2])
    assert found.look == 2
    assert "tested at level 0.025: no confirmation." in answer_report.paragraph(found)
    assert "97.5 % intervals" in answer_report.markdown(found, None)
    assert {v.gain.level for o in found.others for v in (o.plain, o.looped)} == {0.975}


def test_a_budget_is_of_its_loops(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits one loop does not fit twelve."""
    clock = iter(range(10**9))
    monkeypatch.setattr("ggufloop.measure.sweep.time.perf_counter", lambda: next(clock))
    plan = SweepPlan(tasks=("fake",), budget="200s")
    assert ask([FakeMeasure(500)], LOOPS, plan=plan).used < ask([FakeMeasure(500)], LOOPS[:1], plan=plan).used
    assert ask([FakeMeasure(500)], LOOPS, "again", plan).used == ask([FakeMeasure(500)], LOOPS, plan=plan).used


def test_the_gain_that_would_have_been_found_is_found() -> None:
    """Of 48 answers six have to change for McNemar's test to say anything: 80 % of the time that takes 16 points."""
    rng = np.random.default_rng(1)
    for n, flips in ((48, 0), (120, 6), (1200, 60)):
        effect = seen(judge_flips(flips // 2, flips - flips // 2, n, 0.01), flips=flips)
        share = max(flips, 1) / n
        for gain, least, most in ((effect, 0.75, 0.86), (0.7 * effect, 0.0, 0.65)):
            of = max(share, gain)
            drawn = rng.multinomial(n, ((of + gain) / 2, (of - gain) / 2, 1 - of), size=300)
            power = np.mean([judge_flips(int(b), int(c), n, 0.01).word == HELPS for b, c, _ in drawn])
            assert least <= power <= most, (n, gain)


def test_files_of_one_name_are_told_apart() -> None:
    files = [Path("/m/a/x.Q4_0.gguf"), Path("/m/b/x.Q4_0.gguf"), Path("/m/b/y.gguf")]
    assert told_apart(files) == ["a/x.Q4_0", "b/x.Q4_0", "b/y"]
    assert told_apart(files[1:]) == ["x.Q4_0", "y"]
    assert told_apart([Path("/a/x.gguf"), Path("/b/q/x.gguf"), Path("/c/q/x.gguf")]) == ["a/x", "b/q/x", "c/q/x"]


def test_too_few_items_and_too_little_time(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GgufloopError, match=r"^fake has 9 chunks, too few to say anything of a loop\.$"):
        ask([FakeMeasure(9)])
    clock = iter(range(0, 10**9, 60))
    monkeypatch.setattr("ggufloop.measure.sweep.time.perf_counter", lambda: next(clock))
    with pytest.raises(UsageError, match=r"^75 questions of quiz take .*, and the budget is 60 s\.$"):
        ask([Quiz(1000)], folder="g", plan=SweepPlan(tasks=("fake",), budget="60s"))


# the command


def test_a_text_from_the_command_line(tiny_model: TinyModel, tmp_path: Path, cli: Cli) -> None:
    """The scores are what the logits of these chunks say."""
    pytest.importorskip("matplotlib")
    path, text = tiny_model("llama"), tmp_path / "t.txt"
    text.write_text("".join(f"Line {i} of a text that says {i * i}. " for i in range(120)), encoding="utf-8")
    words = [
        "answer",
        path,
        "--text",
        text,
        "-c",
        32,
        "--window",
        "1:3,2:4",
        "--K",
        2,
        "-t",
        1,
        "--out",
        tmp_path / "o",
    ]
    code, out, err = cli(*words)
    assert code == 0, err
    assert "chunks: " in err
    assert out.endswith(f"report: {tmp_path / 'o' / 'answer.md'}\n")
    assert max(map(len, out.splitlines()[:-1])) <= 100
    files = {p.name for p in (tmp_path / "o").iterdir() if not p.name.startswith(".")}
    assert files == {"answer.jsonl", "answer.md", "answer.csv", "loops.csv", "items.csv", "answer.png"}
    code, out, err = cli(*words, "-o", "json")
    assert code == 0
    found = json.loads(out)
    rows = list(csv.DictReader((tmp_path / "o" / "items.csv").read_text().splitlines()))
    assert len(rows) == found["n"]
    assert found["plain"] == pytest.approx(np.mean([float(r["plain"]) for r in rows]))
    assert found["paragraph"].split()[0] in (tmp_path / "o" / "answer.md").read_text()

    from ggufloop.engine import LoopedLlama
    from ggufloop.measure.corpus import local
    from ggufloop.measure.items import TextMeasure

    llm = LoopedLlama(path, n_ctx=32, n_batch=32, n_threads=1, n_threads_batch=1, flash_attn=True)
    tokens = tokenize(llm, text.read_text())
    places = TextMeasure(llm, local(str(text)), 32).places
    assert places is not None
    for row in rows:
        llm.reset()
        chunk = chunk_at(llm, tokens, 32, places[int(row["item"])][1])
        logits = llm.logits(chunk).astype(np.float64)[16:31]
        nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(15), chunk[17:]]
        assert float(row["plain"]) == pytest.approx(-nll.mean(), abs=1e-4)
    llm.close()


def test_questions_of_a_file(tiny_model: TinyModel, tmp_path: Path, cli: Cli) -> None:
    """A csv somebody has, and the same plain accuracy as eval's on the questions that judge."""
    lines = [f"What is {i} and {i}?,{2 * i},{i}.5,{2 * i + 9},A" for i in range(3, 27)]
    (mine := tmp_path / "mine.csv").write_text("\n".join(["question,A,B,C,answer", *lines]) + "\n")
    model = tiny_model("llama")
    code, out, err = cli("answer", model, "--task", mine, "--window", "2:4,1:3", "--K", 2, "-t", 1,
                         "--out", tmp_path / "o", "-o", "csv")  # fmt: skip
    assert code == 0, err
    (row,) = csv.DictReader(out.splitlines())
    assert (row["measure"], row["minus_plain"], row["n"]) == ("mine", model.stem, "15")
    assert (row["loop"], row["window"], row["k"]) in (("2:4 k=2", "2:4", "2"), ("1:3 k=2", "1:3", "2"))
    code, out, err = cli("eval", model, "--tasks", mine, "-t", 1, "--log-samples", tmp_path / "log")
    assert code == 0, err
    right = {s["doc_id"]: s["acc"] for s in map(json.loads, (tmp_path / "log").read_text().splitlines())}
    for item in csv.DictReader((tmp_path / "o" / "items.csv").read_text().splitlines()):
        assert float(item["plain"]) == right[int(item["item"])]


def test_results_leave_it_out(ask: Ask, tmp_path: Path) -> None:
    """Its journal holds the items that chose the loop too, and a gain over all of them would be too good."""
    ask([FakeMeasure(120), FakeMeasure(120)])
    assert len(list((tmp_path / "f").glob("answer*.jsonl"))) == 2
    assert collect(tmp_path).rows == []


def test_bad_input(tiny_model: TinyModel, tmp_path: Path, cli: Cli) -> None:
    path = tiny_model("llama")
    other = rewritten(path, tmp_path / "other.gguf", {"tokenizer.ggml.add_bos_token": True})
    text = ("--text", "pydoc", "--window", "2:4", "-t", 1, "-c", 32, "--out", tmp_path / "o")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((), "nothing to ask is given.\n"),
        (("--text", "pydoc", "--task", "mmlu_dev"), "a task and a text are two questions.\n"),
        ((*text, "--budget", "soon"), "--budget 'soon' is no time.\n"),
        ((*text, "--against", path), "a file is compared with itself.\n"),
        ((*text, "--against", tmp_path / "none.gguf"), f"model file {tmp_path / 'none.gguf'} does not exist.\n"),
        ((*text, "--budget", "0.001s"), ""),
    ]
    for words, message in cases:
        code, out, err = cli("answer", path, *words)
        assert (code in (1, 2), out) == (True, "")
        assert f"error: {message}" in err, err
    assert not (tmp_path / "o" / "answer.md").exists()
    code, _, err = cli("answer", path, *text, "--against", other)
    assert code == 1
    assert "other.gguf cuts the text into other tokens than " in err
