"""`ggufloop sweep`: what is scored, and how often; going on after a stop; the measures; the command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli import Cli
from support.sweeps import LAYERS, FakeEngine, FakeMeasure

from ggufloop.backend.capi import Refused
from ggufloop.backend.settings import ContextSettings
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.figures.sweep import heat_map
from ggufloop.loop import PLAIN, LoopSpec
from ggufloop.measure import sweep_report, sweep_run
from ggufloop.measure.corpus import Text, local
from ggufloop.measure.endpoints import noise_floor, nudged
from ggufloop.measure.items import UNUSABLE, TaskMeasure, TextMeasure
from ggufloop.measure.journal import Journal
from ggufloop.measure.perplexity import perplexity, tokenize
from ggufloop.measure.selection import HELPS, NONE_HELPS, NOT_ENOUGH, judge_all, planned_cost
from ggufloop.measure.sweep import CachedScores, Outcome, SweepFloor, check_record, items_within, registered, sweep
from ggufloop.measure.sweep_run import SweepPlan, SweepResult, run_sweep, save_winner, seconds
from ggufloop.models import registry
from ggufloop.progress import Step, silent

TinyModel = Callable[[str], Path]
WINDOWS = [LoopSpec((a, a + 4), k=2 + a % 2) for a in range(1, 26)]


def run(measure: FakeMeasure, path: Path, loops: Sequence[LoopSpec] = WINDOWS, **how: Any) -> Outcome:
    with Journal.open(path, measure.identity()) as journal:
        return sweep(FakeEngine(), loops, measure, journal, **how)  # type: ignore[arg-type]


def test_the_decision_is_that_of_the_scores(tmp_path: Path) -> None:
    best = str(WINDOWS[7])
    measure = FakeMeasure(240, {best: 0.03})
    outcome = run(measure, tmp_path / "j", seed=3)
    plain = [measure.value(PLAIN, i) for i in range(240)]
    (said,) = (r for r in Journal.lines(tmp_path / "j") if "said" in r)
    assert (said["said"], said["words"]) == (measure.name, outcome.words)  # for those who have no model
    assert [(c["loop"], c["gain"]) for c in said["loops"]] == [
        (c.name, c.gain.mean) for c in outcome.decision.loops]  # fmt: skip
    looped = {str(w): [measure.value(str(w), i) for i in range(240)] for w in WINDOWS}
    known = judge_all(plain, looped, seed=3, racing=False)
    assert outcome.decision.winner == known.winner == best
    assert outcome.decision.verdict == HELPS
    assert outcome.plain == pytest.approx(np.mean(plain))
    unraced = run(FakeMeasure(240, {best: 0.03}), tmp_path / "k", seed=3, racing=False)
    assert unraced.decision == known


@pytest.mark.parametrize(("racing", "most"), [(False, 35.0), (True, 10.0)])
def test_nothing_is_scored_twice_and_the_cost_is_bounded(tmp_path: Path, racing: bool, most: float) -> None:
    """25 windows cost at most 35 plain runs, under 10 raced; each by itself, with its plain run, over 50."""
    measure = FakeMeasure(400)
    outcome = run(measure, tmp_path / "j", racing=racing)
    assert len(set(measure.asked)) == len(measure.asked)
    assert sum(name == PLAIN for name, _ in measure.asked) == 400
    assert len(measure.asked) - 400 <= planned_cost(25, 400, racing=racing, least=8)
    costs = {PLAIN: 1.0} | {str(w): w.relative_cost(LAYERS) for w in WINDOWS}
    assert outcome.cost.spent == pytest.approx(sum(costs[name] for name, _ in measure.asked) / 400)
    assert outcome.cost.spent <= most
    assert outcome.cost.alone > 50


@pytest.mark.parametrize("stop", [0, 5, 130, 300, 500])
def test_a_stopped_sweep_goes_on(tmp_path: Path, stop: int) -> None:
    whole = run(FakeMeasure(120), tmp_path / "whole").decision
    stopped = FakeMeasure(120, stop_after=stop)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path / "j")
    rest = FakeMeasure(120)
    assert run(rest, tmp_path / "j").decision == whole
    assert not set(stopped.asked) & set(rest.asked)
    again = FakeMeasure(120)
    assert run(again, tmp_path / "j").decision == whole
    assert again.asked == []


def test_progress_ends_where_it_was_planned(tmp_path: Path) -> None:
    seen: list[Any] = []
    loops = [LoopSpec((a, a + 4), k=2) for a in range(1, 9)]  # all of one cost, so the plan is exact
    outcome = run(FakeMeasure(100), tmp_path / "j", loops, progress=seen.append)
    seen = [step for step in seen if step.total]
    assert seen[0].done == 0
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert outcome.cost.spent <= seen[-1].total + 1e-9
    assert seen[-1].done < seen[-1].total


def test_the_loop_in_force_comes_back(tmp_path: Path) -> None:
    engine, loop = FakeEngine(), LoopSpec((2, 3), k=5)
    engine.set_loop(loop)
    with Journal.open(tmp_path / "j", {}) as journal:
        sweep(engine, WINDOWS[:3], FakeMeasure(8), journal)  # type: ignore[arg-type]
    assert engine.loop == loop


@pytest.mark.parametrize(
    ("gains", "n", "what"),
    [
        ({str(WINDOWS[3]): 0.05}, 120, "helps: +0.0"),
        ({str(w): -0.1 for w in WINDOWS}, 120, "no window helps: each of 25 loops gains -0.0"),
        ({str(w): -0.1 for w in WINDOWS}, 120, "Worse than plain: 25 of 25."),
        ({}, 20, "not enough data to tell (20 chunks are under 30)."),
    ],
)
def test_verdicts_in_words(tmp_path: Path, gains: dict[str, float], n: int, what: str) -> None:
    outcome = run(FakeMeasure(n, gains), tmp_path / "j")
    assert what in outcome.words
    assert outcome.decision.verdict in (HELPS, NONE_HELPS, NOT_ENOUGH)
    assert len(outcome.decision.loops) == len(WINDOWS)


def test_every_loop_has_its_word(tmp_path: Path) -> None:
    """In the table and for programs, with the interval and p of all items it saw; no loop is left out."""
    gains = {str(WINDOWS[3]): 0.05, str(WINDOWS[4]): -0.05}
    outcome = run(FakeMeasure(240, gains), tmp_path / "j")
    costs = {str(w): w.relative_cost(LAYERS) for w in WINDOWS}
    found = SweepResult(Path("m.gguf"), tuple(WINDOWS), 0, {}, costs, (outcome,))
    loops = {c["name"]: c for c in sweep_report.record(found)["results"][0]["loops"]}
    rows = {row[1]: row for row in sweep_report.table(found).rows}
    assert set(loops) == set(rows) == set(costs)
    best, worst = loops[str(WINDOWS[3])], loops[str(WINDOWS[4])]
    assert (best["verdict"], best["whole"], best["n"], best["settled"]) == ("helps", True, 240, False)
    assert (worst["verdict"], worst["whole"], worst["settled"]) == ("hurts", False, True)
    assert best["low"] > 0 > worst["high"]
    assert best["p"] < 0.05
    assert rows[str(WINDOWS[3])][3:] == [240, best["gain"], best["low"], best["high"], best["p"], "no", "helps"]
    shown = sweep_report.text(found)
    assert "Intervals hold for all 25 loops together" in shown
    assert "n below 240: settled" in shown
    assert sum(line.startswith("| ") for line in shown.splitlines()) == 2 + 25
    alone = run(FakeMeasure(60), tmp_path / "k", WINDOWS[:1])
    assert "together" not in sweep_report.text(SweepResult(Path("m.gguf"), tuple(WINDOWS[:1]), 0, {}, costs, (alone,)))


def test_looks_are_counted(tmp_path: Path) -> None:
    """Ten seeds, or five growing n, are so many looks; the same command again is the same one."""
    loops = WINDOWS[:3]
    first = run(FakeMeasure(120), tmp_path / "j", loops, seed=1)
    again = run(FakeMeasure(120), tmp_path / "j", loops, seed=1)
    other = run(FakeMeasure(120), tmp_path / "j", loops, seed=2)
    assert [o.look for o in (first, again, other)] == [1, 1, 2]
    assert [o.decision.level for o in (first, again, other)] == pytest.approx([0.05, 0.05, 0.025])
    assert again.words == first.words
    assert other.words.endswith("Look 2 of 1 at these data, at level 0.025: not planned, so this is no confirmation.")
    planned = [run(FakeMeasure(n), tmp_path / "k", loops, looks=2) for n in (60, 120)]
    assert [o.decision.level for o in planned] == pytest.approx([0.00557, 0.04443], abs=1e-5)
    assert planned[1].words.endswith("Look 2 of 2 at these data, at level 0.044.")


def test_the_leading_loop_is_run_again(tmp_path: Path) -> None:
    """With its damping moved, on its own items; that costs nothing of the sweep's and is not a loop of it."""
    best, measure = WINDOWS[7], FakeMeasure(240, {str(WINDOWS[7]): 0.03})
    plain, outcome = (run(measure, tmp_path / name, seed=3, floor=name == "floor") for name in ("without", "floor"))
    assert (outcome.decision, outcome.cost.spent) == (plain.decision, plain.cost.spent)
    pairs = [[measure.value(str(each), i) for i in range(240)] for each in (best, nudged(best))]
    assert (plain.floor, outcome.floor) == (None, SweepFloor(str(best), noise_floor(*pairs)))
    costs = {str(loop): 1.0 for loop in WINDOWS}
    said = sweep_report.text(SweepResult(Path("m"), tuple(WINDOWS), 3, {}, costs, (outcome,)))
    mean = np.mean(np.subtract(pairs[1], pairs[0]))
    assert f"Noise floor: {best} differs from itself with its damping moved by 1e-05 by {mean:+.5f} [" in said
    assert "nats per token on average over 240 chunks" in said
    averages = [LoopSpec((a, a + 4), k=2, solver="average") for a in (1, 5)]
    assert run(FakeMeasure(30), tmp_path / "m", averages, floor=True).floor is None, "nothing to move"


