#!/usr/bin/env python3
"""Train a family of small llamas on public text, quantise every model and measure it: the data to fit a law on.

    python3 scripts/bootstrap.py python research/family/train_family.py --plan          # what it would take here
    python3 scripts/bootstrap.py python research/family/train_family.py -o family.csv   # run, or go on

Four depths of a width of 256, eight token budgets each and more for the smaller ones, every model in F32 and in 8, 4, 3
and 2 bits. The loss is llama.cpp's, on held-out text; torch computes the F32 one as well and the run stops if the two
differ. Interrupted (Ctrl-C, a crash, --minutes), the next run goes on where the last state was saved, to the same
weights. Cells are done from the smallest budget to the largest over all sizes, so that an unfinished study is a whole
one of fewer budgets. FILE.json beside the CSV says what the numbers came from.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import click
import numpy as np
import torch
from family_model import Plan, Shape, Trainer, export, initial, nll
from family_text import END, Document, collect, learn_merges, split
from gguf import GGUFReader

from ggufloop.backend.library import LLAMA_CPP_COMMIT
from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError
from ggufloop.files import atomic_path, cache_dir, lock
from ggufloop.measure.score import score
from ggufloop.quant.quantize import quantize
from ggufloop.table import Column, Table

SIZES = {"1x256": (1, 7), "2x256": (2, 4), "4x256": (4, 2), "8x256": (8, 1)}
"""Layers of each size, and how many budgets it has beyond those of all sizes."""

BITS = {"F32": 32, "Q8_0": 8, "Q4_K": 4, "Q3_K": 3, "Q2_K": 2}
AGREE = 1e-3  # nats per token; float32 on both sides differs by far less
SEED = 20260523

COLUMNS = tuple(
    Column(name, form)
    for name, form in {
        "size": "",
        "type": "",
        "bits": "",
        "N": ".6f",
        "D": ".6f",
        "loss": ".4f",
        "loss_se": ".4f",
        "n_tokens": "",
        "change": ".4f",
        "change_se": ".4f",
        "bits_per_weight": ".3f",
        "n_params": "",
        "n_non_embedding": "",
        "tokens": "",
        "torch_loss": ".6f",
    }.items()
)
"""N, D: weights and training tokens in billions. loss: nats per held-out token, with the standard error over chunks.
change: against F32 on the same chunks, paired. bits_per_weight: of the matrices as they are in the file."""


class OutOfTime(Exception):
    """The time given is over; everything is saved."""


@dataclass(frozen=True)
class Study:
    """What makes two runs the same study. `first` and `ratio` give the budgets: first, first * ratio, ... in steps."""

    plan: Plan = field(default_factory=Plan)
    first: int = 40
    ratio: float = 1.4
    budgets: int = 8
    merges: int = 255
    chunks: int = 40
    seed: int = SEED
    sizes: tuple[tuple[str, int, int], ...] = field(
        default_factory=lambda: tuple((name, *size) for name, size in SIZES.items())
    )

    def steps(self, i: int) -> int:
        """Budget i in steps."""
        return round(self.first * self.ratio**i)

    def shape(self, n_layer: int) -> Shape:
        """The model of that many layers."""
        return Shape(n_layer, n_vocab=256 + self.merges + 1)

    def cells(self) -> list[tuple[str, Shape, int]]:
        """Size, shape and steps of every model, by budget and then by size."""
        found = [
            (i, name, self.shape(n_layer)) for name, n_layer, extra in self.sizes for i in range(self.budgets + extra)
        ]
        return [(name, shape, self.steps(i)) for i, name, shape in sorted(found, key=lambda cell: cell[0])]

    def trained(self, name: str) -> int:
        """Steps computed for a size in all: the trunk up to the last branch, and the branches."""
        budgets = [steps for other, _, steps in self.cells() if other == name]
        return self.plan.branch(budgets[-1]) + sum(steps - self.plan.branch(steps) for steps in budgets)


@dataclass(frozen=True)
class Data:
    """Token streams and what they came from."""

    train: np.ndarray
    held_out: np.ndarray
    merges: list[tuple[str, str]]
    provenance: dict[str, Any]


def prepare(folder: Path, study: Study, documents: Sequence[Document] | None = None) -> Data:
    """The tokenized text, made once and kept in the folder."""
    path = folder / "text.npz"
    if not path.exists():
        train, held_out = split(collect() if documents is None else documents, study.seed)
        merges = learn_merges(train, study.merges)
        empty = folder / "empty.gguf"
        shape = study.shape(1)
        export(empty, shape, initial(shape, 0), merges)
        llm = open_model(empty, study, 1)  # llama.cpp's tokenizer is the one that counts
        streams = [shuffled(tokenized(llm, pieces), study) for pieces in (train, held_out)]
        llm.close()
        empty.unlink()
        parts = zip(("train", "held_out"), (train, held_out), streams, strict=True)
        provenance = {name: described(pieces, stream) for name, pieces, stream in parts}
        with atomic_path(path) as partial, partial.open("wb") as file:
            text = json.dumps([merges, provenance])
            np.savez(file, train=streams[0], held_out=streams[1], text=np.array(text))
    with np.load(path) as stored:
        merges, provenance = json.loads(str(stored["text"]))
        return Data(stored["train"], stored["held_out"], [(a, b) for a, b in merges], provenance)


def tokenized(llm: LoopedLlama, pieces: Sequence[Document]) -> np.ndarray:
    """The pieces as one stream of uint16, each ended by the end-of-text token."""
    end = llm.tokenize(END.encode(), add_bos=False, special=True)
    stream = [llm.tokenize(piece.text.encode(), add_bos=False, special=False) + end for piece in pieces]
    return np.concatenate([np.array(tokens, dtype=np.uint16) for tokens in stream])


def shuffled(stream: np.ndarray, study: Study) -> np.ndarray:
    """Windows of a stream in random order, the last incomplete one dropped: neighbours are of one document, and a batch
    of them is a bad sample of the text."""
    n = len(stream) // study.plan.n_ctx
    windows = stream[: n * study.plan.n_ctx].reshape(n, -1)
    return np.random.default_rng(study.seed).permutation(windows).ravel()


def described(pieces: Sequence[Document], stream: np.ndarray) -> dict[str, Any]:
    """What a stream is made of."""
    size: Counter[str] = Counter()
    for piece in pieces:
        size[piece.source] += len(piece.text.encode())
    digest = hashlib.sha256("\0".join(piece.text for piece in pieces).encode())
    return {"bytes": dict(sorted(size.items())), "tokens": len(stream), "sha256": digest.hexdigest()}


def open_model(path: Path, study: Study, threads: int) -> LoopedLlama:
    """The file with K/V in float32, so that only the weights differ between types."""
    n = study.plan.n_ctx
    return LoopedLlama(
        path, n_ctx=n, n_batch=n, n_ubatch=n, n_threads=threads, n_threads_batch=threads,
        type_k=0, type_v=0, flash_attn=False, verbose=False,
    )  # fmt: skip


def chunk_losses(path: Path, study: Study, chunks: np.ndarray, threads: int) -> np.ndarray:
    """Mean NLL of each chunk in nats per token, by llama.cpp; all tokens but a chunk's first are scored."""
    llm = open_model(path, study, threads)
    try:
        return np.array([score(llm, chunk.tolist()).nll.mean() for chunk in chunks])
    finally:
        llm.close()


