"""research/family/train_family.py in small: one size for a few steps, interrupted, exported, quantised and measured.

The oracle of the study is that llama.cpp's loss of an exported file is torch's; the script itself stops where they
differ, and here the two are compared token by token.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_model
import family_tables
import family_text
import numpy as np
import pytest
import torch
import train_family
from click.testing import CliRunner
from family_text import Document

from ggufloop.errors import GgufloopError
from ggufloop.measure.score import score

PLAN = family_model.Plan(n_ctx=32, n_batch=2, warmup=3)
STUDY = train_family.Study(PLAN, first=5, ratio=4.0, budgets=2, merges=30, chunks=4, sizes=(("tiny", 2, 0),))


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return family_text.topics()[:40]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> train_family.Data:
    return train_family.prepare(tmp_path_factory.mktemp("text"), STUDY, documents)


def run(folder: Path, data: train_family.Data) -> train_family.Run:
    run = train_family.Run(folder, STUDY, data)
    run.save_every = 2
    return run


@pytest.fixture(scope="module")
def whole(data: train_family.Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The study done in one go: its folder, and the rows of its larger budget by column."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    first, last = STUDY.cells()
    study = run(folder, data)
    study.model(*first)
    names = [column.name for column in train_family.COLUMNS]
    return folder, [dict(zip(names, row, strict=True)) for row in study.cell(*last)]


def test_interrupted_anywhere_it_ends_in_the_same_weights(
    whole: tuple[Path, list[dict[str, Any]]], data: train_family.Data, tmp_path: Path
) -> None:
    """A crash at each step: what was not saved is computed again, on the trunk and on the way down."""
    steps = 0
    crashed = set()

    class Crash(Exception):
        pass

    def crash(trainer: family_model.Trainer, loss: float) -> None:
        nonlocal steps
        steps += 1
        if (trainer.until, trainer.step) not in crashed:
            crashed.add((trainer.until, trainer.step))
            raise Crash

    for _ in range(50):
        again = run(tmp_path, data)
        again.tell = crash  # type: ignore[method-assign]
        try:
            for cell in STUDY.cells():
                again.model(*cell)
            break
        except Crash:
            pass
    assert len(crashed) == STUDY.trained("tiny")
    assert steps > len(crashed) + 3  # steps were lost, not only stopped at
    for _, _, budget in STUDY.cells():
        name = f"tiny/{budget}.gguf"
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()


def test_llama_cpp_computes_what_torch_computes(
    whole: tuple[Path, list[dict[str, Any]]], data: train_family.Data
) -> None:
    """Token by token, on trained weights: rotation, grouped heads, tied output and the order of tensors."""
    name, shape, steps = STUDY.cells()[-1]
    path = whole[0] / name / f"{steps}.gguf"
    chunk = data.held_out[: PLAN.n_ctx].astype(np.int64)
    weights = {t.name: torch.from_numpy(t.data.copy()) for t in train_family.GGUFReader(path).tensors}
    expected = family_model.nll(shape, weights, torch.from_numpy(chunk)[None])[0].numpy()
    llm = train_family.open_model(path, STUDY, 1)
    found = score(llm, chunk.tolist()).nll
    assert abs(found - expected).max() < 1e-4
    assert expected.std() > 0.1  # tokens differ, so the comparison is of more than a mean
    text = "def f(x):\n    return x + 1, caf\u00e9"
    assert llm.detokenize(llm.tokenize(text.encode(), add_bos=False)).decode() == text
    llm.close()


def test_rows_say_what_was_measured(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    plain, *quantised = rows = whole[1]
    assert {row["type"]: row["bits_per_weight"] for row in rows} == {
        "F32": 32, "Q8_0": 8.5, "Q4_K": 4.5, "Q3_K": 3.4375, "Q2_K": 2.625,
    }  # fmt: skip
    assert plain["loss"] == pytest.approx(plain["torch_loss"], abs=1e-5)
    assert plain["loss"] < np.log(287) - 1  # it learns
    for row in rows:
        assert (row["tokens"], row["n_tokens"]) == (20 * 64, 4 * 31)
        assert (row["N"], row["D"]) == (row["n_params"] / 1e9, row["tokens"] / 1e9)
        assert row["n_params"] - row["n_non_embedding"] == 287 * 256
    for row in quantised:
        assert row["loss"] - plain["loss"] == pytest.approx(row["change"], abs=1e-9)
        assert 0 < row["change_se"] < row["loss_se"]  # paired


def test_command_writes_table_and_provenance_and_goes_on(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_family, "SIZES", {"1x256": (1, 0)})
    monkeypatch.setattr(train_family, "BITS", {"F32": 32})
    monkeypatch.setattr(train_family, "collect", lambda: documents)
    out = tmp_path / "out" / "family.csv"
    words = ["--folder", str(tmp_path / "f"), "--budgets", "1", "--chunks", "2", "-o", str(out), "--first"]
    done = CliRunner().invoke(train_family.main, [*words, "5"])
    assert (done.exit_code, done.stdout) == (0, "")
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert (row["size"], row["type"], row["tokens"], row["n_tokens"]) == ("1x256", "F32", "5120", "510")
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["text"]["train"]["bytes"].keys() == {"pydoc"}
    assert found["study"]["first"] == 5
    before = out.read_bytes()
    (tmp_path / "f" / "1x256" / "5.gguf").unlink()  # what was measured is not computed again
    assert CliRunner().invoke(train_family.main, [*words, "5"]).exit_code == 0
    assert out.read_bytes() == before
    refused = CliRunner().invoke(train_family.main, [*words, "6"])
    assert refused.exit_code == 1
    assert "holds another study: first 5 not 6." in refused.output
    assert len(refused.output.splitlines()) == 2


def test_each_budget_decays_to_nothing_and_the_trunk_does_not() -> None:
    trunk = family_model.Trainer.fresh(family_model.Shape(1, n_vocab=287), PLAN, 1)
    stream = np.random.default_rng(0).integers(0, 287, 20 * PLAN.step_tokens)
    trunk.advance(stream, PLAN.branch(10), lambda trainer, loss: None)
    before = {name: value.detach().clone() for name, value in trunk.weights.items()}
    assert trunk.rate() == PLAN.rate
    copy = trunk.decaying(10)
    rates = []
    copy.advance(stream, 10, lambda trainer, loss: rates.append(trainer.optimiser.param_groups[0]["lr"]))
    assert rates == pytest.approx([PLAN.rate * share for share in (2 / 3, 1 / 3)])
    assert all(torch.equal(before[name], trunk.weights[name]) for name in before)
    assert trunk.rate() == PLAN.rate


def test_held_out_documents_are_held_out(documents: list[Document], data: train_family.Data) -> None:
    train, held_out = family_text.split(documents, STUDY.seed)
    assert held_out
    assert not {piece.text for piece in train} & {piece.text for piece in held_out}
    assert sorted("".join(p.text for p in [*train, *held_out])) == sorted("".join(d.text for d in documents))
    assert len(data.train) == data.provenance["train"]["tokens"]
    assert data.merges == family_text.learn_merges(train, STUDY.merges)
    assert len(data.merges) == STUDY.merges


def test_merges_are_the_most_frequent_pairs() -> None:
    assert family_text.learn_merges([Document("x", "abab abab abab cab")], 3) == [
        ("a", "b"),
        ("ab", "ab"),
        ("\u0120", "abab"),
    ]


def test_another_study_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    assert train_family.open_study(tmp_path, STUDY, 1)
    assert not train_family.open_study(tmp_path, replace(STUDY, budgets=3), 1)  # more of the same
    with pytest.raises(GgufloopError, match="seed 20260523 not 4"):
        train_family.open_study(tmp_path, replace(STUDY, seed=4), 1)


def test_text_too_short_is_refused(data: train_family.Data, tmp_path: Path) -> None:
    with pytest.raises(GgufloopError, match="no token is shown twice"):
        train_family.Run(tmp_path, replace(STUDY, budgets=16), data)
    with pytest.raises(GgufloopError, match="are no 99999 chunks of 32"):
        train_family.Run(tmp_path, replace(STUDY, chunks=99999), data)


def test_stopped_by_the_clock_it_goes_on(data: train_family.Data, tmp_path: Path) -> None:
    with pytest.raises(train_family.OutOfTime):
        train_family.Run(tmp_path, STUDY, data, deadline=0.0).model(*STUDY.cells()[0])
    assert family_model.Trainer.load(tmp_path / "tiny" / "trunk.pt").step == 1


def test_growth_covers_the_exponent_it_was_made_with() -> None:
    """Where the smallest changes drown in their errors, as in the study."""
    rng = np.random.default_rng(5)
    tokens = 4e4 * 1.4 ** np.arange(10)
    true = 0.05 * (tokens / tokens[-1]) ** 0.8
    errors = np.full(10, 0.004)
    found = [family_tables.growth(tokens, true + errors * rng.standard_normal(10), errors) for _ in range(200)]
    assert np.mean([e.low <= 0.8 <= e.high for e in found]) == pytest.approx(0.95, abs=0.05)
    assert np.mean([e.mean for e in found]) == pytest.approx(0.8, abs=0.03)
    assert family_tables.growth(tokens, true, errors).mean == pytest.approx(0.8, abs=2.5e-3)
