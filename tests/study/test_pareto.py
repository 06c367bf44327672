"""KLD against bytes: the front by hand, what is shown to be beaten, several texts, and a figure that can be read."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.cli import Cli
from support.studies import HEADER

from ggufloop.loop import PLAIN
from ggufloop.study import file as studies
from ggufloop.study import pareto, report
from ggufloop.study.file import Chunk, File, Study

MIB = 2**20


def written(path: Path, files: dict[str, tuple[float, float]], chunks: int = 12, spread: float = 0.0) -> Study:
    """A study of files of so many MiB and such a KLD; the reference first. spread: of a chunk, by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    shared = rng.uniform(0.8, 1.2, chunks)
    s = studies.create(path, HEADER)
    s = studies.add_file(path, s, File("F32", "c" * 64, 400 * MIB, 32.0, math.inf, math.inf))
    for i, (name, (mib, kld)) in enumerate(files.items()):
        s = studies.add_file(path, s, File(name, f"{i:064d}", int(mib * MIB), 4.5, 20.0 + i, 20.0 + i))
        own = rng.normal(0, spread, chunks)
        for j in range(chunks):
            studies.add_chunk(path, name, PLAIN, Chunk(j, 31, 90, 3, 9, kld * float(shared[j]) + own[j], 0.9, 1))
    for j in range(chunks):
        studies.add_chunk(path, "F32", PLAIN, Chunk(j, 31, 90, 3, 9, 0, 1, 1))
    return studies.read(path)


FILES = {"Q8": (100, 0.001), "Q6": (80, 0.004), "Q5": (85, 0.010), "Q4": (60, 0.050), "Q4x": (60, 0.040),
         "Q2": (40, 0.4)}  # fmt: skip


def test_the_front_by_hand(tmp_path: Path) -> None:
    """Q5 is larger and further off than Q6, Q4 as large as Q4x and further off; the rest is the front."""
    found = {p.file.type: p.front for p in pareto.points(written(tmp_path / "s.jsonl", FILES))}
    assert found == {"Q2": "yes", "Q4": "no: Q4x", "Q4x": "yes", "Q6": "yes", "Q5": "no: Q6", "Q8": "yes"}


def test_a_rival_no_test_tells_apart_is_not_said_to_beat(tmp_path: Path) -> None:
    s = written(tmp_path / "s.jsonl", FILES | {"Q4": (60, 0.0401)}, spread=0.01)
    found = {p.file.type: p for p in pareto.points(s)}
    pair = sorted(found[name].front for name in ("Q4", "Q4x"))
    assert pair == ["cannot tell", "yes"]
    assert found["Q5"].kld.low < found["Q5"].kld.mean < found["Q5"].kld.high


def test_pairs_of_chunks_tell_more_than_two_intervals(tmp_path: Path) -> None:
    """What both files have in common on a chunk cancels, so intervals that overlap may still be told apart."""
    s = written(tmp_path / "s.jsonl", {"a": (60, 0.040), "b": (60, 0.042)})
    a, b = sorted(pareto.points(s), key=lambda p: p.file.type)
    assert a.kld.high > b.kld.low
    assert b.front == "no: a"


def test_the_same_file_twice_is_on_the_front_twice(tmp_path: Path) -> None:
    s = written(tmp_path / "s.jsonl", {"a": (60, 0.04), "b": (60, 0.04)})
    assert [p.front for p in pareto.points(s)] == ["yes", "yes"]


def test_one_file_and_none(tmp_path: Path) -> None:
    one = written(tmp_path / "a" / "s.jsonl", {"a": (60, 0.04)})
    assert pareto.summary([one]) == []
    assert pareto.points(written(tmp_path / "b" / "s.jsonl", FILES, chunks=1)) == []
    assert pareto.points(written(tmp_path / "c" / "s.jsonl", {})) == []


def test_it_is_in_the_table_of_a_study(tmp_path: Path) -> None:
    s = written(tmp_path / "s.jsonl", FILES)
    told = {row["type"]: row["front"] for row in report.numbers(s).records()}
    assert told == {"F32": None, "Q8": True, "Q6": True, "Q5": False, "Q4": False, "Q4x": True, "Q2": True}
    page = report.html(s, {}, "again")
    assert "<h2>KLD against bytes</h2>" in page
    assert "no: Q4x" in page
    assert re.search(r"headline\">Front of [^<]*Q4x[^<]*</p>", page)  # types as they are written


def boxes(texts: Sequence[object]) -> list[object]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(texts[0].axes.figure).get_renderer()  # type: ignore[attr-defined]
    from matplotlib.text import Text

    return [Text.get_window_extent(t, renderer) for t in texts]  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [3, 12, 24])
