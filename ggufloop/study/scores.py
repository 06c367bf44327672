"""Scores by item: what a protocol leaves behind, one row per question or chunk and loop, in a compressed csv.

    write(path, scores)                          # loads in pandas as well: pandas.read_csv("x.csv.xz")
    scores, gone = joined(read(path), found)     # loops stay beside the plain answers they were measured with
    for score in read(path): score.measure, score.loop, score.item, score.value

Everything that is said of a protocol's runs can be made again from these rows, without a model.
"""

from __future__ import annotations

import csv
import io
import lzma
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ggufloop.errors import GgufloopError
from ggufloop.files import atomic_file
from ggufloop.loop import PLAIN
from ggufloop.measure.endpoints import choice_log_probability, fit_temperature
from ggufloop.measure.eval_run import EvalResult
from ggufloop.measure.journal import Journal
from ggufloop.measure.longctx_run import LongPlan
from ggufloop.measure.sweep_run import SweepResult
from ggufloop.measure.tasks import Item
from ggufloop.measure.verdict import ACCURACY, NATS, RECALL
from ggufloop.study.file import Study

PLACEBO, NUDGED = "placebo", "nudged"
RULER = "ruler"


@dataclass(frozen=True)
class Score:
    """One item under one loop, by the loop's name in the protocol.

    unit     accuracy: value is 1 or 0; nats per token: the mean log-probability of a chunk's scored tokens; recall: the
             share of what RULER asks for that was found
    item     number of the question or sample, after its task, or of the chunk, after its text's
    choice   choice log-probability in nats, NaN where no answers are offered
    letter   which answer was chosen, of n_choices; -1 where none is offered
    norm     1 or 0 as well: right by lm-eval's acc_norm, NaN where the task has none
    """

    model: str
    measure: str
    unit: str
    loop: str
    settings: str
    item: str
    value: float
    choice: float = math.nan
    letter: int = -1
    n_choices: int = 0
    norm: float = math.nan

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is of."""
        return self.measure, self.loop, self.item


def of_eval(model: str, result: EvalResult, names: Mapping[str, str]) -> Iterator[Score]:
    """The scores of an evaluation. names: of its loops; one that has none is the loop with its damping moved."""
    for measure in next(iter(result.runs.values())).items:
        plain = next(iter(result.runs.values())).items[measure]
        temperature = _temperature(plain)
        for loop, run in result.runs.items():
            name = names.get(loop, PLAIN if loop == PLAIN else NUDGED)
            for item, choice in zip(run.items[measure], _choices(run.items[measure], temperature), strict=True):
                letter = int(np.argmax(item.answers)) if item.answers else -1
                norm = math.nan if item.norm is None else item.norm
                yield Score(model, measure, ACCURACY, name, loop, f"{item.task} {item.doc}", item.right, choice, letter,
                            len(item.answers), norm)  # fmt: skip


def _temperature(plain: Sequence[Item]) -> float:
    gold = [item.target for item in plain if item.target is not None]
    scored = len(gold) == len(plain) and all(math.isfinite(a) for item in plain for a in item.answers)
    return fit_temperature([item.answers for item in plain], gold) if scored else math.nan


def _choices(items: Sequence[Item], temperature: float) -> list[float]:
    gold = [item.target for item in items if item.target is not None]
    if math.isnan(temperature) or len(gold) < len(items):
        return [math.nan] * len(items)
    return [float(x) for x in choice_log_probability([item.answers for item in items], gold, temperature)]


def of_sweep(model: str, result: SweepResult, journal: Path, names: Mapping[str, str]) -> Iterator[Score]:
    """The scores of a sweep of one text, from its journal; those of loops that have no name were not asked for."""
    places = result.outcomes[0].measure.places or ()
    for record in Journal.lines(journal)[1:]:
        name = _name(record.get("loop", ""), names)
        if "scores" in record and name:
            for i, value in zip(record["items"], record["scores"], strict=True):
                yield Score(model, record["measure"], NATS, name, record["loop"], "{} {}".format(*places[i]), value)


def of_study(model: str, study: Study, names: Mapping[str, str]) -> Iterator[Score]:
    """The scores of a ladder on one text, a measure for each of its files."""
    for (type_, loop), cell in study.cells.items():
        name, measure = _name(loop, names), f"{study.header.text} {type_}"
        for chunk in cell.chunks if name else ():
            yield Score(model, measure, NATS, name, loop, f"0 {chunk.index}", -chunk.nll)


def of_long(model: str, plan: LongPlan, journal: Path, names: Mapping[str, str]) -> Iterator[Score]:
    """The scores of RULER's tasks from their journal, a measure for each length."""
    for record in Journal.lines(journal)[1:]:
        name = _name(record["loop"], names)
        asked = record["length"] in plan.lengths and record["task"] in plan.tasks and record["sample"] < plan.n
        if name and asked:
            item = f"{record['task']} {record['sample']}"
            yield Score(model, f"{RULER} {record['length']}", RECALL, name, record["loop"], item, record["score"])


