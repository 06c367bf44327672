"""The journal of an evaluation: what was registered before the first question, then the answers, slice by slice.

    with open_journal(path, header, slices_of(tasks, limit)) as kept:
        kept.begin(Started(("plain", "12:16 k=2"), True, "CPU ...", 2))
        evaluate(llm, tasks, limit, answers=kept.answers)

The first line says what the answers are of: model, library, settings, tasks with their versions, and which measure is
to decide (`registered`). Each run writes a line of its own before its first answer: its loops, and on what device.
Loops are not in the header, so that a second one finds the plain answers there.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufloop import reading
from ggufloop.measure.journal import Journal, beside
from ggufloop.measure.slices import Answered, Answers, Slice, check_answered
from ggufloop.measure.verdict import ACCURACY, CHOICE, LEVEL, WORTHS
from ggufloop.progress import Progress, silent

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

KIND, SCHEMA_VERSION = "eval", 1
_WHAT = "journal of an evaluation"


@dataclass(frozen=True)
class Started:
    """A line of the journal: a run began, under these loops, on this device. paired: the first is plain, and the second
    is compared with it; a third is the second once more, its damping moved."""

    loops: tuple[str, ...]
    paired: bool
    device: str
    threads: int


class EvalJournal:
    """An open journal. answers: those in it, and where others go; devices: of the runs before; dropped: what could not
    be read, '' if nothing."""

    def __init__(self, journal: Journal, records: Sequence[Started | Answered]) -> None:
        self._journal = journal
        runs = [record for record in records if isinstance(record, Started)]
        self._last = runs[-1] if runs else None
        self.devices = [run.device for run in runs]
        self.answers = Answers((r for r in records if isinstance(r, Answered)), lambda a: journal.add(asdict(a)))
        self.dropped = journal.dropped

    def take_over(
        self, path: Path, header: Mapping[str, Any], slices: Sequence[Slice], progress: Progress = silent
    ) -> None:
        """Take the answers of shards whose journals lie beside this one. Raises GgufloopError for a damaged one."""
        known = {(each.task, each.start): each for each in slices}
        for shard in beside(path, header, progress):
            for record in read_journal(shard, known)[1]:
                if isinstance(record, Started):
                    if record.device not in self.devices:  # kept, for when the shards are gone
                        self.devices.append(record.device)
                        self.begin(record)
                elif self.answers.find(record.loop, record.task, record.start, record.kind) is None:
                    self.answers.add(record)

    def begin(self, started: Started) -> None:
        """Note a run, unless it is the last one that goes on."""
        if started != self._last:
            self._journal.add(asdict(started))


def registered() -> dict[str, Any]:
    """For a journal's header: what will decide, and by what; anyone can read it."""
    return {"primary": ACCURACY, "worth": WORTHS[ACCURACY], "level": LEVEL, "looks": 1, "secondary": [CHOICE]}


@contextmanager
def open_journal(path: Path, header: Mapping[str, Any], slices: Sequence[Slice]) -> Iterator[EvalJournal]:
    """Continue the journal at `path`, or begin it. Raises GgufloopError as `Journal.open`."""
    known = {(each.task, each.start): each for each in slices}
    with Journal.open(path, header, lambda record: parse(record, known), what=_WHAT) as journal:
        yield EvalJournal(journal, [parse(record, known) for record in journal.records])


def read_journal(
    path: Path, slices: Mapping[tuple[str, int], Slice]
) -> tuple[dict[str, Any], list[Started | Answered]]:
    """The header and the other lines of a journal that may still be written. Raises GgufloopError."""
    header, *records = Journal.lines(path, lambda record: parse(record, slices), what=_WHAT)
    return header, [parse(record, slices) for record in records]


def parse(record: dict[str, Any], slices: Mapping[tuple[str, int], Slice]) -> Started | Answered:
    """A line after the first. Raises ValueError for one that no run over these slices has written."""
    if "loops" in record:
        return reading.build(Started, record)
    answered = reading.build(Answered, record)
    check_answered(slices, answered)
    return answered


def device_of(llm: LoopedLlama) -> str:
    """What computes, in words: the devices that hold layers, or the processor."""
    if llm.devices:
        return ", ".join(f"{device.name} ({device.description})" for device in llm.devices)
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            found = re.search(r"^model name\s*: (.*)$", f.read(16384), re.MULTILINE)
        name = found[1].strip() if found else name
    return f"CPU ({name})"
