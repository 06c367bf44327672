"""`ggufloop bench MODEL`: tokens per second in llama-bench's table, with loops; --compare for what a loop costs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import click

from ggufloop.backend import library
from ggufloop.cli import terminal
from ggufloop.cli.bench_table import Printer, columns
from ggufloop.cli.context import context_from_flags, context_options, resolve_model
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import LOOP_FLAGS, loop_list_options, loop_suggestion, loops_from_flags
from ggufloop.cli.options import model_options, whole_numbers
from ggufloop.cli.progress import shown
from ggufloop.cli.types import output_option
from ggufloop.errors import UsageError
from ggufloop.loop import LoopSpec
from ggufloop.measure import bench
from ggufloop.measure.bench_run import BenchPlan, BenchRecord, run_bench
from ggufloop.measure.stats import ratio_interval


def _pairs(texts: tuple[str, ...]) -> list[tuple[int, int]]:
    pairs = [whole_numbers(text, "-pg") for text in texts]
    for text, pair in zip(texts, pairs, strict=True):
        if len(pair) != 2:
            raise UsageError(
                f"-pg {text!r} is not a pair.", "write it like -pg 512,128: prompt, then generated tokens."
            )
    return [(pair[0], pair[1]) for pair in pairs]


@click.command(name="bench", cls=Command)
@model_options
@click.option("-p", "--n-prompt", "n_prompt", metavar="N,...", default="512", show_default=True,
              help="Prompt tokens of the prompt tests; 0: none.")  # fmt: skip
@click.option("-n", "--n-gen", "n_gen", metavar="N,...", default="128", show_default=True,
              help="Generated tokens of the generation tests; 0: none.")  # fmt: skip
@click.option("-pg", "n_pg", metavar="PP,TG", multiple=True, help="Also a prompt and then generation, timed as one.")
@click.option("-d", "--n-depth", "n_depth", metavar="N,...", default="0", show_default=True,
              help="Tokens in the context before a test, not timed.")  # fmt: skip
@click.option("-r", "--repetitions", "repetitions", type=click.IntRange(min=1), metavar="N", default=5,
              show_default=True, help="Measurements of each test; with --compare, rounds.")  # fmt: skip
@output_option()
@click.option("--stock", is_flag=True, help="Measure the unpatched llama.cpp.")
@click.option("--compare", is_flag=True,
              help="Interleave stock, plain and looped, and print time ratios beside the predicted cost.")  # fmt: skip
@click.option("--no-warmup", is_flag=True, help="Do not evaluate each test once before it is timed.")
@loop_list_options
@context_options
@click.pass_context
def command(
    ctx: click.Context, /, n_prompt: str, n_gen: str, n_pg: tuple[str, ...], n_depth: str, repetitions: int, form: str,
    stock: bool, compare: bool, no_warmup: bool, **flags: Any,
) -> None:  # fmt: skip
    """Measure tokens per second, as llama-bench does: pp512 is a prompt of 512 tokens, tg128 128 generated ones.

    Every window is measured with every K and every kv. With --compare, a round measures the stock library, the plain
    model and every loop once, in a new order, and a time ratio is taken within its round: printed are the median over
    rounds and its 95 % interval, beside what the layer count (layers) and the weights read (weights) predict. The
    context is as large as the tests need.

    \b
    ggufloop bench smollm2-135m --window 10:14,12:16 --K 1,3
    ggufloop bench smollm2-135m --window 12:16 --K 3 --kv first,frozen --compare -r 7
    """
    works = bench.workloads(
        whole_numbers(n_prompt, "-p"), whole_numbers(n_gen, "-n"), _pairs(n_pg), whole_numbers(n_depth, "-d")
    )
    settings = context_from_flags(flags)
    if settings.n_ctx:
        BenchPlan(tuple(works)).check_context(settings.n_ctx)
    find = cache(lambda: resolve_model(flags))
    loops = loops_from_flags(
        flags.pop("window"), cache(lambda: loop_suggestion(find())()), **{name: flags.pop(name) for name in LOOP_FLAGS}
    )
    plan = BenchPlan(tuple(works), tuple(loops), stock, compare, repetitions, not no_warmup)
    with shown() as progress:
        variants = plan.variants(bool(settings.rpc_servers), progress)
    printer: Printer | None = None

    def begun(constant: BenchRecord) -> None:
        nonlocal printer
        built = f"patch {constant['patch_id'] or 'unknown'}" if not stock or compare else "stock"
        build = f"{library.LLAMA_CPP_COMMIT}, {built}"
        printer = Printer(form, columns(constant, variants, compare), build)
        printer.begin()

    def row(record: BenchRecord) -> None:
        assert printer is not None
        printer.row(record)

    try:
        path = find()
        with shown() as progress:
            run_bench(path, plan, settings, variants=variants, hashed=form not in ("text", "md"),
                      verbose=ctx.obj["verbose"], begun=begun, row=row, progress=progress)  # fmt: skip
    finally:
        if printer is not None:
            printer.end()
    _notes(loops, repetitions, compare)


def _notes(loops: Sequence[LoopSpec], n: int, compare: bool) -> None:
    if not compare:
        click.echo(f"n = {n} repetitions; \u00b1 is their standard deviation", err=True)
        return
    level = ratio_interval([1] * n, [1] * n).level
    click.echo(
        f"n = {n} rounds; \u00b1 is the standard deviation of t/s; time ratio: median of the rounds' and its "
        f"{100 * level:.3g} % interval",
        err=True,
    )
    if any(loop.costs_less for loop in loops):
        terminal.note("layers and weights are upper bounds for kv frozen, --loop-attention and --halt.")
