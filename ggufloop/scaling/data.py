"""Measured losses over model size and training tokens: what a law is fitted to, read from CSV, JSON or by name.

    data = read("pythia")                        # the example that is shipped, or a file
    pooled = together(data.levels)

A level is one perturbation, such as 4 bits: the Shannon law is fitted anew for each. Sizes and tokens are in billions.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufloop import reading
from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.measure.stats import Values

EXAMPLES = {"pythia": "pythia_quantised_loss.json"}
"""Data sets that are shipped, by name."""

FULL_BITS = 16.0
"""Bits per weight of a level that names none: what is not quantised is 16-bit floats."""

COUNTS = ("total", "non-embedding")
"""What N may count."""

_COLUMNS = {
    "N": ("n", "size", "params", "parameters", "params_b", "n_b"),
    "N_total": ("n_total", "total", "total_params", "params_total"),
    "N_non_embedding": ("n_non_embedding", "non_embedding", "non_embedding_params", "n_nonembedding"),
    "D": ("d", "tokens", "train_tokens", "tokens_b", "d_b"),
    "loss": ("loss", "nll", "ce", "cross_entropy"),
    "bits": ("bits", "x", "bits_per_weight"),
}
MOST_BITS, MOST_LOSS = 64.0, 1000.0
"""A weight has no more bits, and a loss in nats per token stays far below: a uniform guess among a million is 14."""
LARGEST = 64 << 20
"""Bytes of a file of numbers."""
_REPEATS = 3
_COUNT = 1e4  # billions of parameters or tokens that nobody has: a column above is of single ones


@dataclass(frozen=True)
class Data:
    """What a file holds: levels, most bits first, what N counts, and where the file says it is from ('' if nowhere)."""

    name: str
    levels: list[Points]
    count: str
    source: str


@dataclass(frozen=True)
class Points:
    """Losses of one level, or of several pooled.

    n, d    natural logarithms of size and tokens, both in billions
    loss    nats per token
    bits    bits per weight of each point
    level   what the level is called
    """

    n: Values
    d: Values
    loss: Values
    bits: Values
    level: str

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def sizes(self) -> Values:
        """The different ln N, ascending."""
        return np.unique(self.n)

    @property
    def budgets(self) -> Values:
        """The different ln D, ascending."""
        return np.unique(self.d)

    @property
    def censored(self) -> NDArray[np.bool_]:
        """Losses that are the edge of a figure's colour bar: the level's least or greatest, at three points or more.

        What is measured does not repeat itself to the last digit there; what lies beyond the bar reads as its end.
        """
        edges = [v for v in (self.loss.min(), self.loss.max()) if np.count_nonzero(self.loss == v) >= _REPEATS]
        return np.isin(self.loss, edges)

    def where(self, mask: NDArray[np.bool_]) -> Points:
        """Some of the points."""
        return Points(self.n[mask], self.d[mask], self.loss[mask], self.bits[mask], self.level)


def together(levels: Sequence[Points]) -> Points:
    """All levels as one."""
    n, d, loss, bits = (np.concatenate([getattr(p, name) for p in levels]) for name in ("n", "d", "loss", "bits"))
    return Points(n, d, loss, bits, "all levels")


def read(source: str, count: str | None = None) -> Data:
    """A data set: a name of EXAMPLES, a JSON file, or a CSV file with the columns N, D, loss and perhaps bits.

    JSON is a list of records with the same names, or sizes and sets of tokens and losses, as the example has them. A
    column N or D that is written out in single parameters or tokens is divided by a billion.
    count: what N is to count, one of COUNTS. It chooses between the columns N_total and N_non_embedding; of a column N
    it is what the caller says it is, 'total' if nothing is said.

    Raises GgufloopError if it cannot be read, UsageError for what no model can have.
    """
    if count is not None and count not in COUNTS:
        raise UsageError(f"N may not count {count!r}.", nearest(count, COUNTS))
    text = text_of(source, EXAMPLES, "give a CSV or JSON file, or 'pythia'.")
    if text.lstrip()[:1] in ("{", "["):
        data = _from_json(text, source, count)
    else:
        remarks, rows = table(text, source, "give a header N,D,loss[,bits] and a row per checkpoint.")
        data = replace(_levels(rows, source, count), source=remarks)
    for level in data.levels:
        _check(level, source)
    return replace(data, levels=sorted(data.levels, key=lambda p: -float(p.bits[0])))


def text_of(source: str, examples: Mapping[str, str], give: str) -> str:
    """The text of an example by name, or of a file of numbers, which may be a pipe. give: what to name instead.

    Raises GgufloopError.
    """
    if source in examples:
        return (resources.files("ggufloop.scaling") / "examples" / examples[source]).read_text(encoding="utf-8")
    hint = give if Path(source).suffix else nearest(source, examples)
    try:
        with Path(source).open("rb") as f:
            data = f.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise GgufloopError(f"cannot read {source}: it is over {LARGEST >> 20} MiB.", hint)
        return reading.text(data)
    except (OSError, ValueError) as e:
        raise GgufloopError(f"cannot read {source}: {getattr(e, 'strerror', None) or e}.", hint) from e


def table(text: str, source: str, head: str) -> tuple[str, list[dict[str, str]]]:
    """The remarks of a CSV file, which begin with #, and its rows by column. head: what to ask for.

    Raises UsageError for no row, or one of another length than the header.
    """
    lines = text.splitlines()
    remarks = " ".join(line.lstrip("# ").strip() for line in lines if line.startswith("#"))
    reader = csv.reader(line for line in lines if line.strip() and not line.startswith("#"))
    try:
        names, *rows = list(reader) or [[]]
    except csv.Error as e:
        raise UsageError(f"{source} is no CSV: {e}.", head) from e
    if not rows:
        raise UsageError(f"{source} has no rows.", head)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{source} has the column {reading.shown(twice)} twice.", "name every column once.")
    if any(len(row) != len(names) for row in rows):
        raise UsageError(f"{source} has rows of another length than its header.", "give every row each column.")
    return remarks, [dict(zip(names, row, strict=True)) for row in rows]


def column_names(names: Iterable[Any], aliases: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Which of a file's columns is which of `aliases`, case, spaces and hyphens aside; None for one it has not."""
    folded = {str(name).strip().lower().replace("-", "_").replace(" ", "_"): name for name in names}
    return {key: next((folded[name] for name in known if name in folded), None) for key, known in aliases.items()}


