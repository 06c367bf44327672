"""Does a signal that needs no labels tell which window gains? Every window of four layers, on one text and on another.

    python3 scripts/bootstrap.py python scripts/signals.py smollm2-135m --save docs/data/signals/smollm2-135m.csv
    python3 scripts/bootstrap.py python scripts/signals.py --read docs/data/signals/*.csv           # without a model

Of each window under damped Euler, K=3: its gain in nats per token over plain on chunks of one text, and signals on
tokens of another, which nobody has to label. Means over tokens:

    step        how far the window moves the state that enters it, ||g(x) - x|| / ||x||
    growth      the step of the last pass over that of the first; above 1 the loop is leaving
    cosine      of the state that leaves the last pass and the one that enters it
    coherence   of what enters and what leaves each layer of the window in the plain model, mean of their cosines
    entropy     of the looped model's predictions minus the plain one's, nats
    kl          KL(plain || looped) of the predictions, nats

    edge        layers between the window and the nearer end of the model: what depth alone would say

Each is ranked against the gain (Spearman). Neighbouring windows share three layers of four, so the interval is that of
a circular block bootstrap over runs of four windows.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggufloop.backend.settings import ContextSettings
from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError
from ggufloop.files import atomic_file
from ggufloop.logits import log_softmax
from ggufloop.loop import LoopSpec
from ggufloop.measure.corpus import local
from ggufloop.measure.stats import Estimate
from ggufloop.measure.sweep_run import SweepPlan, run_sweep
from ggufloop.measure.trace import ENTER, LEAVE, trace
from ggufloop.models.info import describe
from ggufloop.models.registry import resolve
from ggufloop.opening import open_model
from ggufloop.table import Cell, Column, Table

WIDTH, K = 4, 3
RESAMPLES = 10_000
SIGNALS = ("step", "growth", "cosine", "coherence", "entropy", "kl", "edge")
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """A window of a model: gain with its interval for all windows together, and the signals."""

    model: str
    window: str
    n: int
    gain: float
    low: float
    high: float
    step: float
    growth: float
    cosine: float
    coherence: float
    entropy: float
    kl: float
    edge: int


def ranks(x: ArrayLike) -> Values:
    """From 1; equal values share the mean of their ranks."""
    values = np.asarray(x, dtype=np.float64)
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[where].astype(np.float64)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation; 0 where one of the two does not vary."""
    a, b = (ranks(each) - ranks(each).mean() for each in (x, y))
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else 0.0


