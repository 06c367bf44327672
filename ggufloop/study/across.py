"""A loop, or the next file up? Each file under each loop against the plain files that are larger, on the same chunks.

    for c in across(study): print(c.file.type, c.loop, c.other.type, c.gain.mean)     # above 0: this one is better
    table([study]).render("md")
    summary([study])                                               # in sentences

Pairs by chunk, which are neighbours in one text (`dependence.paired_mean`), log-probability per token. Against each
larger file the loops of a file are judged together (Holm), so that the best of several is not taken for granted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ggufloop.loop import PLAIN
from ggufloop.measure.stats import PairedEstimate
from ggufloop.measure.verdict import HELPS, HURTS, SAME, UNSURE
from ggufloop.study.analysis import WORTH, judged
from ggufloop.study.file import File, Study
from ggufloop.table import Cell as TableCell
from ggufloop.table import Column, Table

BETTER, WORSE = "better", "worse"
_WORDS = {HELPS: BETTER, HURTS: WORSE, SAME: f"{SAME} {WORTH:g}", UNSURE: UNSURE}


@dataclass(frozen=True)
class AcrossFiles:
    """A file under a loop, or plain, minus the plain `other`, which is larger.

    gain: nats per token, above 0 the smaller file is better, its interval at a level for all loops of the file
    together; p: corrected by Holm over them; word: better, worse, no effect larger than `WORTH`, cannot tell.
    """

    file: File
    loop: str
    other: File
    gain: PairedEstimate
    p: float
    word: str

    @property
    def sentence(self) -> str:
        """`Q4_0 12:14 k=2 minus Q5_K_M plain = +0.0290 [+0.0080, +0.0500], n = 8 chunks: better`."""
        return (f"{self.file.type} {self.loop} minus {self.other.type} {PLAIN} = {self.gain.show('+.4f')} chunks: "
                f"{self.word}")  # fmt: skip


def across(study: Study) -> list[AcrossFiles]:
    """Every file under every loop against every larger plain file of other weights, the smallest file first; those
    that share fewer than two chunks are left out."""
    plain = [t for t in study.types if (t, PLAIN) in study.cells and study.same_weights(t) is None]
    plain.sort(key=lambda t: study.file(t).nbytes)
    found = []
    for i, type_ in enumerate(plain):
        loops = [loop for loop in study.loops if (type_, loop) in study.cells]
        for other in plain[i + 1 :]:
            if study.file(other).nbytes > study.file(type_).nbytes:
                found += _against(study, type_, loops, other)
    return found


def _against(study: Study, type_: str, loops: Sequence[str], other: str) -> list[AcrossFiles]:
    """The loops of a file against one plain file. The plain file itself is a question of its own."""
    diffs = {}
    for loop in loops:
        mine, theirs = study.paired((type_, loop), (other, PLAIN))
        if len(mine.chunks) > 1:
            diffs[loop] = theirs.values("nll") - mine.values("nll")
    looped = {loop: x for loop, x in diffs.items() if loop != PLAIN}
    said = judged({loop: x for loop, x in diffs.items() if loop == PLAIN}) | judged(looped)
    return [AcrossFiles(study.file(type_), loop, study.file(other), v.gain, v.p, _WORDS[v.word])
            for loop, v in said.items()]  # fmt: skip


def nearest(study: Study) -> list[AcrossFiles]:
    """Of each file and loop the comparison with the next larger plain file alone."""
    pairs = groupby(across(study), key=lambda c: c.file.type)
    return [c for _, some in pairs for of_file in [list(some)] for c in of_file if c.other is of_file[0].other]


def table(studies: Sequence[Study]) -> Table:
    """A row per file, loop and next larger file, for eyes."""
    columns = (Column("text"), Column("file"), Column("loop"), Column("minus, plain"), Column("MiB saved", ".1f"),
               Column("nats per token"), Column("chunks"), Column("word"))  # fmt: skip
    rows: list[list[TableCell]] = [
        [s.header.text, c.file.type, c.loop, c.other.type, (c.other.nbytes - c.file.nbytes) / 2**20,
         f"{c.gain.mean:+.4f} [{c.gain.low:+.4f}, {c.gain.high:+.4f}]", c.gain.n, c.word]
        for s in studies for c in nearest(s)
    ]  # fmt: skip
    return Table(columns, rows)


def numbers(studies: Sequence[Study]) -> Table:
    """Every pair, every number in a column of its own, for programs."""
    names = ("model", "text", "type", "loop", "bytes", "other", "other bytes", "gain", "gain low", "gain high",
             "p (Holm)", "chunks", "verdict")  # fmt: skip
    rows: list[list[TableCell]] = [
        [s.header.model, s.header.text, c.file.type, c.loop, c.file.nbytes, c.other.type, c.other.nbytes, c.gain.mean,
         c.gain.low, c.gain.high, c.p, c.gain.n, c.word]
        for s in studies for c in across(s)
    ]  # fmt: skip
    return Table(tuple(Column(name) for name in names), rows)


def summary(studies: Sequence[Study]) -> list[str]:
    """For how many files a loop replaces the next larger one, in a sentence, and each that does; none without pairs."""
    out = []
    for s in studies:
        looped = [c for c in nearest(s) if c.loop != PLAIN]
        if not looped:
            continue
        counts = {word: sum(c.word == word for c in looped) for word in (BETTER, WORSE)}
        rest = len(looped) - sum(counts.values())
        out.append(f"{s.header.text}: a file under a loop against the next larger one plain, {len(looped)} pairs: "
                   f"{counts[BETTER]} better, {counts[WORSE]} worse, {rest} not told apart.")  # fmt: skip
        out += [f"{c.sentence}." for c in looped if c.word == BETTER]
    return out
