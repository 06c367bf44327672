"""Shards of a sweep put together: what `sweep --no-racing` would have found, without a model.

    found = merge_sweeps([Path("results/m/sweep-1-of-2.jsonl"), Path("results/m/sweep-2-of-2.jsonl")])

The journals hold every score; the sweep is run on them, and asks no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from ggufloop.errors import GgufloopError
from ggufloop.loop import PLAIN, LoopSpec
from ggufloop.measure.eval_run import note_devices
from ggufloop.measure.items import drawn
from ggufloop.measure.journal import Journal
from ggufloop.measure.merge import check_missing, check_same, headers_of, shards_of, short
from ggufloop.measure.slices import file_name
from ggufloop.measure.sweep import PartMeasure, SweepPart, check_record, part_of, sweep, take_scores
from ggufloop.measure.sweep_run import SweepResult
from ggufloop.measure.verdict import LEVEL
from ggufloop.progress import Progress, silent

KIND = "sweep"


@dataclass(frozen=True)
class _Kept:
    """A measure whose items are all scored."""

    of: PartMeasure
    said: Mapping[str, Any]

    name = property(lambda self: self.of.name)
    item = property(lambda self: self.of.item)
    unit = property(lambda self: self.of.unit)
    least = property(lambda self: self.of.least)
    n = property(lambda self: self.of.n)
    available = property(lambda self: self.of.available)

    @property
    def places(self) -> Sequence[tuple[int, int]] | None:
        return None if self.of.chunks is None else drawn(self.of.chunks)[: self.of.n]

    def slices(self) -> list[list[int]]:
        ends = list(accumulate(self.of.slices or [1] * self.of.n))
        return [list(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]

    def identity(self) -> dict[str, Any]:
        return dict(self.said)

    def score(self, llm: Any, items: Sequence[int]) -> list[float]:
        raise AssertionError("all items are scored")


class _NoModel:
    """What a sweep asks of a model that has nothing left to score."""

    loop: LoopSpec | None = None

    def __init__(self, n_layer: int) -> None:
        self._n_layer = n_layer

    def set_loop(self, loop: LoopSpec | None) -> None:
        pass

    def n_layer(self) -> int:
        return self._n_layer


def merge_sweeps(paths: Sequence[Path], out: Path | None = None, progress: Progress = silent) -> SweepResult:
    """The decision on all items. out: keep the journal of the whole there, as `run_sweep` would have.

    Raises UsageError for a journal named twice, GgufloopError for journals of different runs or that lack something.
    """
    headers = headers_of(paths)
    check_same(paths, headers)
    records, parts = [], []
    for path in paths:
        mine, part = _read(path)
        records += mine
        parts.append(part)
    for path, part in zip(paths[1:], parts[1:], strict=True):
        check_same_part(paths[0], parts[0], path, part)
    part = parts[0]
    measures = [_Kept(of, said) for of, said in zip(part.measures, headers[0]["measures"], strict=True)]
    _check_whole(measures, part.loops, records, shards_of(headers))
    note_devices([each.device for each in parts], progress)
    header = {name: value for name, value in headers[0].items() if name not in ("shard", "racing")}
    model = Path(headers[0]["model"])
    loops = [LoopSpec.parse(name) for name in part.loops]
    llm = cast(Any, _NoModel(part.n_layer))
    with ExitStack() as stack:
        folder = out / model.stem if out is not None else Path(stack.enter_context(TemporaryDirectory()))
        target = folder / file_name(KIND, None)
        with Journal.open(target, header, partial(check_record, measures)) as journal:
            take_scores(journal, records)
            outcomes = [
                sweep(llm, loops, cast(Any, measure), journal, seed=part.seed, racing=False, worth=worth,
                      level=LEVEL / len(measures), looks=part.looks)
                for measure, worth in zip(measures, part.worths, strict=True)
            ]  # fmt: skip
    costs = {str(loop): loop.relative_cost(part.n_layer) for loop in loops}
    return SweepResult(model, tuple(loops), part.seed, header, costs, tuple(outcomes))


def _read(path: Path) -> tuple[list[dict[str, Any]], SweepPart]:
    """The scores in a shard's journal, and what it is part of. Raises GgufloopError."""
    part: SweepPart | None = None

    def check(record: dict[str, Any]) -> None:
        nonlocal part
        if "part" in record:
            part = part_of(record)
        elif part is None:
            raise ValueError("no line before it says what shard it is")
        else:
            check_record([_Kept(of, {}) for of in part.measures], record)

    _, *records = Journal.lines(path, check, "journal of a sweep")
    if part is None:
        raise GgufloopError(f"{path} is of no shard.", "merge what --shard wrote.")
    return [record for record in records if "items" in record and "loop" in record], part


def check_same_part(first: Path, a: SweepPart, path: Path, b: SweepPart) -> None:
    """Raise GgufloopError naming the field if two shards are not of one sweep."""
    for name in ("loops", "seed", "worths", "looks", "n_layer", "measures"):
        if getattr(a, name) != getattr(b, name):
            raise GgufloopError(
                f"{first} and {path} are not of one run: {name} {'are' if name.endswith('s') else 'is'} "
                f"{short(getattr(a, name))} and {short(getattr(b, name))}.",
                "run the same sweep last in each shard.",
            )


def _check_whole(measures: Sequence[_Kept], loops: Sequence[str], records: Sequence[dict[str, Any]], of: int) -> None:
    """Raise GgufloopError if scores are missing, saying of which shard, or are there twice and differ."""
    known: dict[tuple[str, str, int], float] = {}
    for record in records:
        for i, score in zip(record["items"], record["scores"], strict=True):
            if known.setdefault((record["measure"], record["loop"], i), score) != score:
                raise GgufloopError(f"{record['loop']} scored item {i} of {record['measure']} twice, and differently.",
                                    "name each shard once, and no run by itself beside them.")  # fmt: skip
    missing: dict[str, int] = {}
    for measure in measures:
        for number, items in enumerate(measure.slices()):
            lacking = sum((measure.name, loop, i) not in known for loop in (PLAIN, *loops) for i in items)
            if lacking:
                shard = f"{number % of + 1}/{of}"
                missing[shard] = missing.get(shard, 0) + lacking
    check_missing(missing, "scores")
