"""`--plan`: what is counted before a run is what the run then takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ggufloop import engine
from ggufloop.backend.settings import ContextSettings
from ggufloop.loop import LoopSpec
from ggufloop.measure.eval_run import EvalPlan, run_eval
from ggufloop.measure.planning import plan_eval

pytest.importorskip("lm_eval")

if TYPE_CHECKING:
    from support.cli import Cli

SETTINGS = ContextSettings(n_threads=1, try_first=False)


def test_the_tokens_are_those_that_are_read(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose questions are all looked at is counted exactly: each prompt once, and the answers behind it."""
    from ggufloop.measure import lm_eval_model

    read: list[int] = []
    real = lm_eval_model.score_questions

    def counted(llm: Any, questions: Any) -> Any:
        read.extend(len(q.prompt) + sum(len(c) - 1 for c in q.choices) for q in questions)
        return real(llm, questions)

    plan = EvalPlan(("arithmetic_guess",), limit=12, paired=True)
    loop = LoopSpec((2, 5), k=3)
    planned = plan_eval(tiny_model("llama"), loop, plan, SETTINGS, shards=4)
    monkeypatch.setattr(lm_eval_model, "score_questions", counted)
    run_eval(tiny_model("llama"), loop, plan, settings=SETTINGS)
    plain, looped = planned.cells
    assert (plain.loop, looped.loop, plain.items, planned.slices) == ("plain", "2:5 k=3", 12, 1)
    assert plain.tokens == looped.tokens == sum(read) / 2
    assert looped.work == pytest.approx(plain.work * loop.relative_cost(7))
    assert planned.measured
    assert planned.counted
    assert not planned.at_most
    assert planned.per_shard == planned.total  # one slice is one shard's


def test_a_given_speed_loads_no_model(
    cli: Cli, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(engine.LoopedLlama, "__init__", refuse)
    asked = [str(tiny_model("llama")), "--tasks", "brackets", "--limit", "200", "--window", "2:5", "--K", "2",
             "--plan", "--tokens-per-second", "100", "--shard", "1/2"]  # fmt: skip
    ran = cli("eval", *asked, "--paired", "-o", "json")
    assert ran.code == 0, ran.err  # lm-eval's bars are in it or not: that depends on who imports tqdm
    found = json.loads(ran.out)
    assert [cell["items"] for cell in found["cells"]] == [200, 200]
    assert (found["slices"], found["shards"], found["measured"]) == (4, 2, False)
    assert found["hours"] == pytest.approx(sum(cell["hours"] for cell in found["cells"]))
    plain = found["cells"][0]["tokens"] / 100 / 3600
    assert found["hours"] == pytest.approx(plain * (1 + LoopSpec((2, 5), k=2).relative_cost(7)))
    assert found["hours_per_shard"] == pytest.approx(found["hours"] / 2)
    text = tmp_path / "t.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    ran = cli("sweep", *asked, "--text", text, "-c", "64")
    assert ran.code == 0, ran.err
    assert re.search(r"t\.txt +\| plain +\| +\d\d \|", ran.out), ran.out
    assert "Plain reads 100 tokens per second, as given; those of tasks " in ran.out
    assert "; each of 2 shards " in ran.out


def test_a_speed_without_a_plan(cli: Cli, tiny_model: Callable[[str], Path]) -> None:
    ran = cli("eval", tiny_model("llama"), "--tasks", "brackets", "--tokens-per-second", "5")
    assert (ran.code, ran.err) == (2, "error: --tokens-per-second is for --plan.\n  give both, or none.\n")
