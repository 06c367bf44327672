"""What a loop costs: time and memory of docs/speed.md's plans beside plain and the stock library, in one run.

    python3 scripts/bootstrap.py python scripts/bench_overhead.py [MODEL ...] [-r 7] [-o md|csv|json|jsonl]
    python3 scripts/bootstrap.py python scripts/bench_overhead.py -r 0    # instructions alone: a busy machine will do

`ggufloop bench --compare` with a fixed set of plans, and with their memory: prefill is its test pp512, decode its test
tg64 @ d512. Every library, and each memory reading, has a process of its own; a peak would know its predecessors.
The columns "instructions" are ratios too, without noise: a short prompt, a few generated tokens (instructions.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import instructions

from ggufloop.errors import GgufloopError
from ggufloop.loop import LoopSpec
from ggufloop.measure import bench
from ggufloop.measure.bench import Child, Measured, Timed, Variant, Workload
from ggufloop.models import registry
from ggufloop.models.info import describe, plain_kv_bytes
from ggufloop.table import FORMS, Column, Table

PREFILL, DECODE, BOTH = Workload(512), Workload(0, 64, 512), Workload(512, 64)
CONTEXT = 1024
PLANS = ("k=3", "k=3 kv=frozen", "k=3 kv=last", "k=3 kv=each", "k=3 mode=layer", "k=6", "k=6 passes=3")


def counted(path: Path, plans: list[LoopSpec]) -> list[list[Any]]:
    """Ratios of instructions, prefill and decode: off over stock, then each plan over off."""
    stock = instructions.count(path, [""], stock=True)
    own = instructions.count(path, ["", *map(str, plans)], stock=False)
    if stock is None or own is None:
        return [["no counter", "no counter"]] * (1 + len(plans))
    pairs = [(own[0], stock[0]), *((looped, own[0]) for looped in own[1:])]
    return [[a.prefill / b.prefill, a.decode / b.decode] for a, b in pairs]


def timed(path: Path, plans: list[LoopSpec], rounds: int, threads: int) -> Iterator[list[Any]]:
    """Ratios of times, each with its interval, and of memory, the rows as of `counted`."""
    settings = {"n_ctx": CONTEXT, "n_batch": 512, "n_ubatch": 512, "n_threads": threads, "n_threads_batch": threads}
    variants = [Variant(None, True), Variant(), *(Variant(loop) for loop in plans)]
    with ExitStack() as stack:
        children = {stock: stack.enter_context(Child(path, stock, settings)) for stock in (True, False)}

        def run(variant: Variant, work: Workload, round_: int) -> int:
            if variant.stock:
                click.echo(f"{path.name}: {work}, round {round_ + 1} of {rounds}", err=True)
            return children[variant.stock].run(work, variant.loop, round_).ns

        prefill, decode = (bench.compare(variants, work, rounds, run) for work in (PREFILL, DECODE))

    def alone(loop: LoopSpec | None) -> Measured:
        with Child(path, False, settings) as child:
            return child.run(BOTH, loop, 0)

    def ratio(results: list[Timed], i: int) -> list[float]:
        found = bench.ratio(results[i], results[min(i - 1, 1)])
        return [found.mean, found.low, found.high]

    plain = alone(None)
    yield [*ratio(prefill, 1), *ratio(decode, 1), None, None]
    for i, loop in enumerate(plans, 2):
        own = alone(loop)
        memory = own.peak_bytes / plain.peak_bytes, own.kv_bytes - plain.kv_bytes
        yield [*ratio(prefill, i), *ratio(decode, i), *memory]


def measure(path: Path, rounds: int, threads: int, count: bool) -> Iterator[list[Any]]:
    """Rows of the table for one model."""
    window, _ = registry.suggest_window(path)
    plans = [LoopSpec.parse(f"{window[0]}:{window[1]} {plan}") for plan in PLANS]
    info = describe(path)
    per_layer = plain_kv_bytes(info, CONTEXT, "f16", "f16")
    predicted: list[list[Any]] = [["off / stock", None, None]]
    predicted += [[str(loop), loop.relative_cost(info.n_layer), bench.weight_cost(path, loop)] for loop in plans]
    extra = [None, *(loop.extra_kv_bytes(per_layer) for loop in plans)]
    ratios = counted(path, plans) if count else [[None, None]] * len(predicted)
    times = list(timed(path, plans, rounds, threads)) if rounds else [[None] * 8] * len(predicted)
    for row in zip(predicted, ratios, times, extra, strict=True):
        yield [path.name, *row[0], *row[1], *row[2], row[3]]


def check_rounds(ctx: click.Context, option: click.Parameter, rounds: int) -> int:
    """Fewer than 5 say too little, but none is a choice."""
    if 0 < rounds < 5:
        raise click.BadParameter(f"{rounds} is neither 0, for no times, nor at least 5.")
    return rounds


@click.command()
@click.argument("models", nargs=-1)
@click.option("-r", "rounds", type=click.IntRange(0), default=7, show_default=True, callback=check_rounds,
              help="Rounds; each runs every plan. 0: no times.")  # fmt: skip
@click.option("-t", "threads", type=click.IntRange(1), default=2, show_default=True, help="Threads.")
@click.option("--instructions/--no-instructions", "count", default=True, help="Count instructions, where that can be.")
@click.option("-o", "form", type=click.Choice(FORMS), default="md", show_default=True, help="How to print it.")
def main(models: tuple[str, ...], rounds: int, threads: int, count: bool, form: str) -> None:
    """Measure MODELS (default: the two real ones): ratios to plain, prompt 512 and 64 generated tokens."""
    columns = [Column("model"), Column("plan"), Column("layers", ".3f"), Column("weights", ".3f")]
    columns += [Column("prefill instructions", ".4f"), Column("decode instructions", ".4f")]
    for what in ("prefill", "decode"):
        columns += [Column(what, ".3f"), Column(f"{what} low", ".3f"), Column(f"{what} high", ".3f")]
    columns += [Column("peak memory", ".4f"), Column("extra KV bytes"), Column("predicted")]
    rows: list[list[Any]] = []
    try:
        for name in models or ("smollm2-135m", "gemma-3-270m"):
            rows += measure(registry.resolve(name), rounds, threads, count)
    except GgufloopError as e:
        raise click.ClickException(f"{e.message} {e.hint}") from None
    click.echo(Table(tuple(columns), rows).render(form), nl=False)
    click.echo(f"n = {rounds} rounds, prompt 512, 64 generated, {threads} threads", err=True)


if __name__ == "__main__":  # children import this file too
    main()