def lacking(source: str, name: str, names: Iterable[Any], needed: str) -> UsageError:
    """What to say of a file without this column."""
    others = nearest(name.lower(), [str(name).strip() for name in names]).removeprefix("known: ")
    return UsageError(f"{source} has no column {name}.", f"its columns: {others} Needed: {needed}.")


def number(value: Any, what: str) -> float:
    """A cell as a number. Raises UsageError."""
    try:
        return float(str(value))
    except ValueError:
        raise UsageError(f"{what} {reading.shown(value)} is not a number.", "correct or drop it.") from None


def choose(levels: Sequence[Points], names: Sequence[str]) -> list[Points]:
    """The levels of these names, all if none is given. Raises UsageError."""
    known = {p.level: p for p in levels}
    for name in names:
        if name not in known:
            raise UsageError(f"level {name!r} is not in this data.", nearest(name, known))
    return [known[name] for name in names] if names else list(levels)


def _from_json(text: str, source: str, count: str | None) -> Data:
    try:
        data = reading.json(text)
    except ValueError as e:
        raise GgufloopError(f"{source} is not JSON: {e}.", "give a list of records with N, D and loss.") from e
    if isinstance(data, list):
        if not all(isinstance(row, dict) for row in data):
            raise UsageError(f"{source} is not a list of records.", 'give [{"N": 0.16, "D": 4.2, "loss": 4.6}, ...].')
        return _levels([{str(k): v for k, v in row.items()} for row in data], source, count)
    missing = [key for key in ("sizes", "sets") if key not in data]
    if missing:
        raise UsageError(
            f"{source} has no {missing[0]!r}.", "give a list of records, or sizes and sets of tokens and loss."
        )
    units = str(data.get("units", {}))
    counts = next((c for c in reversed(COUNTS) if c in units), None)
    if count and counts and count != counts:
        raise UsageError(f"the sizes of {source} are {counts} parameters.", f"leave out --n {count}.")
    try:
        sets = [_grid(str(name), data["sizes"], block["tokens"], block["loss"]) for name, block in data["sets"].items()]
        return Data(source, sets, count or counts or COUNTS[0], str(data.get("source", "")))
    except KeyError as e:
        raise UsageError(f"a set of {source} has no {e}.", "each needs tokens and loss, a row per size.") from e
    except (TypeError, AttributeError):
        raise UsageError(
            f"the sets of {source} are no records.", 'give {"4-bit": {"tokens": [...], "loss": [[...]]}}.'
        ) from None