def test_what_decides_is_registered() -> None:
    measure = FakeMeasure(9)
    said = registered([measure, measure], 0.01, 2)  # type: ignore[list-item]
    assert said == {"primary": "fake", "unit": "nats per token", "worth": 0.01, "level": 0.05, "looks": 2,
                    "secondary": ["fake"]}  # fmt: skip


def test_the_chances_are_told_before_the_rest_is_scored(tmp_path: Path) -> None:
    """Raced or not, once, from items that are asked for anyway; a power that grows with n."""
    found = []
    for n, racing in ((240, True), (240, False), (24_000, False)):
        told: list[tuple[str, int]] = []
        measure = FakeMeasure(n)
        loops = WINDOWS[: 25 if racing else 2]

        def progress(step: Step, told: list[tuple[str, int]] = told, measure: FakeMeasure = measure) -> None:
            if not step.total:
                told.append((step.text, len(measure.asked)))

        run(measure, tmp_path / f"{n} {racing}", loops, racing=racing, worth=0.002, progress=progress)
        assert len(set(measure.asked)) == len(measure.asked)
        ((said, scored),) = told
        assert scored - n < n * len(loops) / 2
        assert re.match(rf"note: fake: by a pilot of \d+, {n} chunks would show that a loop helps in ", said)
        found.append(int(re.search(r"helps in (\d+) % of runs if it gains 0.002,", said)[1]))  # type: ignore[index]
    assert found[0] < found[1] < found[2] == 100
    few: list[Step] = []
    run(FakeMeasure(20), tmp_path / "few", WINDOWS[:2], progress=few.append)
    assert all(step.total for step in few)