def _name(loop: str, names: Mapping[str, str]) -> str:
    """What a protocol calls a loop, '' for one that an earlier call asked for."""
    return PLAIN if loop == PLAIN else names.get(loop, "")


def joined(kept: Iterable[Score], found: Iterable[Score]) -> tuple[list[Score], list[str]]:
    """Scores of an earlier run and of a new one, and what had to go, as 'MEASURE: LOOP'.

    Plain answers that were computed elsewhere are rounded otherwise. Loops that were measured beside others than the
    new ones are not compared with these: they go.
    """
    old, new = {s.key: s for s in kept}, {s.key: s for s in found}
    changed = {key[0] for key, s in new.items() if key in old and s.loop == PLAIN and not _alike(s, old[key])}
    gone = {key: None for key in old if key[0] in changed and key not in new}
    left = {key: s for key, s in old.items() if key not in gone}
    return list((left | new).values()), list(dict.fromkeys(f"{measure}: {loop}" for measure, loop, _ in gone))


def _alike(a: Score, b: Score) -> bool:
    """Whether both were computed alike: another CPU's or other batches' roundings differ by a hundredth of a nat."""
    near = all(x == y or abs(x - y) < 1e-4 or math.isnan(x + y) for x, y in ((a.value, b.value), (a.choice, b.choice)))
    return near and a.letter == b.letter


def _row(score: Score) -> list[Any]:
    return [f"{value:.6g}" if isinstance(value, float) else value for value in astuple(score)]


def write(path: Path, scores: Iterable[Score]) -> None:
    """Raises GgufloopError if it cannot be written."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([field.name for field in fields(Score)])
    for score in sorted(scores, key=lambda s: (s.model, s.measure, s.loop, s.item)):
        rows.writerow(_row(score))
    with atomic_file(path) as partial:
        partial.write_bytes(lzma.compress(text.getvalue().encode()))


def read(path: Path) -> list[Score]:
    """Raises GgufloopError for a file that is none."""
    try:
        rows = csv.DictReader(io.StringIO(lzma.decompress(path.read_bytes()).decode()))
        kinds = {field.name: {"str": str, "int": int, "float": float}[str(field.type)] for field in fields(Score)}
        names = rows.fieldnames or ()  # of a file written before there was acc_norm
        kinds = {name: kind for name, kind in kinds.items() if name in names or name != "norm"}
        return [Score(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in rows]
    except OSError as e:
        raise GgufloopError(f"cannot read {path}: {e.strerror}.", "name a file that `study run` wrote.") from None
    except (lzma.LZMAError, ValueError, KeyError, TypeError) as e:
        raise GgufloopError(f"{path} holds no scores: {e!r}.", "name a file that `study run` wrote.") from None