def _grid(name: str, sizes: Any, tokens: Any, loss: Any) -> Points:
    try:
        n, d, y = (np.asarray(x, np.float64) for x in (sizes, tokens, loss))
    except (ValueError, TypeError, OverflowError) as e:
        raise UsageError(f"set {_name(name)} holds what is no number.", "give a row of losses per size.") from e
    if not n.ndim == d.ndim == 1 or not n.size or not d.size:
        raise UsageError(f"the sizes and tokens of set {_name(name)} are no lists.", "give a row of losses per size.")
    if y.shape != (len(n), len(d)):
        raise UsageError(
            f"set {_name(name)} has losses of shape {y.shape}.", f"{len(n)} sizes x {len(d)} tokens are needed."
        )
    found = re.search(r"(\d+(?:\.\d+)?)[ -]?bit", name)
    bits = float(found[1]) if found else FULL_BITS
    size, budget = np.meshgrid(n, d, indexing="ij")
    return _points(size.ravel(), budget.ravel(), y.ravel(), np.full(y.size, bits), name)


def _name(level: str) -> str:
    """A level as a message names it."""
    return level if level.isprintable() and len(level) <= 60 else reading.shown(level)


def _levels(rows: Sequence[dict[str, Any]], source: str, count: str | None) -> Data:
    """Records grouped by their bits."""
    if not rows:
        raise UsageError(f"{source} has no records.", "give N, D and loss of each checkpoint.")
    have = list(dict.fromkeys(k for row in rows for k in row))
    column = column_names(have, _COLUMNS)
    counted = {c: column[f"N_{c.replace('-', '_')}"] for c in COUNTS}
    known, plain = [c for c in COUNTS if counted[c]], column["N"]
    if known and count and count not in known and (plain is None or count != COUNTS[0]):
        raise UsageError(f"{source} has no column of {count} parameters.", f"leave out --n, or give --n {known[0]}.")
    size = counted[count] if count else plain
    count = count or (COUNTS[0] if plain or not known else known[0])
    names = {"N": size or counted[count], **{name: column[name] for name in ("D", "loss", "bits")}}
    for name, key in names.items():
        if key is None and name != "bits":
            raise lacking(source, name, have, "N, D, loss")

    def values(name: str) -> Values:
        cells = [row.get(names[name]) for row in rows]
        empty = (None, "") if name == "bits" else ()
        return np.array([FULL_BITS if cell in empty else number(cell, f"row {i} of {source}: {name}")
                         for i, cell in enumerate(cells, 1)])  # fmt: skip

    n, d = (_billions(values(name), name, source) for name in ("N", "D"))
    y, bits = values("loss"), values("bits")
    good = (bits > 0) & (bits <= MOST_BITS)
    if not good.all():
        wanted = "above 0" if not bits[~good][0] > 0 else f"at most {MOST_BITS:g}"
        raise UsageError(
            f"{source}: {bits[~good][0]:g} bits are not {wanted}.", "leave the cell empty for full precision."
        )
    out = []
    for level in np.unique(bits):
        mine = bits == level
        out.append(_points(n[mine], d[mine], y[mine], bits[mine], f"{level:g}-bit" if names["bits"] else "all"))
    return Data(source, out, count, "")


def _billions(x: Values, name: str, source: str) -> Values:
    """A column in billions, whether it is written so or as a count."""
    if x.max() <= _COUNT:
        return x
    if x.min() <= _COUNT:
        raise UsageError(
            f"{source}: {name} goes from {x.min():g} to {x.max():g}, billions and counts in one column.",
            "write all of it in billions.",
        )
    return np.asarray(x / 1e9)


def _points(n: Values, d: Values, y: Values, bits: Values, level: str) -> Points:
    with np.errstate(divide="ignore", invalid="ignore"):
        return Points(np.log(n), np.log(d), y, bits, level)


def _check(p: Points, source: str) -> None:
    """Raise UsageError for values no checkpoint has, one size, or one budget."""
    for name, logs in (("N", p.n), ("D", p.d)):
        bad = ~np.isfinite(logs)
        if bad.any():
            raise UsageError(
                f"{source}: {int(bad.sum())} of {len(p)} {name} in {p.level} are not positive numbers.",
                "give billions; drop checkpoints without training.",
            )
    bad = ~(np.isfinite(p.loss) & (p.loss > 0) & (p.loss < MOST_LOSS))
    if bad.any():
        what = "a loss" if p.loss[bad][0] >= MOST_LOSS else "a positive number"
        raise UsageError(
            f"{source}: loss {p.loss[bad][0]:g} in {p.level} is not {what} ({int(bad.sum())} of {len(p)}).",
            "a loss is nats per token, above 0; find out why, or drop the checkpoint.",
        )
    for what, found in (("size", p.sizes), ("token budget", p.budgets)):
        if len(found) == 1:
            raise UsageError(
                f"{p.level} of {source} has one {what}: a law over size and tokens needs 3 of each at least, "
                f"of 8 parameters 4 sizes x 8 budgets.",
                "one checkpoint at several bit widths is what `ggufloop shannon ladder` fits.",
            )