def matrix_bits(path: Path) -> float:
    """Bits per weight of the matrices of a file."""
    matrices = [t for t in GGUFReader(path).tensors if len(t.shape) > 1]
    return 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)


class Run:
    """One study in one folder."""

    def __init__(self, folder: Path, study: Study, data: Data, threads: int = 1, deadline: float = float("inf")):
        self.folder, self.study, self.data, self.threads, self.deadline = folder, study, data, threads, deadline
        self.save_every = 50
        n = study.plan.n_ctx
        if len(data.held_out) < study.chunks * n:
            raise GgufloopError(
                f"{len(data.held_out)} held-out tokens are no {study.chunks} chunks of {n}.", "give fewer --chunks."
            )
        longest = max(steps for _, _, steps in study.cells()) * study.plan.step_tokens
        if len(data.train) < longest:
            raise GgufloopError(
                f"the text has {len(data.train)} tokens and the largest budget is {longest}; no token is shown twice.",
                "give fewer --budgets, or a smaller --first.",
            )
        self.chunks = data.held_out[: study.chunks * n].reshape(-1, n).astype(np.int64)

    def model(self, name: str, shape: Shape, steps: int) -> Path:
        """Train the model of a cell, or go on with it, and return its F32 file."""
        folder = self.folder / name
        path = folder / f"{steps}.gguf"
        if path.exists():
            return path
        trunk_path, branch_path = folder / "trunk.pt", folder / "branch.pt"
        branch = Trainer.load(branch_path) if branch_path.exists() else None
        if branch is None or branch.until != steps:
            start = self.study.plan.branch(steps)
            trunk = (
                Trainer.load(trunk_path)
                if trunk_path.exists()
                else Trainer.fresh(shape, self.study.plan, self.study.seed)
            )
            self._advance(trunk, start, trunk_path)
            branch = trunk.decaying(steps)
            branch.save(branch_path)
        self._advance(branch, steps, branch_path)
        export(path, shape, branch.weights, self.data.merges)
        return path

    def _advance(self, trainer: Trainer, steps: int, path: Path) -> None:
        def done(trainer: Trainer, loss: float) -> None:
            if not np.isfinite(loss):
                raise GgufloopError(
                    f"the loss is {loss} at step {trainer.step} of {path.parent.name}.", "lower --rate."
                )
            late = time.monotonic() > self.deadline
            if late or trainer.step % self.save_every == 0 or trainer.step == steps:
                trainer.save(path)
            if late:
                raise OutOfTime
            self.tell(trainer, loss)

        trainer.advance(self.data.train, steps, done)

    def tell(self, trainer: Trainer, loss: float) -> None:
        """Called after each step; a test interrupts here."""

    def kept(self, name: str, shape: Shape, steps: int) -> Path:
        """Where the rows of a cell are kept once it is measured."""
        return self.folder / name / f"{steps}.json"

    def cell(self, name: str, shape: Shape, steps: int) -> list[list[str | int | float | None]]:
        """Rows of the table for one model, one per type; measured once and kept."""
        kept = self.kept(name, shape, steps)
        if kept.exists():
            return json.loads(kept.read_text())
        path = self.model(name, shape, steps)
        reader = {t.name: torch.from_numpy(t.data.copy()) for t in GGUFReader(path).tensors}
        with torch.no_grad():
            ids = torch.from_numpy(self.chunks)
            expected = float(torch.cat([nll(shape, reader, part) for part in ids.split(8)]).double().mean())
        rows: list[list[str | int | float | None]] = []
        plain: np.ndarray | None = None
        for kind, bits in BITS.items():
            file = path if kind == "F32" else path.with_name(f"{steps}-{kind}.gguf")
            if kind != "F32":
                file.unlink(missing_ok=True)
                # every matrix of one type, where a mixture would change with the depth
                quantize(path, file, kind, overrides=((".", kind),), threads=self.threads)
            losses = chunk_losses(file, self.study, self.chunks, self.threads)
            loss, n = float(losses.mean()), len(losses)
            if plain is None:
                plain = losses
                if abs(loss - expected) > AGREE:
                    raise GgufloopError(
                        f"llama.cpp's loss is {loss:.6f}, torch's {expected:.6f} for {path.name}: not within {AGREE}.",
                        "one of the two computes another model: find out which before training more.",
                    )
            change = losses - plain
            tokens = steps * self.study.plan.step_tokens
            rows.append([
                name, kind, bits, shape.n_params() / 1e9, tokens / 1e9,
                loss, float(losses.std(ddof=1)) / n**0.5, n * (self.study.plan.n_ctx - 1),
                None if kind == "F32" else float(change.mean()),
                None if kind == "F32" else float(change.std(ddof=1)) / n**0.5,
                matrix_bits(file), shape.n_params(), shape.n_params(embedding=False), tokens,
                expected if kind == "F32" else None,
            ])  # fmt: skip
            if kind != "F32":
                file.unlink()
        with atomic_path(kept) as partial:
            partial.write_text(json.dumps(rows))
        return rows