def test_too_few_items(tmp_path: Path) -> None:
    with pytest.raises(GgufloopError, match="3 chunks, too few"):
        run(FakeMeasure(3), tmp_path / "j")


def test_items_that_fit_a_budget() -> None:
    measure = FakeMeasure(5000)
    loops = WINDOWS
    mean = np.mean([loop.relative_cost(LAYERS) for loop in loops])
    for left in (1e3, 1e4):
        n = items_within(left, 0.5, loops, LAYERS, measure)  # type: ignore[arg-type]

        def took(n: int) -> float:
            return float(0.5 * (n + mean * planned_cost(25, n, least=8)))

        assert took(n) <= left < took(n + 60)
    with pytest.raises(UsageError, match=r"^16 chunks of fake take 2 min, and the budget is 60 s\.$"):
        items_within(60.0, 0.5, loops, LAYERS, measure)  # type: ignore[arg-type]
    assert items_within(1e9, 0.5, loops, LAYERS, measure) == 5000  # type: ignore[arg-type]


# measures


@pytest.fixture(scope="module")
def tiny_llm(tiny_model: TinyModel) -> Any:
    from ggufloop.engine import LoopedLlama

    llm = LoopedLlama(tiny_model("llama"), n_ctx=512, n_seq=8, n_threads=1, n_threads_batch=1, verbose=False)
    yield llm
    llm.close()


