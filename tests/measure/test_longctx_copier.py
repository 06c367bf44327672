"""RULER's needle by a model that reads it: hand-made weights that copy, through the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import copier

from ggufloop.backend.settings import ContextSettings
from ggufloop.loop import LoopSpec
from ggufloop.measure.longctx_run import LongPlan, run_long_context


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copier.write(tmp_path_factory.mktemp("copier") / "copier.gguf")


def test_a_model_that_copies_solves_the_needle(model: Path, tmp_path: Path) -> None:
    """All of it, plain, looped over a layer that does nothing, and over the head that copies: the same token again."""
    loops = [LoopSpec((2, 3), 3), LoopSpec((1, 3), 3)]
    plan = LongPlan((1100, 2000), ("niah_single_1",), 8)
    settings = ContextSettings(n_ctx=2000, n_threads=2)
    cells = run_long_context(model, loops, plan, tmp_path / "j.jsonl", settings)
    assert [(c.length, c.loop, c.score.n, c.score.mean) for c in cells] == [
        (length, loop, 8, 1.0) for length in (1100, 2000) for loop in ("plain", *map(str, loops))
    ]


def test_a_model_that_cannot_look_back_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of layer 0 taken out: it starts the number and loses its way in it."""
    nothing = {name: value * 0 for name, value in copier._copies().items()}
    monkeypatch.setattr(copier, "_looks_back", lambda: nothing)
    path = copier.write(tmp_path / "blind.gguf")
    plan = LongPlan((1100,), ("niah_single_1",), 4)
    (plain,) = run_long_context(path, [], plan, tmp_path / "j.jsonl", ContextSettings(n_ctx=1100, n_threads=2))
    assert plain.score.mean == 0
