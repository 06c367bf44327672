"""Sensitivity: a file differs in its part alone, bit for bit; the numbers by perplexity one by one; what is said."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.cli import Cli
from support.studies import HEADER

from ggufloop.backend.settings import ContextSettings
from ggufloop.engine import LoopedLlama
from ggufloop.errors import UsageError
from ggufloop.loop import PLAIN
from ggufloop.measure.corpus import Text
from ggufloop.measure.perplexity import Other, perplexity, tokenize
from ggufloop.models.gguf import read_model
from ggufloop.models.weights import locate, slabs
from ggufloop.quant.snr import TensorSnr
from ggufloop.study import file as studies
from ggufloop.study import ladder_files, sensitivity, sensitivity_report
from ggufloop.study.file import Chunk, File, Study
from ggufloop.study.run import StudyPlan
from ggufloop.study.sensitivity import BASE, CLASS, LAYER

TEXT = Text("t", "Words of a text that are cut into tokens, over and over again. " * 30)
PLAN = StudyPlan(TEXT, chunk=32, chunks=3)
ONE = ContextSettings(n_threads=1)


def content(path: Path) -> dict[str, bytes]:
    found = locate(read_model(path))
    return {
        name: stored.tensor.type.encode() + b"".join(s.tobytes() for s in slabs(stored))
        for name, stored in found.items()
    }


@pytest.mark.parametrize("by", [LAYER, CLASS])
def test_a_part_changes_its_own_tensors_alone(by: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    ref = ladder_files.reference(tiny_model("llama"), tmp_path, "F16")
    shares: dict[str, TensorSnr] = {}
    base = ladder_files.varied(ref, BASE, BASE, (), tmp_path, (2, 5), known=shares)
    before = content(base.path)
    seen: set[str] = set()
    for name, pattern in sensitivity.patterns(ref.path, by).items():
        override = ((pattern, "Q4_0"),)
        made = ladder_files.varied(ref, BASE, f"{name} Q4_0", override, tmp_path, (2, 5), known=shares)
        assert made.file == ladder_files.varied(ref, BASE, f"{name} Q4_0", override, tmp_path, (2, 5)).file
        after = content(made.path)
        changed = {tensor for tensor in before if after[tensor] != before[tensor]}
        if by == LAYER:
            mine = {t for t in before if t.startswith(f"blk.{name.split()[1]}.") and "norm" not in t}
        else:
            mine = {t for t in before if t.removesuffix(".weight").rpartition(".")[2] == name}
        assert changed == mine, name
        assert after.keys() == before.keys()
        assert not changed & seen
        seen |= changed
    matrices = {t.name for h in read_model(ref.path) for t in h.tensors if len(t.shape) > 1}
    assert seen == ({t for t in matrices if t.startswith("blk.")} if by == LAYER else matrices)


def test_numbers_are_those_of_perplexity(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Each file by itself, against the reference; and a second run makes and measures nothing."""
    path = tiny_model("llama")
    study = sensitivity.run_sensitivity(path, "Q4_0", LAYER, (2, 5), PLAN, tmp_path / "s", ONE)
    assert study.types == ("F32", BASE, *(f"layer {i} Q4_0" for i in range(7)))
    assert not (tmp_path / "s" / "models").exists()
    ref = ladder_files.reference(path, tmp_path, "F16")
    found = {p.name: p for p in sensitivity.parts(study)}
    kld = {}
    for name, overrides in ((BASE, ()), ("layer 3 Q4_0", ((r"^blk\.3\.", "Q4_0"),))):
        made = ladder_files.varied(ref, BASE, name, overrides, tmp_path, (2, 5))
        words = {"n_ctx": 32, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}
        reference, llm = LoopedLlama(path, **words), LoopedLlama(made.path, **words)
        result = perplexity(llm, tokenize(llm, TEXT.text), 32, 3, Other(reference))
        assert result.against is not None
        kld[name] = result.against.kl.kl.mean
        llm.close()
        reference.close()
    assert found["layer 3"].more.mean == pytest.approx(kld["layer 3 Q4_0"] - kld[BASE], abs=1e-9)
    assert [p.in_window for p in found.values()] == [False, False, True, True, True, False, False]
    assert [p.may_loop for p in found.values()] == [False, True, True, True, True, True, False]
    before = (tmp_path / "s" / "study.jsonl").read_text()
    assert sensitivity.run_sensitivity(path, "Q4_0", LAYER, (2, 5), PLAN, tmp_path / "s", ONE) == study
    assert (tmp_path / "s" / "study.jsonl").read_text() == before