def test_names_in_the_figure_do_not_collide(n: int, tmp_path: Path) -> None:
    """Files of nearly one size and KLD, as several uploaders make them."""
    pytest.importorskip("matplotlib")
    from ggufloop.figures.size import size_figure

    rng = np.random.default_rng(n)
    files = {f"uploader-{i:02d}-Q4_K_M.gguf": (100 + rng.normal(0, 2), 0.05 * math.exp(rng.normal(0, 0.1)))
             for i in range(n)}  # fmt: skip
    figure = size_figure([written(tmp_path / "s.jsonl", files)])
    assert figure is not None
    (axes,) = figure.axes
    figure.draw_without_rendering()
    names = [t for t in axes.texts if t.get_text()]
    assert len(names) == n
    found = boxes(names)
    for i, a in enumerate(found):
        assert axes.get_window_extent().padded(2).count_contains([a.p0, a.p1]) == 2, names[i]  # type: ignore[attr-defined]
        assert not any(a.overlaps(b) for b in found[i + 1 :]), names[i]  # type: ignore[attr-defined]


def test_looped_points_stand_beside_plain_ones_with_their_bars(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from support import studies as made

    from ggufloop.figures import study as drawn

    figures = drawn.figures(made.written(tmp_path / "s.jsonl"))
    for name, series in ((drawn.SIZE, 2), (drawn.NOISE, 3)):
        axes = figures[name].axes[0]
        places = [float(bar.lines[0].get_xdata()[0]) for bar in axes.containers]
        assert len(set(places)) == series == len(places)
        assert all(bar.has_yerr for bar in axes.containers)
    gains = figures[drawn.SIZE].axes[1].containers[0]
    assert gains.lines[0].get_ydata()[1] == pytest.approx(0.1)  # of Q4_0 under the first loop


def test_several_texts(
    tiny_model: Callable[[str], Path], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One study each, files made once, one table with the front of each; again, it is all there already."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        Path(f"{name}.txt").write_text(f"Words of text {name} that are cut into tokens, over and over. " * 30)
    asked = ("compare", tiny_model("llama"), "--text", "one.txt", "--text", "two.txt", "-c", 32, "--chunks", 3, "--K",
             1, "--window", "2:5", "--types", "Q8_0,Q4_0", "-t", 1, "--keep")  # fmt: skip
    code, out, err = cli(*asked)
    assert code == 0, err
    folder = Path("studies/llama")
    assert {p.name for p in folder.iterdir()} == {
        "one.txt", "two.txt", "models", "study.toml", "kld-size.md", "kld-size.csv", "kld-size.png"
    }  # fmt: skip
    assert len(list((folder / "models").glob("*.gguf"))) == 2
    assert "front of one.txt: " in out
    assert "on the front of all 2 texts: " in out
    rows = list(csv.DictReader((folder / "kld-size.csv").read_text().splitlines()))
    assert [(row["text"], row["type"]) for row in rows] == [
        (text, type_) for text in ("one.txt", "two.txt") for type_ in ("Q4_0", "Q8_0")
    ]
    alone = studies.read(folder / "two.txt" / "study.jsonl").cell("Q4_0").mean("kl")
    assert float(rows[2]["kld"]) == pytest.approx(alone)
    before = (folder / "one.txt" / "study.jsonl").read_text()
    code, again, err = cli("compare", "--study", folder / "study.toml")
    assert (code, again) == (0, out), err
    assert (folder / "one.txt" / "study.jsonl").read_text() == before
    found = json.loads(cli(*asked, "-o", "json")[1])
    assert {row["text"] for row in found} == {"one.txt", "two.txt"}


def test_files_of_one_name_by_two_uploaders(
    tiny_model: Callable[[str], Path], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ggufloop.quant.quantize import quantize

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ggufloop.figures.study.figures", lambda study: {})
    Path("t.txt").write_text("Words of a text that are cut into tokens, over and over. " * 30)
    for who, type_ in (("ann", "Q8_0"), ("bob", "Q4_0")):
        Path(who).mkdir()
        quantize(tiny_model("llama"), Path(who) / "m.gguf", type_)
    code, out, err = cli("compare", tiny_model("llama"), "--text", "t.txt", "-c", 32, "--chunks", 3, "--K", 1,
                         "--window", "2:5", "--types", "ann/m.gguf,bob/m.gguf", "-t", 1)  # fmt: skip
    assert code == 0, err
    assert "front of t.txt: bob/m.gguf, ann/m.gguf." in out


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("t.txt", "t.txt"), "error: the text t.txt is given twice.\n"),
        (("t.txt", "a/t.txt"), "error: two texts are called t.txt.\n"),
    ],
)
def test_texts_that_cannot_be_told_apart(
    texts: tuple[str, ...], message: str, tiny_model: Callable[[str], Path], cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    for name in ("t.txt", "a/t.txt"):
        Path(name).write_text("Words of a text, over and over. " * 30)
    words = [word for text in texts for word in ("--text", text)]
    code, out, err = cli("compare", tiny_model("llama"), *words, "-c", 32, "--chunks", 3, "--window", "2:5")
    assert (code, out) == (2, "")
    assert err.startswith(message)
