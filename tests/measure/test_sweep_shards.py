"""`ggufloop sweep --shard` and `merge`: what `sweep --no-racing` finds by itself, from parts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ggufloop.errors import GgufloopError
from ggufloop.measure import slices
from ggufloop.measure.sweep_merge import merge_sweeps
from ggufloop.study.collection import collect

pytest.importorskip("lm_eval")

if TYPE_CHECKING:
    from support.cli import Cli

Scores = dict[tuple[str, str, int], float]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SCORED", 8)


@pytest.fixture
def asked(tiny_model: Callable[[str], Path], tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 30)
    return ["sweep", str(tiny_model("llama")), "--window", "2:5,1:3", "--K", "2", "--text", str(text), "-c", "64",
            "--task", "brackets", "--limit", "36", "-t", "1", "--no-try"]  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores(path: Path) -> Scores:
    return {
        (r["measure"], r["loop"], i): score
        for r in lines(path)[1:]
        if "scores" in r
        for i, score in zip(r["items"], r["scores"], strict=True)
    }


def without_clock(text: str) -> str:
    return re.sub(r"by layer count, .* by the clock \(.*?\)", "", text)


def test_three_shards_are_one_run(cli: Cli, asked: list[str], tmp_path: Path) -> None:
    out, parts = tmp_path / "parts", []
    for i in (1, 2, 3):
        ran = cli(*asked, "--out", out, "--shard", f"{i}/3")
        parts.append(out / "llama" / f"sweep-{i}-of-3.jsonl")
        assert ran.code == 0, ran.err
        assert str(parts[-1]) in ran.out
        assert "shards do not race: every loop is scored on all items." in ran.out
        assert lines(parts[-1])[0]["racing"] is False
    for form in ("text", "csv", "md"):
        alone = cli(*asked, "--out", tmp_path / "one", "--no-racing", "-o", form)
        merged = cli("merge", *parts, "--out", tmp_path / "whole", "-o", form)
        assert (alone.code, merged.code) == (0, 0), merged.err
        assert without_clock(merged.out) == without_clock(alone.out)
    one, whole = (scores(tmp_path / name / "llama" / "sweep.jsonl") for name in ("one", "whole"))
    assert one == whole
    assert len({i for measure, _, i in one if measure == "brackets"}) == 36
    mine = [scores(part) for part in parts]
    assert sum(map(len, mine)) == len(one)
    assert all({loop for _, loop, _ in part} == {"plain", "2:5 k=2", "1:3 k=2"} for part in mine)
    again = cli(*asked, "--out", tmp_path / "whole", "--no-racing")
    assert without_clock(again.out) == without_clock(cli(*asked, "--out", tmp_path / "one", "--no-racing").out)
    assert [name for name, *_ in collect(tmp_path / "parts").files] == []
    refused(cli, parts, tmp_path)


def refused(cli: Cli, parts: list[Path], folder: Path) -> None:
    """What differs is named; nothing is guessed."""
    other = folder / "other.jsonl"

    def changed(at: int, **fields: Any) -> Path:
        read = lines(parts[2])
        read[at] |= fields
        other.write_text("".join(json.dumps(line) + "\n" for line in read))
        return other

    for at, fields, message in (
        (0, {"model_sha256": "0"}, "not of one run: model_sha256 is "),
        (0, {"shard": "1/4"}, "not of one run: they are shards 1/3, 1/4"),
        (1, {"seed": 7}, r"not of one run: seed is 1234 and 7\."),
        (1, {"loops": ["2:5 k=2"]}, r"not of one run: loops are "),
        (2, {"scores": [9e99]}, r"is damaged: it has a score or a time that nothing has"),
    ):
        with pytest.raises(GgufloopError, match=message):
            merge_sweeps([*parts[:2], changed(at, **fields)])
    with pytest.raises(GgufloopError, match=r"this is not all: \d+ scores of shard 3/3 are missing"):
        merge_sweeps(parts[:2])
    shutil.copy(parts[2], other)
    other.write_bytes(other.read_bytes()[:-20])
    with pytest.raises(GgufloopError, match=r"this is not all: \d+ scores of shard 3/3 are missing"):
        merge_sweeps([*parts[:2], other])
    code, out, err = cli("merge", parts[0], folder / "one" / "llama" / "sweep.jsonl")
    assert (code, out) == (1, "")
    assert err.startswith("error: "), err


def test_a_budget_is_of_one_machine(cli: Cli, asked: list[str], tmp_path: Path) -> None:
    code, _, err = cli(*asked, "--budget", "1m", "--shard", "1/2", "--out", tmp_path)
    assert code == 2
    assert err.startswith("error: --budget times this machine, and shards must agree on the items.\n")
    code, _, err = cli(*asked, "--shard", "1/2")
    assert (code, err) == (
        2, "error: shard 1/2 keeps its part for a merge, and no folder is given.\n  give --out DIR.\n")  # fmt: skip
