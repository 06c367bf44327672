"""KLD against bytes: which files are worth their size, on one text or on several.

    for p in points(study): print(p.file.type, p.file.nbytes, p.kld, p.front)
    table([study_on_wiki, study_on_code]).render("md")             # a row per text and file
    summary([study_on_wiki, study_on_code])                        # in sentences

Of plain files: a looped file's KLD is from the looped reference, another base. A file is on the Pareto front if no
other is smaller, or as small, and nearer to the reference. That is of the means; whether one that is not on it is
really beaten, the paired difference on the same chunks says, which are neighbours in one text (`chunk_mean`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ggufloop.loop import PLAIN
from ggufloop.measure.dependence import chunk_mean
from ggufloop.measure.stats import Estimate
from ggufloop.study.file import Cell, File, Study
from ggufloop.table import Cell as TableCell
from ggufloop.table import Column, Table

ON, UNSURE = "yes", "cannot tell"


@dataclass(frozen=True)
class SizePoint:
    """A plain file. kld: to the reference, nats per token, over chunks; best: on the front, by means; beaten_by: the
    best of the files that are no larger and nearer with a 95 % interval of the difference above 0, '' if none is."""

    file: File
    kld: Estimate
    best: bool
    beaten_by: str

    @property
    def front(self) -> str:
        """In a word: yes, no with the file that beats it, or cannot tell."""
        return ON if self.best else f"no: {self.beaten_by}" if self.beaten_by else UNSURE


def points(study: Study) -> list[SizePoint]:
    """The plain files but the reference, the smallest first, on the chunks that all have; none below two chunks."""
    keys = [(t, PLAIN) for t in study.types[1:] if len(study.cells[t, PLAIN].chunks) > 1]
    cells = study.paired(*keys) if keys else ()
    if not cells or len(cells[0].chunks) < 2:
        return []
    known = [(study.file(cell.type), cell) for cell in cells]
    known.sort(key=lambda pair: (pair[0].nbytes, pair[1].mean("kl")))
    return [_point(file, cell, known) for file, cell in known]


def _point(file: File, cell: Cell, known: Sequence[tuple[File, Cell]]) -> SizePoint:
    mine = cell.mean("kl")
    rivals = [(f, c) for f, c in known if f is not file and f.nbytes <= file.nbytes and c.mean("kl") <= mine]
    above = [(f, c) for f, c in rivals if f.nbytes < file.nbytes or c.mean("kl") < mine]
    sure = [(c.mean("kl"), f.type) for f, c in above if _more(cell, c).low > 0]
    return SizePoint(file, chunk_mean(cell.values("kl")), not above, min(sure)[1] if sure else "")


def _more(cell: Cell, other: Cell) -> Estimate:
    """What a cell's KLD is more than another's, over neighbouring chunks."""
    return chunk_mean(cell.values("kl") - other.values("kl"))


def table(studies: Sequence[Study]) -> Table:
    """A row per text and file, intervals 95 %."""
    columns = (Column("text"), Column("type"), Column("MiB", ".1f"), Column("bits", ".2f"), Column("KLD"),
               Column("front"))  # fmt: skip
    rows: list[list[TableCell]] = []
    for study in studies:
        for p in points(study):
            kld = f"{p.kld.mean:.4f} [{p.kld.low:.4f}, {p.kld.high:.4f}]"
            rows.append([study.header.text, p.file.type, p.file.nbytes / 2**20, p.file.bits_per_weight, kld, p.front])
    return Table(columns, rows)


def numbers(studies: Sequence[Study]) -> Table:
    """The same for programs, every number in a column of its own."""
    names = ("model", "text", "type", "bytes", "bits per weight", "chunks", "KLD", "KLD low", "KLD high", "front",
             "beaten by")  # fmt: skip
    rows: list[list[TableCell]] = []
    for s in studies:
        for p in points(s):
            rows.append([s.header.model, s.header.text, p.file.type, p.file.nbytes, p.file.bits_per_weight, p.kld.n,
                         p.kld.mean, p.kld.low, p.kld.high, p.best, p.beaten_by or None])  # fmt: skip
    return Table(tuple(Column(name) for name in names), rows)


def summary(studies: Sequence[Study]) -> list[str]:
    """The front of each text, and what is on all of them, a sentence each; none without files to compare."""
    fronts = {s.header.text: [p.file.type for p in found if p.best] for s in studies if len(found := points(s)) > 1}
    out = [f"front of {text}: {', '.join(types)}." for text, types in fronts.items()]
    if len(fronts) > 1:
        shared = [t for t in next(iter(fronts.values())) if all(t in types for types in fronts.values())]
        out.append(f"on the front of all {len(fronts)} texts: {', '.join(shared) or 'none'}.")
    if out:
        out.append("on the front no file as small is nearer to the reference, by means; 'cannot tell': the 95 % "
                   "interval of no paired difference, over neighbouring chunks, shows that.")  # fmt: skip
    return out
