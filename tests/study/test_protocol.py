"""Protocols: what a file may say, a whole small one run and stopped, and what its scores say against tests by hand."""

from __future__ import annotations

import json
import lzma
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.stats import binomtest
from support import ROOT

from ggufloop.engine import ACTIVE, LoopedLlama
from ggufloop.errors import GgufloopError
from ggufloop.measure import slices
from ggufloop.measure.verdict import ACCURACY, NATS, RECALL
from ggufloop.models import registry
from ggufloop.study import file as studies
from ggufloop.study import protocol_report
from ggufloop.study.protocol import read_protocol
from ggufloop.study.protocol_run import plan_step
from ggufloop.study.scores import Score, joined, read, write

if TYPE_CHECKING:
    from support.cli import Cli

SMALL = """
[loops]
recipe = "k=3 beta=0.5"
naive = "k=2 solver=naive"
[roles]
primary = ["recipe"]
control = ["naive"]
[[step]]
name = "questions"
tasks = ["brackets"]
sample = 12
[[step]]
name = "other"
tasks = ["mmlu_dev"]
models = ["smollm2-135m"]
[[step]]
name = "text"
texts = ["pydoc"]
chunks = 4
ctx-size = 64
models = ["tiny"]
"""


def test_the_protocol_of_the_docs_is_one() -> None:
    protocol = read_protocol(ROOT / "docs" / "protocol.toml")
    assert len(protocol.loops) == 8
    text = (ROOT / "docs" / "protocol.md").read_text()
    for model in ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "smollm2-135m", "gemma-3-270m"):
        assert registry.find(model) is not None
        steps = protocol.steps_for(model)
        assert 0 < len(steps) < len(protocol.steps)
        assert all(task in text for step in steps for task in (*step.tasks, *step.texts))
    assert protocol.steps_for("mine") == list(protocol.steps)
    planned = protocol.planned({"gemma-3-270m-q4_k_m.gguf", "mine.gguf"})
    assert len(planned) == 5  # who measures one model more asks no less of the four
    assert planned["gemma-3-270m-q4_k_m.gguf"] == {"arc_easy", "piqa", "sciq"}
    assert planned["SmolLM2-135M-Instruct.Q4_1.gguf"] == {"arc_easy", "piqa", "sciq", "openbookqa"}
    assert "mmlu (6000)" in planned["qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"]
    assert "mmlu (3000)" not in planned["qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"]  # of no primary loop
    assert protocol.planned({"mine.gguf"}).keys() == {"mine.gguf"}
    for settings in protocol.loops.values():
        assert f"W {settings}" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[loops]", "[loop]"), "has no 'loops'"),
        (("k=3 beta=0.5", "k=3 beta=5"), "loop recipe: beta 5 is not a number in the range"),
        (("sample = 12", "lengths = [1024]"), "step questions: lengths go with ruler, and types with texts"),
        (('tasks = ["brackets"]', 'ruler = ["vtt"]\nlengths = [1024]'), "step questions: task 'vtt' is not one"),
        (('texts = ["pydoc"]', 'texts = ["pydoc"]\ntypes = ["Q99"]'), "step text: "),
        (("sample = 12", 'loops = ["k=0"]'), "step questions: "),
        (('primary = ["recipe"]', 'primary = ["recipes"]'), "roles: 'recipes' is no loop or role"),
        (("sample = 12", 'sample = "12"'), "sample is '12', not"),
        (("sample = 12", "samples = 12"), "'samples' is no field of it"),
        (("sample = 12", "sample = 0"), "step questions: sample, chunks, ctx-size and lengths are counts"),
        (("sample = 12", 'loops = ["recipes"]'), "step questions: no loop is called 'recipes'"),
        (("sample = 12", 'window = "3:2"'), "step questions: window 3:2"),
        (('tasks = ["brackets"]', ""), "step questions: it has tasks, texts or ruler, one of them"),
        (("[roles]", "[role]"), "'role' is nothing a protocol has"),
        (("[[step]]", "[[step"), "protocol.toml: "),
    ],
)  # fmt: skip
def test_what_is_no_protocol(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "protocol.toml"
    path.write_text(SMALL.replace(*change, 1))
    with pytest.raises(GgufloopError) as e:
        read_protocol(path)
    assert message in e.value.message
    assert "\n" not in e.value.message


def test_steps_without_the_loops_that_are_named_are_left_out(
    cli: Cli, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nor planned: a sweep of no loops is none."""
    protocol = tmp_path / "p.toml"
    protocol.write_text(SMALL.replace('texts = ["pydoc"]', 'texts = ["pydoc"]\nloops = ["naive"]'))
    words = ["study", "run", protocol, "--model", tiny_model("llama"), "--out", tmp_path / "out", "-t", "1"]
    wrong = cli(*words, "--steps", "text", "--loops", "recipe")
    assert (wrong.code, wrong.err.splitlines()[0]) == (2, "error: none of these steps has recipe.")
    words += ["--plan", "--tokens-per-second", "1000"]
    plan = cli(*words, "--steps", "questions,text", "--loops", "recipe")
    assert [line.split()[0] for line in plan.out.splitlines()] == ["questions", "llama.gguf:"]


def test_a_protocol_from_the_first_step_to_the_verdict(
    cli: Cli, tiny_model: Callable[[str], Path], tmp_path: Path, own_cache: Path
) -> None:
    assert ACTIVE.patch_id  # loaded before this test's cache, which has no library
    protocol, out = tmp_path / "p.toml", tmp_path / "out"
    protocol.write_text(SMALL.replace('models = ["smollm2-135m"]', 'models = ["gemma-3-270m"]'))
    words = ["study", "run", protocol, "--model", tiny_model("llama"), "--out", out, "-t", "1", "--no-try"]
    plan = cli(*words, "--plan", "--tokens-per-second", "1000")
    assert plan.code == 0
    assert "questions" in plan.out
    assert not out.exists()
    assert cli(*words, "--steps", "questions", "--loops", "recipe").code == 0
    assert {s.loop for s in read(out / "llama.csv.xz")} == {"plain", "recipe"}
    wrong = cli(*words, "--loops", "recipy")
    assert (wrong.code, wrong.err.splitlines()[0]) == (2, "error: no loop 'recipy' is in this protocol.")
    ran = cli(*words, "--steps", "questions,text")
    assert ran.code == 0, ran.err
    scores = read(out / "llama.csv.xz")
    loops = {(s.measure, s.loop) for s in scores}
    assert loops == {("brackets", "plain"), ("brackets", "recipe"), ("brackets", "naive"), ("brackets", "nudged"),
                     ("brackets", "placebo"), ("pydoc", "plain"), ("pydoc", "recipe"), ("pydoc", "naive")}  # fmt: skip
    assert {(m, sum(s.measure == m and s.loop == "plain" for s in scores)) for m in ("brackets", "pydoc")} == {
        ("brackets", 12), ("pydoc", 4)
    }  # fmt: skip
    again = cli(*words, "--steps", "questions,text")
    assert again.out == ran.out
    report = cli("study", "report", protocol, out / "llama.csv.xz", "--plot", tmp_path / "forest.svg")
    assert report.out == ran.out
    assert (tmp_path / "forest.svg").stat().st_size > 1000
    rows = json.loads(cli("study", "report", protocol, out / "llama.csv.xz", "-o", "json").out)
    assert {row["role"] for row in rows} == {"primary", "control", "placebo"}
    wrong = cli(*words, "--steps", "text,texts")
    assert (wrong.code, wrong.err.splitlines()[0]) == (2, "error: no step 'texts' is for this model.")
    assert "plain tokens per second, timed here" in cli(*words, "--plan", "--steps", "text").out
    assert cli("study", "report", protocol, protocol).err.startswith(f"error: {protocol} holds no scores")


def test_shards_and_workers_of_a_protocol_are_one_run(
    cli: Cli, tiny_model: Callable[[str], Path], tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, of questions and texts; what shards have left is not computed again."""
    monkeypatch.setattr(slices, "SCORED", 4)
    assert ACTIVE.patch_id  # loaded before this test's cache, which has no library
    protocol = tmp_path / "p.toml"
    protocol.write_text(SMALL)
    words = ["study", "run", protocol, "--model", tiny_model("llama"), "-t", "1", "--no-try", "--steps",
             "questions,text"]  # fmt: skip
    alone = cli(*words, "--out", tmp_path / "one")
    assert alone.code == 0, alone.err
    for i in (1, 2):
        part = cli(*words, "--out", tmp_path / "two", "--shard", f"{i}/2")
        assert (part.code, part.out) == (0, ""), part
        assert f"questions: shard {i}/2 is done." in part.err
        assert not (tmp_path / "two" / "llama.csv.xz").exists()
    with monkeypatch.context() as patch:
        patch.setattr(LoopedLlama, "eval", None)  # neither asks the model anything
        patch.setattr(LoopedLlama, "logits", None)
        together = cli(*words, "--out", tmp_path / "two")
    assert (together.code, together.out) == (0, alone.out), together.err
    assert (tmp_path / "two" / "llama.csv.xz").read_bytes() == (tmp_path / "one" / "llama.csv.xz").read_bytes()
    monkeypatch.setattr(slices, "SCORED", 64)  # as other processes have it
    monkeypatch.setenv("GGUFLOOP_LIB_DIR", str(ACTIVE.directory))
    alone = cli(*words, "--out", tmp_path / "whole")
    workers = cli(*words, "--out", tmp_path / "three", "--workers", "2")
    assert (workers.code, workers.out) == (0, alone.out), workers.err


def test_ladders_and_long_contexts_are_steps(
    cli: Cli, tiny_model: Callable[[str], Path], tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as its own command measures it, shards or none; loops may be settings of the step's own."""
    assert ACTIVE.patch_id  # loaded before this test's cache, which has no library
    monkeypatch.setenv("GGUFLOOP_LIB_DIR", str(ACTIVE.directory))
    protocol, out = tmp_path / "p.toml", tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 60)
    protocol.write_text(f"""
[loops]
recipe = "k=3 beta=0.5"
[[step]]
name = "ladder"
texts = [{str(text)!r}]
types = ["Q8_0", "Q4_0"]
chunks = 8
ctx-size = 64
[[step]]
name = "long"
ruler = ["vt", "niah_single_1"]
lengths = [2600]
sample = 2
loops = ["recipe", "k=2"]
""")
    model = tiny_model("llama")
    words = ["study", "run", protocol, "--model", model, "-t", "1", "--no-try"]
    plan = cli(*words, "--plan", "--tokens-per-second", "1000")
    assert [line.split()[:4:3] for line in plan.out.splitlines()[:2]] == [["ladder", "0.00"], ["long", "0.03"]]
    assert [line.split()[1] for line in plan.out.splitlines()[:2]] == ["48", "12"]  # 8 chunks of 3 files, 4 samples
    alone = cli(*words, "--out", out)
    assert alone.code == 0, alone.err
    found = read(out / "llama.csv.xz")
    measures = {(s.measure.split("/")[-1], s.loop, s.unit) for s in found}
    assert measures == {
        *((f"text.txt {type_}", loop, NATS) for type_ in ("F32", "Q8_0", "Q4_0") for loop in ("plain", "recipe")),
        *(("ruler 2600", loop, RECALL) for loop in ("plain", "recipe", "k=2")),
    }
    rows = json.loads(cli("study", "report", protocol, out / "llama.csv.xz", "-o", "json").out)
    assert {row["verdict"] for row in rows if row["measure"].startswith("ruler")} == {"at the floor"}
    (study,) = (out / "ladder").rglob("study.jsonl")
    assert "recipe" not in (study.parent / "table.md").read_text()  # as compare has it: by settings
    assert str(study.parent / "report.html") in alone.err
    cell = studies.read(study).cell("Q4_0", "1:5 k=3 beta=0.5")
    mine = {s.item: s.value for s in found if s.measure.endswith("Q4_0") and s.loop == "recipe"}
    assert mine == {f"0 {c.index}": pytest.approx(-c.nll, rel=1e-5) for c in cell.chunks}
    for i in (1, 2):
        threads = [*words[:-2], str(i), "--no-try"]  # a machine of its own
        assert cli(*threads, "--out", tmp_path / "two", "--shard", f"{i}/2").code == 0
    together = cli(*words, "--out", tmp_path / "two")
    assert (together.code, together.out) == (0, alone.out), together.err
    words += ["--steps", "ladder", "--out", tmp_path / "half"]
    assert cli(*words, "--shard", "2/3").code == 0
    assert cli(*words).code == 0  # computes what is missing
    half = {s.key: s.value for s in read(tmp_path / "half" / "llama.csv.xz")}
    assert half == {s.key: s.value for s in found if s.unit == NATS}


def test_two_samples_of_a_task_are_two_measures(
    cli: Cli, tiny_model: Callable[[str], Path], tmp_path: Path, own_cache: Path
) -> None:
    """As of mmlu, where more is asked of the primary loops: neither step's scores take the place of the other's."""
    assert ACTIVE.patch_id
    protocol, out = tmp_path / "p.toml", tmp_path / "out"
    step = '[[step]]\nname = "{}"\ntasks = ["brackets"]\nsample = {}\nloops = ["{}"]\n'
    loops = '[loops]\nrecipe = "k=3 beta=0.5"\nnaive = "k=2 solver=naive"\n'
    protocol.write_text(loops + step.format("many", 12, "recipe") + step.format("few", 6, "naive"))
    words = ["study", "run", protocol, "--model", tiny_model("llama"), "-t", "1", "--no-try", "--out", out]
    for steps in ("many,few", "many"):
        ran = cli(*words, "--steps", steps)
        assert ran.code == 0, ran.err
        assert "left out" not in ran.err
        counts = Counter((s.measure, s.loop) for s in read(out / "llama.csv.xz"))
        assert counts == {
            ("brackets (12)", "plain"): 12, ("brackets (12)", "recipe"): 12, ("brackets (12)", "placebo"): 12,
            ("brackets (6)", "plain"): 6, ("brackets (6)", "naive"): 6, ("brackets (6)", "placebo"): 6,
        }  # fmt: skip


def test_the_word_of_a_primary_loop_is_by_its_corrected_p() -> None:
    """p = .02 is no "helps" where eight were registered."""
    scores = [*made("a", "one", 1000, 20, 7), *made("a", "two", 1000, 0, 0)]
    roles = {"recipe": "primary"}
    found = {n: protocol_report.judged(scores, roles, (), {f"{i}": () for i in range(n)})[-1] for n in (0, 8)}
    raw = binomtest(7, 27).pvalue
    assert (found[0].p, found[0].word) == (pytest.approx(raw), "helps")
    assert found[8].p == pytest.approx(8 * raw)
    assert found[8].verdict.word != "helps"
    registered = {"a": {"one"}} | {f"{i}": set() for i in range(7)}
    first = scores[: len(scores) // 2]  # of one task, which has a row
    alone, pooled = protocol_report.judged(first, roles, (), registered)
    assert (alone.measure, pooled.measure) == ("one", "all")
    assert (alone.p, alone.word) == (pooled.p, pooled.word)
    assert not alone.word.startswith("helps")


def test_a_pooled_row_has_no_word_before_all_of_it_is_there() -> None:
    """Neither that of a model that lacks a task, nor that of all models, where one lacks it or was not measured."""
    scores = [*made("a.gguf", "one", 1000, 90, 7), *made("a.gguf", "two", 1000, 90, 7),
              *made("b.gguf", "one", 1000, 90, 7), *made("b.gguf", "guess", 200, 1, 0, right=0.25)]  # fmt: skip
    planned = {"a.gguf": {"one", "two"}, "b.gguf": {"one", "guess"}}
    roles = {"recipe": "primary"}

    def words(planned: dict[str, set[str]]) -> dict[str, str]:
        return {r.model: r.word for r in protocol_report.judged(scores, roles, (), planned) if r.measure == "all"}

    assert words(planned) == {"a.gguf": "helps", "b.gguf": "helps", "all": "helps"}  # what is at chance is there
    assert words(planned | {"b.gguf": {"one", "guess", "more"}}) == {
        "a.gguf": "helps", "b.gguf": "not complete: lacks more", "all": "not complete: lacks b",
    }  # fmt: skip
    assert words(planned | {"c.gguf": {"one"}})["all"] == "not complete: lacks c"
    part = next(s for s in scores if (s.model, s.measure, s.loop) == ("a.gguf", "two", "recipe"))
    scores.remove(part)  # plain has a question more
    assert words(planned) == {"a.gguf": "not complete: lacks two", "b.gguf": "helps", "all": "not complete: lacks a"}


def test_few_samples_rule_out_no_rare_change() -> None:
    """One of 120 changed by a fifth: that is not known to be less than a point."""
    scores = [Score("a", "ruler 1024", RECALL, loop, "x", f"cwe {i}", 0.5 - 0.2 * (loop == "recipe" and i == 0))
              for i in range(120) for loop in ("plain", "recipe")]  # fmt: skip
    (row,) = protocol_report.judged(scores, {"recipe": "primary"})
    assert row.verdict.word == "cannot tell"
    assert row.gain.low < -0.02
    assert row.gain.high > 0.02


def test_a_length_at_which_plain_finds_nothing_judges_no_loop() -> None:
    scores = [Score("a", f"ruler {length}", RECALL, loop, "x", f"vt {i}", value)
              for i in range(20)
              for length, loop, value in ((1024, "plain", 0.5), (1024, "recipe", 0.5 + 0.1 * (i % 2)),
                                          (4096, "plain", 0.0), (4096, "recipe", 1.0))]  # fmt: skip
    words = {row.measure: row.word for row in protocol_report.judged(scores, {"recipe": "primary"})}
    assert words == {"ruler 1024": "helps", "ruler 4096": "at the floor"}


def test_a_loop_of_an_earlier_run_is_not_taken_for_plain(
    cli: Cli, tiny_model: Callable[[str], Path], tmp_path: Path, own_cache: Path
) -> None:
    """Its scores are in the journal of the text when another loop is asked for."""
    assert ACTIVE.patch_id
    protocol, out = tmp_path / "p.toml", tmp_path / "out"
    protocol.write_text(SMALL)
    words = ["study", "run", protocol, "--model", tiny_model("llama"), "-t", "1", "--no-try", "--steps", "text"]
    cli(*words, "--out", out, "--loops", "naive")
    ran = cli(*words, "--out", out, "--loops", "recipe")
    alone = cli(*words, "--out", tmp_path / "alone", "--loops", "recipe")
    assert (ran.code, alone.code) == (0, 0)
    plain = [[s for s in read(folder / "llama.csv.xz") if s.loop == "plain"] for folder in (out, tmp_path / "alone")]
    assert [(s.item, s.value) for s in plain[0]] == [(s.item, s.value) for s in plain[1]]


def test_loops_are_not_compared_with_plain_answers_of_another_machine() -> None:
    """A later run of one loop brings its own plain answers; a loop that was measured beside others is left out."""
    old = [*made("a", "one", 20, 3, 1), *made("a", "two", 20, 3, 1)]
    other = [replace(s, loop="layer") for s in old if s.loop == "recipe"]
    same, gone = joined([*old, *other], [s for s in old if s.measure == "one"])
    assert (len(same), gone) == (len(old) + len(other), [])
    plain, *_ = [replace(s, choice=s.choice - 1e-3) for s in old]
    here = [plain, *(s for s in old[1:] if s.measure == "one")]
    left, gone = joined([*old, *other], here)
    assert gone == ["one: layer"]
    assert {(s.measure, s.loop) for s in left} == {("one", "plain"), ("one", "recipe"), ("two", "plain"),
                                                   ("two", "recipe"), ("two", "layer")}  # fmt: skip
    assert plain in left


def test_plan_counts_plain_once(tiny_model: Callable[[str], Path], tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(SMALL)
    protocol = read_protocol(path)
    planned = plan_step(tiny_model("llama"), protocol, protocol.steps[0], speed=100.0)
    cells = [cell.loop for each in planned for cell in each.cells]
    assert cells.count("plain") == cells.count("placebo") == 1
    assert len(cells) == 5  # and the recipe, its neighbour and naive
    few = plan_step(tiny_model("llama"), protocol, protocol.steps[0], speed=100.0, part=True)
    assert sorted(cell.loop for each in few for cell in each.cells) == ["1:5 k=2 solver=naive", "1:5 k=3 beta=0.5",
                                                                        "plain"]  # fmt: skip


def made(model: str, measure: str, n: int, gained: int, lost: int, right: float = 0.6) -> list[Score]:
    """Plain and a loop that made so many answers right and wrong."""
    found = []
    for i in range(n):
        plain = float(i < right * n)
        other = 1.0 if n - i <= gained else 0.0 if i < lost else plain
        for loop, value in (("plain", plain), ("recipe", other)):
            found.append(Score(model, measure, ACCURACY, loop, "x", f"t {i}", value, -1.0 - value / 9, i % 4, 4))
    return found


def test_rows_and_pooled_rows_are_exact_tests() -> None:
    scores = [*made("a", "one", 400, 30, 8), *made("a", "two", 300, 5, 9), *made("b", "one", 200, 1, 1),
              *made("b", "guess", 200, 50, 0, right=0.25)]  # fmt: skip
    rows = protocol_report.judged(scores, {"recipe": "primary"})
    by = {(r.model, r.measure): r for r in rows}
    assert (by["a", "one"].gained, by["a", "one"].lost, by["a", "one"].gain.n) == (30, 8, 400)
    assert by["a", "one"].p == pytest.approx(binomtest(8, 38).pvalue)
    assert by["b", "guess"].unfit == "at chance"
    assert by["b", "guess"].word == "at chance"
    assert (by["a", "all"].gained, by["a", "all"].lost, by["b", "all"].gain.n) == (35, 17, 200)
    assert by["all", "all"].gain.mean == pytest.approx((36 - 18) / 900)
    assert by["a", "all"].p == pytest.approx(2 * binomtest(17, 52).pvalue)  # Holm over two models
    assert by["b", "all"].p == 1
    apart = {(r.model, r.measure): r for r in protocol_report.judged(scores, {"recipe": "primary"}, {"two"})}
    assert (apart["a", "all"].gain.n, apart["all", "all"].gain.n) == (400, 600)
    said = protocol_report.sentences(rows)
    assert len(said) == 3
    assert "+2.00 points" in said[-1]


def test_acc_norm_stands_beside_accuracy_and_decides_nothing() -> None:
    scores = [replace(s, norm=1 - s.value) for s in made("a", "one", 400, 30, 8)]
    one, pooled = protocol_report.judged(scores, {"recipe": "primary"})
    assert one.norm is not None
    assert one.norm.gain.mean == -one.gain.mean == pytest.approx(-22 / 400)
    assert (one.word, pooled.word) == ("helps", "helps")
    cells = dict(zip([c.name for c in protocol_report.COLUMNS], protocol_report.table([one]).rows[0], strict=True))
    assert (cells["acc_norm"], cells["verdict"]) == (one.norm.gain.mean, "helps")
    assert protocol_report.judged([*scores[:-1], replace(scores[-1], norm=math.nan)], {})[0].norm is None


def test_half_a_point_is_asked_of_many_questions() -> None:
    few, many = (protocol_report.judged(made("a", "one", n, 40, 40), {})[0].verdict for n in (5000, 5001))
    assert (few.worth, many.worth) == (0.01, 0.005)


def test_texts_are_judged_in_their_order() -> None:
    """Neighbours that resemble each other widen the interval, however the chunks were drawn."""
    rng = np.random.default_rng(1)
    noise = np.zeros(60)
    for i in range(1, 60):
        noise[i] = 0.8 * noise[i - 1] + rng.normal(0, 0.01)
    scores = []
    for i in rng.permutation(60):
        for loop, value in (("plain", -3.0), ("recipe", -3.0 + noise[i])):
            scores.append(Score("a", "wiki", NATS, loop, "x", f"0 {i}", value))
    (row,) = protocol_report.judged(scores, {})
    independent = 2 * noise.std(ddof=1) / math.sqrt(60)
    assert row.gain.high - row.gain.mean > 1.5 * independent
    assert (row.gained, row.choice) == (None, None)


def test_scores_come_back_as_they_were_written(tmp_path: Path) -> None:
    scores = [*made("a", "one", 5, 1, 1), Score("a", "wiki", NATS, "plain", "plain", "0 3", -2.5)]
    scores[0] = replace(scores[0], norm=1.0)
    write(tmp_path / "s.csv.xz", scores)
    back = read(tmp_path / "s.csv.xz")
    assert len(back) == len(scores)
    assert {(s.key, s.value, s.letter) for s in back} == {(s.key, s.value, s.letter) for s in scores}
    assert math.isnan(next(s for s in back if s.unit == NATS).choice)
    assert [s.norm for s in back if not math.isnan(s.norm)] == [1.0]
    text = lzma.decompress((tmp_path / "s.csv.xz").read_bytes()).decode()
    older = [line.rpartition(",")[0] for line in text.splitlines()]
    (tmp_path / "older.csv.xz").write_bytes(lzma.compress("\n".join(older).encode()))
    assert all(math.isnan(s.norm) for s in read(tmp_path / "older.csv.xz"))
    with pytest.raises(GgufloopError, match="cannot read"):
        read(tmp_path / "none.csv.xz")