def seconds_per_step(shape: Shape, plan: Plan) -> float:
    """How long a training step takes here; the median of five."""
    trainer = Trainer.fresh(shape, plan, 0)
    stream = np.random.default_rng(0).integers(0, shape.n_vocab, 7 * plan.step_tokens)
    times = [time.perf_counter()]
    trainer.advance(stream, 7, lambda trainer, loss: times.append(time.perf_counter()))
    return float(np.median(np.diff(times)[2:]))


def estimate(study: Study) -> Table:
    """What the whole study would take here. Measuring is counted as forward passes, a third of a step's work each."""
    rows: list[list[str | int | float | None]] = []
    for name, n_layer, extra in study.sizes:
        shape = study.shape(n_layer)
        seconds = seconds_per_step(shape, study.plan)
        budgets = study.budgets + extra
        tokens = study.chunks * study.plan.n_ctx * budgets * (len(BITS) + 1)
        trained = study.trained(name)
        rows.append([
            name, shape.n_params(), shape.n_params(embedding=False), budgets,
            study.first * study.plan.step_tokens, study.steps(budgets - 1) * study.plan.step_tokens,
            seconds, trained, trained * seconds / 60, tokens / study.plan.step_tokens / 3 * seconds / 60,
        ])  # fmt: skip
    names = ["size", "n_params", "n_non_embedding", "budgets", "least D", "most D"]
    columns = [*names, "s/step", "steps", "train min", "measure min"]
    forms = {"s/step": ".3f", "train min": ".1f", "measure min": ".1f"}
    return Table(tuple(Column(name, forms.get(name, "")) for name in columns), rows)


