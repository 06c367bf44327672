"""`ggufloop compare --shard` and `merge`: the study of one run, from parts; `--plan`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.measure import slices
from ggufloop.study import file as studies
from ggufloop.study.collection import collect
from ggufloop.study.merge import merge_studies

pytest.importorskip("lm_eval")
pytest.importorskip("matplotlib")

if TYPE_CHECKING:
    from support.cli import Cli


@pytest.fixture
def asked(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(slices, "SCORED", 4)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 30)
    return ["compare", str(tiny_model("llama")), "--types", "Q8_0", "--window", "2:5", "--K", "2", "--text", str(text),
            "-c", "64", "--chunks", "5", "--tasks", "brackets", "--limit", "10", "-t", "1", "--no-try"]  # fmt: skip


def without_times(path: Path) -> Any:
    study = studies.read(path)
    cells = {
        key: (tuple(dataclasses.replace(chunk, seconds=0.0) for chunk in cell.chunks), cell.tasks)
        for key, cell in study.cells.items()
    }
    return study.header, study.files, cells


def test_two_shards_are_one_study(cli: Cli, asked: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one" / "llama", tmp_path / "two" / "llama"
    assert cli(*asked, "--out", one.parent).code == 0
    parts = [two / f"study-{i}-of-2.jsonl" for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        ran = cli(*asked, "--out", two.parent, "--shard", f"{i}/2")
        assert ran.code == 0, ran.err
        assert f"shard {i}/2: {(3, 2)[i - 1]} of 5 chunks are in {part}\n" in ran.out
    assert [[c.index for c in studies.read(part).cells["Q8_0", "plain"].chunks] for part in parts] == [
        [0, 2, 4],
        [1, 3],
    ]
    assert collect(two.parent).files == []
    told = [line.split(" = ")[0] for line in (two / "study.toml").read_text().splitlines()]
    assert not {"shard", "plan", "tokens-per-second"} & set(told)
    merged = cli("merge", *parts)
    assert merged.code == 0, merged.err
    assert without_times(two / "study.jsonl") == without_times(one / "study.jsonl")
    assert (two / "report.html").exists()
    again = cli(*asked, "--out", two.parent)  # nothing is left to measure
    assert again.out == merged.out
    assert cli("merge", *parts, "-o", "csv").out == cli(*asked, "--out", two.parent, "-o", "csv").out
    with pytest.raises(GgufloopError, match="this is not all: all measurements of shard 2/2 are missing"):
        merge_studies(parts[:1], tmp_path)
    with pytest.raises(UsageError, match="a whole study is among them"):
        merge_studies([two / "study.jsonl"], tmp_path)
    kept = parts[1].read_text()
    parts[1].write_text("".join(f"{line}\n" for line in kept.splitlines() if '"index": 3' not in line))
    with pytest.raises(GgufloopError, match="this is not all: 4 measurements of shard 2/2 are missing"):
        merge_studies(parts, tmp_path)
    header, rest = kept.split("\n", 1)
    parts[1].write_text(json.dumps(json.loads(header) | {"n_ctx": 128}) + "\n" + rest)
    with pytest.raises(GgufloopError, match="not of one run: n_ctx is 64 and 128"):
        merge_studies(parts, tmp_path)


def test_the_plan(cli: Cli, asked: list[str], tmp_path: Path) -> None:
    ran = cli(*asked, "--out", tmp_path / "none", "--plan", "--tokens-per-second", "50", "--shard", "1/5", "-o", "json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert not (tmp_path / "none").exists()
    assert [(cell["loop"], cell["items"]) for cell in found["cells"]] == [("plain", 5), ("2:5 k=2", 5)] * 2 + [
        ("plain", 10), ("2:5 k=2", 10)] * 2  # fmt: skip
    assert found["cells"][0]["hours"] == pytest.approx(5 * 64 / 50 / 3600)
    assert found["hours_per_shard"] == pytest.approx(found["hours"] / 5)