def correlation(x: Sequence[float], y: Sequence[float], block: int = WIDTH, seed: int = 0) -> Estimate:
    """Spearman's, with the 95 % percentile interval of a circular block bootstrap over neighbours (Politis and Romano
    1992)."""
    a, b, n = np.asarray(x), np.asarray(y), len(x)
    starts = np.random.default_rng(seed).integers(n, size=(RESAMPLES, -(-n // block)))
    rows = ((starts[:, :, None] + np.arange(block)) % n).reshape(RESAMPLES, -1)[:, :n]
    low, high = np.quantile([spearman(a[row], b[row]) for row in rows], (0.025, 0.975))
    return Estimate(spearman(a, b), float(low), float(high), n, 0.95)


def windows_of(path: Path) -> list[LoopSpec]:
    """All windows between the first layer and the last."""
    return [LoopSpec((start, start + WIDTH), K) for start in range(1, describe(path).n_layer - WIDTH)]


def cosine(a: ArrayLike, b: ArrayLike) -> float:
    """Mean over rows."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(((x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))).mean())


def signals(llm: LoopedLlama, tokens: Sequence[int], loops: Sequence[LoopSpec]) -> list[dict[str, float]]:
    """Of each loop, on one batch of tokens."""
    llm.set_loop(None)
    outputs = {state.layer: state.rows for state in llm.trace(tokens)}
    plain = predictions(llm, tokens)
    found = []
    for loop in loops:
        llm.set_loop(loop)
        moved = trace(llm, tokens, lens=False)
        first, last = moved.steps[0].size, moved.steps[-1].size
        turned = [p.cosine.mean for p in moved.points if p.kind in (ENTER, LEAVE) and p.cosine is not None]
        looped = predictions(llm, tokens)
        layers = range(*loop.window)
        found.append({
            "step": K * first,
            "growth": last / first,
            "cosine": turned[-1],
            "coherence": float(np.mean([cosine(outputs[i - 1], outputs[i]) for i in layers])),
            "entropy": float((np.exp(plain) * plain).sum(-1).mean() - (np.exp(looped) * looped).sum(-1).mean()),
            "kl": float((np.exp(plain) * (plain - looped)).sum(-1).mean()),
        })  # fmt: skip
    return found


def predictions(llm: LoopedLlama, tokens: Sequence[int]) -> NDArray[np.float64]:
    """Log-probabilities after every token, under the loop in force."""
    llm.reset()
    return np.asarray(log_softmax(llm.logits(tokens)), dtype=np.float64)


def measure(path: Path, judged: str, read: str, chunks: int, n_tokens: int, threads: int | None) -> list[Window]:
    """Every window of a model file. judged: the text of the gains; read: that of the signals."""
    loops, settings = windows_of(path), ContextSettings(n_ctx=512, n_threads=threads)
    with TemporaryDirectory() as folder:
        plan = SweepPlan(local(judged), chunks=chunks, racing=False)
        (outcome,) = run_sweep(path, loops, plan, Path(folder) / "sweep.jsonl", settings).outcomes
    gains = {each.name: each for each in outcome.decision.loops}
    llm = open_model(path, settings)
    try:
        said = signals(llm, llm.tokenize(local(read).text.encode())[:n_tokens], loops)
    finally:
        llm.close()
    found = []
    for loop, each in zip(loops, said, strict=True):
        j = gains[str(loop)]
        edge = min(loop.window[0], describe(path).n_layer - loop.window[1])
        found.append(Window(path.name, "{}:{}".format(*loop.window), j.gain.n, j.gain.mean, j.gain.low, j.gain.high,
                            **each, edge=edge))  # fmt: skip
    return found


def correlations(found: Sequence[Window]) -> Table:
    """A row per model and signal."""
    rows: list[list[Cell]] = []
    for model in dict.fromkeys(w.model for w in found):
        mine = [w for w in found if w.model == model]
        for name in SIGNALS:
            e = correlation([getattr(w, name) for w in mine], [w.gain for w in mine])
            rows.append([model, name, e.n, e.mean, e.low, e.high])
    return Table((Column("model"), Column("signal"), Column("windows", "d"), Column("rank correlation", "+.2f"),
                  Column("low", "+.2f"), Column("high", "+.2f")), rows)  # fmt: skip


def summary(found: Sequence[Window]) -> Table:
    """A row per model: how many of its windows help and hurt for certain, by intervals for all of them together, and
    the best."""
    rows: list[list[Cell]] = []
    for model in dict.fromkeys(w.model for w in found):
        mine = [w for w in found if w.model == model]
        best = max(mine, key=lambda w: w.gain)
        helps, hurts = sum(w.low > 0 for w in mine), sum(w.high < 0 for w in mine)
        rows.append([model, len(mine), best.n, helps, hurts, len(mine) - helps - hurts, f"{best.window} k={K}",
                     best.gain, best.low, best.high])  # fmt: skip
    return Table((*map(Column, ("model", "windows", "chunks", "help", "hurt", "cannot tell", "best")),
                  Column("gain", "+.4f"), Column("low", "+.4f"), Column("high", "+.4f")), rows)  # fmt: skip


def table(found: Sequence[Window]) -> Table:
    """A row per window."""
    forms = {"gain": "+.4f", "low": "+.4f", "high": "+.4f", "entropy": "+.4f", "kl": ".4f"} | dict.fromkeys(
        ("step", "growth", "cosine", "coherence"), ".3f"
    )
    columns = tuple(Column(field.name, forms.get(field.name, "")) for field in fields(Window))
    return Table(columns, [list(asdict(w).values()) for w in found])


def write(path: Path, found: Sequence[Window]) -> None:
    """As csv, numbers to six digits."""
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([field.name for field in fields(Window)])
        for w in found:
            rows.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in asdict(w).values()])


def read_windows(path: Path) -> list[Window]:
    """What `write` wrote. Raises OSError, TypeError or ValueError for another file."""
    kinds: Mapping[str, type] = {"model": str, "window": str, "n": int, "edge": int}
    with path.open(encoding="utf-8", newline="") as file:
        found = [Window(**{name: kinds.get(name, float)(value) for name, value in row.items()})
                 for row in csv.DictReader(file)]  # fmt: skip
    if not found:
        raise ValueError(f"{path} holds no windows")
    return found


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="MODEL | FILE.csv...")
@click.option("--read", "only_read", is_flag=True, help="The arguments are files that --save wrote.")
@click.option("--save", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.csv")
@click.option("--text", default="wiki", show_default=True, help="Where gains are measured.")
@click.option("--signals", "other", default="brown", show_default=True, help="The text of the signals.")
@click.option("--chunks", type=click.IntRange(min=8), default=24, show_default=True, help="Of 512 tokens.")
@click.option("-n", "n_tokens", type=click.IntRange(min=16, max=512), default=192, show_default=True,
              help="Tokens of the signals.")  # fmt: skip
@click.option("-t", "threads", type=click.IntRange(min=1), help="Threads.")
def main(
    files: tuple[str, ...], only_read: bool, save: Path | None, text: str, other: str, chunks: int, n_tokens: int,
    threads: int | None,
) -> None:  # fmt: skip
    """Print every window's gain and signals, and how their ranks go together."""
    try:
        if save is not None:
            save.parent.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
        if only_read:
            found = [w for file in files for w in read_windows(Path(file))]
        else:
            found = [w for file in files for w in measure(resolve(file), text, other, chunks, n_tokens, threads)]
        if save is not None:
            write(save, found)
    except GgufloopError as e:  # before ValueError, which a wrong word is too
        raise click.ClickException(f"{e.message} {e.hint}") from None
    except (OSError, TypeError, ValueError) as e:
        raise click.ClickException(f"{e}. Name a file that --save wrote, or can write.") from None
    click.echo(table(found).render("md"))
    click.echo(summary(found).render("md"))
    click.echo(correlations(found).render("md"))


if __name__ == "__main__":
    main()