def open_study(folder: Path, study: Study, threads: int) -> bool:
    """Refuse a folder that holds another study: its states and losses would be mixed with this one's.

    More budgets, of all sizes or of one, continue the same study. Returns whether the folder is new.
    """
    path = folder / "study.json"
    asked = json.loads(json.dumps(asdict(study) | {"threads": threads}))
    asked["sizes"] = {name: n_layer for name, n_layer, _ in study.sizes}
    del asked["budgets"]
    if new := not path.exists():
        with atomic_path(path) as partial:
            partial.write_text(json.dumps(asked, indent=1))
    kept = json.loads(path.read_text())
    differs = [key for key in asked if kept.get(key) != asked[key]]
    if differs:
        what = ", ".join(f"{key} {kept.get(key)} not {asked[key]}" for key in differs)
        raise GgufloopError(f"{folder} holds another study: {what}.", "give another --folder, or the same options.")
    return new


def provenance(study: Study, data: Data, threads: int, rows: int) -> dict[str, Any]:
    """What the CSV came from. The command is what it takes to make it again, wherever its files are kept."""
    options = {
        "first": study.first, "ratio": study.ratio, "budgets": study.budgets, "rate": study.plan.rate,
        "chunks": study.chunks, "seed": study.seed, "threads": threads,
    }  # fmt: skip
    return {
        "command": "research/family/train_family.py "
        + " ".join(f"--{name} {value}" for name, value in options.items()),
        "written": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        "rows": rows,
        "models": f"{rows // len(BITS)} of {len(study.cells())}",
        "versions": {
            "python": python_version(),
            "llama.cpp": LLAMA_CPP_COMMIT,
            **{name: version(name) for name in ("torch", "numpy", "gguf")},
        },
        "study": asdict(study),
        "text": data.provenance,
    }


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="States and models; a cache folder.")
@click.option("--plan", "only_plan", is_flag=True, help="Print what it would take here, and stop.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Save and stop after so many.")
@click.option(
    "--first",
    type=click.IntRange(5),
    default=Study.first,
    show_default=True,
    help="Smallest budget, in steps of 1024 tokens.",
)
@click.option(
    "--ratio",
    type=click.FloatRange(1.3, 4),
    default=Study.ratio,
    show_default=True,
    help="Of one budget to the one before.",
)
@click.option(
    "--budgets", type=click.IntRange(1, 16), default=Study.budgets, show_default=True, help="That all sizes have."
)
@click.option(
    "--rate", type=click.FloatRange(0, 1, min_open=True), default=Plan.rate, show_default=True, help="Learning rate."
)
@click.option(
    "--chunks",
    type=click.IntRange(2),
    default=Study.chunks,
    show_default=True,
    help="Of 256 held-out tokens, to measure on.",
)
@click.option("--seed", type=int, default=SEED, show_default=True)
@click.option("-t", "--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the CSV here; else print it."
)
def main(
    folder: Path | None, only_plan: bool, minutes: float | None, first: int, ratio: float, budgets: int, rate: float,
    chunks: int, seed: int, threads: int, output: Path | None,
) -> None:  # fmt: skip
    """Train, quantise and measure the family, or go on with it."""
    torch.set_num_threads(threads)
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    study = Study(Plan(rate=rate), first, ratio, budgets, chunks=chunks, seed=seed)
    if only_plan:
        click.echo(estimate(study).render("md"), nl=False)
        return
    folder = folder or cache_dir() / "family"
    rows: list[list[str | int | float | None]] = []
    try:
        with lock(folder / "family.lock", lambda: click.echo(f"waiting for another run in {folder} ...", err=True)):
            if open_study(folder, study, threads):
                click.echo(estimate(study).render("md"), err=True)
            data = prepare(folder, study)
            try:
                run = Run(folder, study, data, threads, deadline)
                for cell in study.cells():
                    new = not run.kept(*cell).exists()
                    rows += (measured := run.cell(*cell))
                    if new:
                        losses = ", ".join(f"{row[1]} {row[5]:.4f}" for row in measured)
                        click.echo(
                            f"{time.strftime('%H:%M:%S')} {cell[0]} {measured[0][13]} tokens: {losses}", err=True
                        )
            except (OutOfTime, KeyboardInterrupt):
                done, total = len(rows) // len(BITS), len(study.cells())
                click.echo(f"stopped with {done} of {total} models measured; run it again to go on.", err=True)
        text = Table(COLUMNS, rows).render("csv")
        if output is None:
            click.echo(text, nl=False)
        elif rows:
            found = provenance(study, data, threads, len(rows))
            for path, content in ((output, text), (output.with_suffix(".json"), json.dumps(found, indent=1) + "\n")):
                with atomic_path(path) as partial:
                    partial.write_text(content)
    except GgufloopError as e:
        sys.exit(f"error: {e.message}\n  {e.hint}")


if __name__ == "__main__":
    main()