def test_chunks_are_those_of_perplexity(tiny_llm: Any) -> None:
    text = Text("t", "The quick brown fox jumps over the lazy dog. " * 20)
    measure = TextMeasure(tiny_llm, text, 64)
    n, loop = measure.n, LoopSpec((2, 5), k=2)
    try:
        for spec in (None, loop):
            tiny_llm.set_loop(spec)
            scores = measure.score(tiny_llm, range(n))
            known = perplexity(tiny_llm, tokenize(tiny_llm, text.text), 64, n)
            assert -np.mean(scores) == pytest.approx(known.model.nll, abs=1e-12)
            assert measure.score(tiny_llm, [3]) == [scores[3]]
            first = next(i for i, (_, chunk) in enumerate(measure.places) if chunk == 0)
            alone = perplexity(tiny_llm, tokenize(tiny_llm, text.text), 64, 1)
            assert -scores[first] == pytest.approx(alone.model.nll, abs=1e-12)
    finally:
        tiny_llm.set_loop(None)
    assert TextMeasure(tiny_llm, text, 64, limit=5).identity() == measure.identity()
    assert TextMeasure(tiny_llm, Text("t", text.text + "!"), 64).identity() != measure.identity()


def test_loops_of_a_chunk_share_its_plain_evaluation(tiny_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as each loop by itself; a loop that cannot begin in its window is evaluated whole."""
    measure = TextMeasure(tiny_llm, Text("t", "The quick brown fox jumps over the lazy dog. " * 20), 64)
    loops = [LoopSpec((2, 5), k=2), LoopSpec((1, 4), k=3, mode="layer"), LoopSpec((2, 5), k=2, kv="frozen")]
    begun: list[str] = []
    resumed = type(tiny_llm).resumed

    def noted(llm: Any, states: Any) -> Any:
        begun.append(str(llm.loop))
        return resumed(llm, states)

    monkeypatch.setattr(type(tiny_llm), "resumed", noted)
    found = measure.score_each(tiny_llm, {PLAIN: None, **{str(loop): loop for loop in loops}}, [3, 0])
    assert begun == [str(loop) for loop in loops] * 2
    assert all(seconds > 0 for _, seconds in found.values())
    try:
        for spec in (None, *loops):
            tiny_llm.set_loop(spec)
            assert found[PLAIN if spec is None else str(spec)][0] == measure.score(tiny_llm, [3, 0])
        tiny_llm.set_loop(None)
        with tiny_llm.recorded() as states:
            measure.score(tiny_llm, [0])
        with pytest.raises(UsageError, match="nothing can be resumed"), resumed(tiny_llm, states):
            pytest.fail("it is evaluated")
        tiny_llm.set_loop(LoopSpec((2, 5), k=2, kv="each"))
        with pytest.raises(Refused, match="only a loop with kv first"), resumed(tiny_llm, states):
            pytest.fail("it is evaluated")
    finally:
        tiny_llm.set_loop(None)


def test_chunks_are_drawn_from_all_texts(tiny_llm: Any) -> None:
    """So many of them, in an order that more of them go on with; not the first of the first."""
    texts = [Text(name, f"{name} says that the quick brown fox jumps. " * 40) for name in ("a", "b")]
    few, all_ = TextMeasure(tiny_llm, texts, 64, limit=10), TextMeasure(tiny_llm, texts, 64)
    assert (few.n, few.name) == (10, "a,b")
    assert list(few.places) == list(all_.places)[:10] != sorted(all_.places)[:10]
    assert sorted(all_.places) == [(d, i) for d in (0, 1) for i in range(all_.n // 2)]
    assert {document for document, _ in few.places} == {0, 1}


def test_logits_that_are_no_numbers_rank_last(monkeypatch: pytest.MonkeyPatch, tiny_llm: Any) -> None:
    from ggufloop.logits import Scores
    from ggufloop.measure import items as measures

    monkeypatch.setattr(measures, "score", lambda *args: Scores(np.array([np.nan, -1.0]), np.array([False, True])))
    measure = TextMeasure(tiny_llm, Text("t", "abcdefgh" * 20), 64)
    assert measure.score(tiny_llm, [0]) == [UNUSABLE]


def test_questions_are_those_of_eval(
    tiny_llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no repository, which lm-eval would have git say
    pytest.importorskip("lm_eval")
    from ggufloop.measure.tasks import evaluate
    from ggufloop.tasks.loading import load_tasks

    measure = TaskMeasure("brackets", load_tasks(["brackets"]), limit=12)
    assert measure.n == 12
    tiny_llm.set_loop(LoopSpec((2, 5), k=3))
    try:
        known = evaluate(tiny_llm, load_tasks(["brackets"]), limit=12).items["brackets"]
        assert [item.doc for item in known] == list(range(12))
        scores = measure.score(tiny_llm, [7, 2, 11])
    finally:
        tiny_llm.set_loop(None)
    assert "fatal" not in capfd.readouterr().err
    assert scores == [known[i].right for i in (7, 2, 11)]
    assert {item.right for item in known} == {0.0, 1.0}


def test_a_race_over_questions_is_ranked_by_their_answers(tiny_llm: Any, tmp_path: Path) -> None:
    """The journal keeps what questions offer; ranks are the choice log-probability at the temperature of plain."""
    pytest.importorskip("lm_eval")
    from ggufloop.measure.endpoints import choice_log_probability, fit_temperature
    from ggufloop.tasks.loading import load_tasks

    measure = TaskMeasure("brackets", load_tasks(["brackets"]), limit=12)
    loops = {str(loop): loop for loop in (LoopSpec((2, 5), k=2), LoopSpec((1, 4), k=3))}
    with Journal.open(tmp_path / "j", measure.identity(), partial(check_record, [measure])) as journal:
        scores = CachedScores(tiny_llm, measure, journal, silent, 3)
        scores.of_each(loops, range(8), "race")
        ranks = scores.choice_gains(list(loops), range(8))
    asked = {}
    for name, loop in ((PLAIN, None), *loops.items()):
        tiny_llm.set_loop(loop)
        asked[name] = measure.asked(tiny_llm, range(8))
    tiny_llm.set_loop(None)
    gold = [each.target for each in asked[PLAIN] if each.target is not None]
    t = fit_temperature([each.answers for each in asked[PLAIN]], gold)
    known = {name: choice_log_probability([e.answers for e in each], gold, t).mean() for name, each in asked.items()}
    assert ranks == pytest.approx({name: known[name] - known[PLAIN] for name in loops}, abs=1e-9)
    with Journal.open(tmp_path / "j", measure.identity(), partial(check_record, [measure])) as journal:
        again = CachedScores(tiny_llm, measure, journal, silent, 3)
        again.of_each(loops, range(8), "race")
        again.of(loops["2:5 k=2"], range(12), "judging")  # which have no part in it
        assert again.choice_gains(list(loops), range(8)) == ranks
        assert again.choice_gains(list(loops), range(9)) is None
    for odd, message in (
        ({"targets": [9]}, "answers to"),
        ({"answers": [[-1.0]], "targets": [1]}, "no question offers"),
    ):
        record = {"measure": "brackets", "loop": PLAIN, "items": [1], "scores": [1.0], "seconds": 0.1, **odd}
        with pytest.raises(ValueError, match=message):
            check_record([measure], record)


# flags


def test_times() -> None:
    assert [seconds(t) for t in ("90s", "30m", "1.5h", "2")] == [90, 1800, 5400, 120]
    for text in ("0", "m", "1d", "-3m"):
        with pytest.raises(UsageError):
            seconds(text)


# the command


def test_the_command_goes_on_from_its_journal(tiny_model: TinyModel, tmp_path: Path, cli: Cli) -> None:
    path, text, journal = tiny_model("llama"), tmp_path / "t.txt", tmp_path / "s.jsonl"
    text.write_text("".join(f"Line {i} of a text that says {i * i}. " for i in range(200)), encoding="utf-8")
    args = (str(path), "--start", "2:4", "--width", "1,2", "--K", "1,2", "--text", str(text), "--chunks", "70",
            "-t", "1", "-c", "32", "--journal", str(journal))  # fmt: skip
    code, out, err = cli("sweep", *args)
    assert code == 0, err
    assert "4 loops against plain" in out
    assert "Verdict: " in out
    assert "by a pilot of 28, 70 chunks would show that" in err
    head = Journal.header(journal)
    assert head is not None
    assert [head[name] for name in ("primary", "worth", "level", "looks", "secondary")] == [
        str(text),
        0.01,
        0.05,
        1,
        [],
    ]
    lines = journal.read_text(encoding="utf-8").splitlines()
    code, out, err = cli("sweep", *args, "-o", "json", "--plot", str(tmp_path / "p.png"))
    assert code == 0, err
    assert journal.read_text(encoding="utf-8").splitlines() == lines
    data = json.loads(out)
    result = data["results"][0]
    assert result["n"] == 70
    assert result["verdict"] in (HELPS, NONE_HELPS, NOT_ENOUGH)
    assert {loop["name"] for loop in result["loops"]} == set(data["loops"])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = cli("sweep", *args[:-4], "-c", "64", *args[-2:])
    assert code == 1
    assert "is of another run: measures is" in err
    code, out, err = cli("sweep", *args, "--worth", "0.02", "--looks", "2")
    assert "is of another run: worth is 0.01 there and 0.02 here; looks is 1 there and 2 here." in err
    code, out, err = cli("sweep", *args, "-ctk", "q8_0", "--save")
    assert "is of another run: settings is" in err


def test_from_python_as_from_the_command_line(tiny_model: TinyModel, tmp_path: Path, cli: Cli) -> None:
    path = tiny_model("llama")
    code, out, err = cli(
        "sweep", str(path), "--window", "2:4,3:5", "--K", "2", "--text", "pydoc", "-c", "16", "--chunks", "8", "-t",
        "1", "-o", "json", "--journal", str(tmp_path / "by-command"))  # fmt: skip
    assert code == 0, err
    plan = SweepPlan(text=local("pydoc"), chunk=16, chunks=8)
    loops = [LoopSpec((2, 4), 2), LoopSpec((3, 5), 2)]
    settings = ContextSettings(n_ctx=plan.context, n_threads=1)
    found = run_sweep(path, loops, plan, tmp_path / "by-call", settings)
    asked = json.loads(out)
    assert sweep_report.record(found)["results"][0]["plain"] == asked["results"][0]["plain"]
    assert [f["gain"] for f in sweep_report.record(found)["results"][0]["loops"]] == [
        f["gain"] for f in asked["results"][0]["loops"]]  # fmt: skip
    heads = [(tmp_path / name).read_text().splitlines()[0] for name in ("by-command", "by-call")]
    assert heads[0] == heads[1]


def test_a_budget_is_kept_when_going_on(
    tiny_model: TinyModel, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a machine that has become slower; one that is too small is refused before anything is scored."""
    monkeypatch.setattr(sweep_run, "_per_item", lambda llm, measure: 0.01)
    args = (str(tiny_model("llama")), "--window", "2:4", "--K", "2", "--text", "pydoc", "-c", "16", "-t", "1",
            "-o", "json", "--budget", "1s", "--journal")  # fmt: skip
    code, out, err = cli("sweep", *args, tmp_path / "j")
    assert code == 0, err
    n = json.loads(out)["results"][0]["n"]
    assert n == int(1 / 0.01 / (1 + LoopSpec((2, 4), 2).relative_cost(7)))
    lines = (tmp_path / "j").read_bytes()
    monkeypatch.setattr(sweep_run, "_per_item", lambda llm, measure: 1.0)
    assert json.loads(cli("sweep", *args, tmp_path / "j")[1])["results"][0]["n"] == n
    assert (tmp_path / "j").read_bytes() == lines
    code, out, err = cli("sweep", *args, tmp_path / "k")
    assert (code, out) == (2, "")
    assert "16 chunks of pydoc take 37 s, and the budget is 1 s." in err
    assert len((tmp_path / "k").read_text().splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/meminfo")
@pytest.mark.parametrize("words", [["run", "-p", "x", "-n", "1"], ["chat"], ["sweep", "--text", "pydoc"]])
def test_a_context_that_does_not_fit(
    words: list[str], tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
) -> None:  # fmt: skip
    """Asked for, it would end the process, not raise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    done = cli(*words, tiny_model("llama"), "-c", "2000000000")
    assert done.code == 1
    assert "2000000000 tokens" in done.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--K", "2"), "nothing to measure"),
        (("--text", "pydoc", "--K", "1"), "one evaluation, the plain model"),
        (("--text", "pydoc", "--window", "2:4", "--start", "2"), "given twice"),
        (("--text", "pydoc", "--window", "2:40"), "2:40"),
        (("--text", "pydoc", "--budget", "soon"), "no time"),
        (("--text", "pydoc", "--K", "2:2"), "holds no number"),
        (("--text", "pydoc", "--solver", "eulr"), "did you mean euler"),
        (("--tasks", "bracket", "--K", "2"), "did you mean"),
        (("--text", "no such file"), "cannot read"),
        (("--text", "pydoc", "-o", "xml"), "output form"),
        (("--text", "pydoc", "--plot", "x.doc"), "doc"),
        (("--text", "pydoc", "--worth", "0", "--chunks", "4", "-c", "8", "--start", "2"), "worth 0"),
    ],
)
def test_bad_input(
    args: tuple[str, ...],
    message: str,
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("sweep", str(tiny_model("llama")), "-t", "1", *args)
    assert code in (1, 2)
    assert message in err
    assert len(err.strip().splitlines()) <= 3
    assert out == ""


def test_combinations_that_are_no_loop_are_left_out(tiny_model: TinyModel, tmp_path: Path, cli: Cli) -> None:
    code, out, err = cli(
        "sweep", str(tiny_model("llama")), "--start", "2", "--width", "2", "--K", "2", "--solver", "naive,repeat",
        "--kv", "first,each", "--text", "pydoc", "-c", "16", "--chunks", "8", "-t", "1", "-o", "csv",
        "--journal", str(tmp_path / "j"))  # fmt: skip
    assert code == 0, err
    assert "1 of 4 combinations are no loop of this model" in err
    assert sorted(line.split(",")[3] for line in out.splitlines()[1:]) == [
        "2:4 k=2 solver=naive", "2:4 k=2 solver=naive kv=each", "2:4 k=2 solver=repeat"]  # fmt: skip


def test_only_what_was_confirmed_is_saved(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "models.toml"
    monkeypatch.setenv("GGUFLOOP_MODELS", str(own))
    path, loops = tiny_model("llama"), [LoopSpec((a, a + 1), k=2) for a in range(1, 5)]
    best = str(loops[1])
    null, good = (
        run(FakeMeasure(120, gains), tmp_path / name, loops) for name, gains in (("a", {}), ("b", {best: 0.1}))
    )
    bad = run(FakeMeasure(120, {str(loop): -0.1 for loop in loops}), tmp_path / "c", loops)
    assert save_winner(path, loops, [null]) == "no loop was shown to help, so none is saved."
    assert not own.exists()
    with pytest.raises(GgufloopError, match="helps on fake and hurts on fake"):
        save_winner(path, loops, [good, bad])
    assert not own.exists()
    save_winner(path, loops, [null, good])
    saved = registry.saved_loop(path)
    assert saved is not None
    assert (saved.loop, saved.applies) == (loops[1], True)
    assert registry.suggest_window(path)[1].startswith("sweep of 20")


# the figure


def test_heat_map(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    loops = [LoopSpec((a, a + w), k=k) for a in (4, 8, 12) for w in (1, 2) for k in (2, 3)]
    measure = FakeMeasure(120, {str(loops[0]): 0.05})
    outcome = run(measure, tmp_path / "j", loops)
    figure = heat_map(outcome, loops, "m")
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert [t for t in titles if t] == ["K = 2", "K = 3"]
    first = figure.axes[0]
    assert len(first.texts) == 6
    assert sum("\u2605" in text.get_text() for text in first.texts) == 1
    best = outcome.decision.loops[0]
    assert first.images[0].get_array()[0, 0] == pytest.approx(1000 * best.gain.mean)
    assert best.name == str(loops[0])
    title = " ".join(figure.get_suptitle().split())
    assert title.startswith(f"m, fake: {best.name} helps, {1000 * best.gain.mean:+.1f} [{1000 * best.gain.low:+.1f}, ")
    assert title.endswith("] thousandths of a nat per token, n = 120 chunks")
    assert {ax.images[0].get_clim() for ax in figure.axes if ax.images} == {(-30, 30)}  # of worth, not of the noise
    fine = run(measure, tmp_path / "j", loops, worth=0.001)
    error = 500 * (fine.decision.loops[0].gain.high - fine.decision.loops[0].gain.low)
    assert error > 3
    assert heat_map(fine, loops, "m").axes[0].images[0].get_clim() == pytest.approx((-error, error))
    one = run(FakeMeasure(60), tmp_path / "k", loops[:1])
    assert len(heat_map(one, loops[:1], "m").axes) == 2  # a cell and the colour bar
    tall = [LoopSpec((a, a + 2), k=k) for a in (4, 8) for k in (2, 3)]
    (panel, _) = heat_map(run(FakeMeasure(60), tmp_path / "l", tall), tall, "m").axes
    assert (panel.get_title(loc="left"), panel.get_ylabel()) == ("windows of 2 layers", "K")
