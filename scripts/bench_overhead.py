"""What a loop costs: time and memory of the plans in README beside the plain model and the stock library, in one run.

    python3 scripts/bootstrap.py python scripts/bench_overhead.py [MODEL ...] [-r 7] [-o md|csv|json|jsonl]

`ggufloop bench --compare` with a fixed set of plans, and with their memory: prefill is its test pp512, decode its test
tg64 @ d512. Every library, and each memory reading, has a process of its own; a peak would know its predecessors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ggufloop import bench, registry
from ggufloop.bench import Child, Measured, Result, Variant, Workload
from ggufloop.errors import GgufloopError
from ggufloop.inspect import describe, plain_kv_bytes
from ggufloop.loop import LoopSpec
from ggufloop.table import Column, Table

PREFILL, DECODE, BOTH = Workload(512), Workload(0, 64, 512), Workload(512, 64)
CONTEXT = 1024
PLANS = ("k=3", "k=3 kv=frozen", "k=3 kv=last", "k=3 kv=each", "k=3 mode=layer", "k=6", "k=6 passes=3")


def measure(path: Path, rounds: int, threads: int) -> Iterator[list[Any]]:
    """Rows of the table for one model."""
    settings = {"n_ctx": CONTEXT, "n_batch": 512, "n_ubatch": 512, "n_threads": threads, "n_threads_batch": threads}
    window, _ = registry.suggest_window(path)
    plans = [LoopSpec.parse(f"{window[0]}:{window[1]} {plan}") for plan in PLANS]
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

    def ratio(results: list[Result], i: int) -> list[float]:
        found = bench.ratio(results[i], results[min(i - 1, 1)])
        return [found.mean, found.low, found.high]

    plain = alone(None)
    info = describe(path)
    per_layer = plain_kv_bytes(info, CONTEXT, "f16", "f16")
    yield [path.name, "off / stock", None, None, *ratio(prefill, 1), *ratio(decode, 1), None, None, None]
    for i, loop in enumerate(plans, 2):
        own = alone(loop)
        yield [path.name, str(loop), loop.relative_cost(info.n_layer), bench.weight_cost(path, loop),
               *ratio(prefill, i), *ratio(decode, i), own.peak_bytes / plain.peak_bytes,
               own.kv_bytes - plain.kv_bytes, loop.extra_kv_bytes(per_layer)]  # fmt: skip


@click.command()
@click.argument("models", nargs=-1)
@click.option(
    "-r", "rounds", type=click.IntRange(5), default=7, show_default=True, help="Rounds; each runs every plan."
)
@click.option("-t", "threads", type=click.IntRange(1), default=2, show_default=True, help="Threads.")
@click.option("-o", "form", default="md", show_default=True, help="md, csv, json or jsonl.")
def main(models: tuple[str, ...], rounds: int, threads: int, form: str) -> None:
    """Measure MODELS (default: the two real ones): ratios to plain, prompt 512 and 64 generated tokens."""
    columns = [Column("model"), Column("plan"), Column("layers", ".3f"), Column("weights", ".3f")]
    for what in ("prefill", "decode"):
        columns += [Column(what, ".3f"), Column(f"{what} low", ".3f"), Column(f"{what} high", ".3f")]
    columns += [Column("peak memory", ".4f"), Column("extra KV bytes"), Column("predicted")]
    rows: list[list[Any]] = []
    try:
        for name in models or ("smollm2-135m", "gemma-3-270m"):
            rows += measure(registry.resolve(name), rounds, threads)
    except GgufloopError as e:
        raise click.ClickException(f"{e.message} {e.hint}") from None
    click.echo(Table(tuple(columns), rows).render(form), nl=False)
    click.echo(f"n = {rounds} rounds, prompt 512, 64 generated, {threads} threads", err=True)


if __name__ == "__main__":  # children import this file too
    main()