def test_a_stopped_run_goes_on(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_model("llama")
    whole = sensitivity.run_sensitivity(path, "Q4_0", LAYER, (2, 5), PLAN, tmp_path / "a", ONE)

    def stop(step: object) -> None:
        if "layer 4 Q4_0, plain, chunk 2" in str(step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity.run_sensitivity(path, "Q4_0", LAYER, (2, 5), PLAN, tmp_path / "b", ONE, progress=stop)
    again = sensitivity.run_sensitivity(path, "Q4_0", LAYER, (2, 5), PLAN, tmp_path / "b", ONE)
    assert [p.more for p in sensitivity.parts(again)] == [p.more for p in sensitivity.parts(whole)]


def written(path: Path, added: dict[int, float], chunks: int = 12) -> Study:
    """Layers of a model of 7, the window 2:5, each adding so much to a KLD of 0.01; the same noise on all."""
    s = studies.create(path, HEADER)
    noise = np.random.default_rng(0).normal(0, 0.002, (chunks, 9))
    for i, name in enumerate(["F32", BASE, *(f"layer {il} Q4_0" for il in added)]):
        s = studies.add_file(path, s, File(name, f"{i:064d}", 100, 8.5, math.inf, math.inf))
        for j in range(chunks):
            kl = 0.0 if not i else 0.01 + (0 if i == 1 else list(added.values())[i - 2]) + float(noise[j, i])
            studies.add_chunk(path, name, PLAIN, Chunk(j, 31, 90, 3, 9, kl, 1, 1))
    return studies.read(path)


@pytest.mark.parametrize(
    ("window", "word"),
    [(0.03, "more sensitive than"), (0.005, "less sensitive than"), (0.0125, "not shown to differ from")],
)
def test_the_window_against_the_others(window: float, word: str, tmp_path: Path) -> None:
    """By hand: the means of layers 2, 3, 4 and of 1, 5; layers 0 and 6, which cannot loop, are left out."""
    s = written(tmp_path / "s.jsonl", {0: 0.5, 1: 0.01, 2: window, 3: window, 4: window, 5: 0.015, 6: 0.7})
    more = sensitivity.contrast(s)
    assert more is not None
    cells = [s.cell(f"layer {il} Q4_0").mean("kl") for il in range(7)]
    assert more.mean == pytest.approx(sum(cells[2:5]) / 3 - (cells[1] + cells[5]) / 2)
    said = sensitivity_report.summary(s)
    assert f"window 2:5: its layers are {word} the others that may loop, by " in said[2]
    assert "(means of 3 and of 2 layers, the first and the last left out)" in said[2]
    assert "worst: layer 6 (+0.7" in said[1]


def test_the_command(
    tiny_model: Callable[[str], Path], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text(TEXT.text)
    asked = ("compare", tiny_model("llama"), "--text", "t.txt", "-c", 32, "--chunks", 3, "-t", 1, "--window", "2:5")
    code, out, err = cli(*asked, "--sensitivity", "q4_0")
    assert code == 0, err
    folder = Path("studies/llama/sensitivity-Q4_0-layer")
    assert f"figure: {folder / 'sensitivity.png'}" in out
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [(row["part"], row["in_window"]) for row in rows[1:3]] == [("layer 1", "False"), ("layer 2", "True")]
    assert (folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = cli(*asked, "--sensitivity", "Q4_0", "--sensitivity-by", "class", "-o", "csv")
    assert code == 0, err
    assert {row["part"] for row in csv.DictReader(out.splitlines())} >= {"attn_q", "ffn_down", "token_embd", "output"}
    for words, message in (
        (("--sensitivity", "Q8_0"), "error: every other tensor is Q8_0 too.\n"),
        (("--sensitivity", "Q4_9"), "error: tensor type 'Q4_9' is not known.\n"),
        (("--sensitivity", "IQ2_XXS"), "error: tensor type IQ2_XXS needs an importance matrix.\n"),
        (("--sensitivity", "Q4_0", "--sensitivity-by", "row"), "error: --sensitivity-by 'row' is not known.\n"),
    ):
        code, out, err = cli(*asked, *words)
        assert code, words
        assert message in err, words


def test_parts_are_layers_or_kinds(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="parts by 'row' are not known"):
        sensitivity.patterns(tiny_model("llama"), "row")
