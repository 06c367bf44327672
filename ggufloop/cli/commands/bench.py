"""`ggufloop bench MODEL`: tokens per second in llama-bench's table, with loops; --compare for what a loop costs.

Rows are printed as they are measured: md looks like llama-bench's, csv, json and jsonl have its field names where the
field is the same. Columns that say nothing (library, loop settings left at their defaults) are left out of md.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggufloop.backend import library as backend
from ggufloop.cli import terminal
from ggufloop.cli.context import check_context, check_loops, check_memory, context_options, engine_settings
from ggufloop.cli.loop_options import LOOP_FLAGS, loop_list_options, loop_suggestion, loops_from_flags
from ggufloop.cli.options import MODEL_FLAGS, model_from_flags, model_options, whole_numbers
from ggufloop.errors import BackendError, UsageError, nearest
from ggufloop.files import file_sha256
from ggufloop.loop import LoopSpec
from ggufloop.measure import bench
from ggufloop.measure.bench import Child, Timed, Variant, Workload
from ggufloop.measure.stats import ratio_interval
from ggufloop.models.info import describe
from ggufloop.table import FORMS

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

SCHEMA_VERSION = 1

Record = dict[str, Any]


@dataclass(frozen=True)
class _Column:
    """A column of md. width: of its cells, negative for words, which start at the left, as in C's printf."""

    name: str
    width: int
    cell: Callable[[Record], str]

    def pad(self, text: str) -> str:
        return text.ljust(-self.width) if self.width < 0 else text.rjust(self.width)


def _size(r: Record) -> str:
    nbytes = r["model_size"]
    return f"{nbytes / 2**20:.2f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:.2f} GiB"


def _params(r: Record) -> str:
    n = r["model_n_params"]
    return f"{n / 1e6:.2f} M" if n < 1e9 else f"{n / 1e9:.2f} B"


def _settings(r: Record) -> str:
    """The settings of a loop that have no column."""
    words = (r["loop"] or "").split()[2:]
    return " ".join(word for word in words if not word.startswith("kv="))


def _ratio(r: Record) -> str:
    if r["ratio"] is None:
        return ""
    return f"{r['ratio']:.2f} [{r['ratio_low']:.2f}, {r['ratio_high']:.2f}]"


def _text(name: str, form: str = "") -> Callable[[Record], str]:
    return lambda r: "" if r[name] is None else format(r[name], form)


_MODEL = [
    _Column("model", -30, _text("model_type")),
    _Column("size", 10, _size),
    _Column("params", 10, _params),
    _Column("backend", -10, _text("backends")),
]
_NGL = _Column("ngl", 3, _text("n_gpu_layers"))
_THREADS = _Column("threads", 7, _text("n_threads"))
_OPTIONAL = [
    ("n_batch", 2048, _Column("n_batch", 7, _text("n_batch"))),
    ("n_ubatch", 512, _Column("n_ubatch", 8, _text("n_ubatch"))),
    ("type_k", "f16", _Column("type_k", 6, _text("type_k"))),
    ("type_v", "f16", _Column("type_v", 6, _text("type_v"))),
]
_LIBRARY = _Column("library", -7, _text("library"))
_LOOP = [_Column("window", -7, _text("window")), _Column("K", 3, _text("k")), _Column("kv", -6, _text("kv"))]
_SETTINGS = _Column("loop", -16, _settings)
_SPEED = [
    _Column("test", 15, _text("test")),
    _Column("t/s", 20, lambda r: f"{r['avg_ts']:.2f} \u00b1 {r['stddev_ts']:.2f}"),
]
_COMPARED = [
    _Column("over", -5, _text("over")),
    _Column("time ratio", 18, _ratio),
    _Column("layers", 6, _text("predicted_layers", ".2f")),
    _Column("weights", 7, _text("predicted_weights", ".2f")),
]


def columns(constant: Record, variants: list[Variant], compared: bool) -> list[_Column]:
    """The columns of md, as llama-bench chooses them: settings only where one differs from its default."""
    chosen = [*_MODEL, *([_NGL] if constant["backends"] != "CPU" else []), _THREADS]
    chosen += [column for name, default, column in _OPTIONAL if constant[name] != default]
    if any(v.stock for v in variants):
        chosen.append(_LIBRARY)
    if any(v.loop for v in variants):
        chosen += _LOOP
    if any(_settings({"loop": str(v.loop)}) for v in variants if v.loop):
        chosen.append(_SETTINGS)
    return chosen + _SPEED + (_COMPARED if compared else [])


class Printer:
    """Prints records in one of FORMS, each at once, so that what is measured is not lost if the rest is not."""

    def __init__(self, form: str, shown: list[_Column], build: str) -> None:
        self.form, self._shown, self._build = form, shown, build
        self._n = 0

    def begin(self) -> None:
        if self.form == "md":
            self._line(column.name for column in self._shown)
            self._line("-" * (abs(c.width) - 1) + (":" if c.width > 0 else "-") for c in self._shown)

    def row(self, record: Record) -> None:
        if self.form == "md":
            self._line(column.cell(record).replace("|", "\\|") for column in self._shown)
        elif self.form == "jsonl":
            click.echo(json.dumps(record))
        elif self.form == "json":
            click.echo(("[\n" if self._n == 0 else ",\n") + json.dumps(record, indent=2), nl=False)
        else:
            flat = {name: value for name, value in record.items() if not isinstance(value, list)}
            out = io.StringIO()
            writer = csv.writer(out, lineterminator="\n")
            writer.writerows([flat] if self._n == 0 else [])
            writer.writerow(flat.values())
            click.echo(out.getvalue(), nl=False)
        self._n += 1

    def end(self) -> None:
        if self.form == "md":
            click.echo(f"\nbuild: {self._build}")
        elif self.form == "json":
            click.echo("[]" if self._n == 0 else "\n]")

    def _line(self, cells: Iterator[str]) -> None:
        click.echo("| " + " | ".join(c.pad(text) for c, text in zip(self._shown, cells, strict=True)) + " |")


def _constant(llm: LoopedLlama, path: Path, library: backend.Backend, flags: Record, form: str) -> Record:
    """What is the same in every record."""
    info = describe(path)
    return {
        "schema_version": SCHEMA_VERSION,
        "build_commit": backend.LLAMA_CPP_COMMIT,
        "patch_id": library.patch_id or None,
        "backends": bench.backends(library.directory, llm.devices),
        "model_filename": str(path),
        "model_sha256": None if form == "md" else file_sha256(path),
        "model_type": llm.model_type(),
        "model_size": info.weight_bytes,
        "model_n_params": info.elements,
        "n_batch": flags["n_batch"],
        "n_ubatch": flags["n_ubatch"],
        "n_threads": flags["n_threads"],
        "type_k": flags["cache_type_k"],
        "type_v": flags["cache_type_v"],
        "n_gpu_layers": flags["n_gpu_layers"],
        "flash_attn": flags["flash_attn"],
        "seed": bench.SEED,
    }


def record(constant: Record, result: Timed) -> Record:
    """One row, all of it."""
    loop, work = result.variant.loop, result.work
    return {
        **constant,
        "library": "stock" if result.variant.stock else "patched",
        "patch_id": None if result.variant.stock else constant["patch_id"],
        "window": None if loop is None else f"{loop.window[0]}:{loop.window[1]}",
        "k": None if loop is None else loop.k,
        "kv": None if loop is None else loop.kv,
        "loop": None if loop is None else str(loop),
        "test": str(work),
        "n_prompt": work.prompt,
        "n_gen": work.generated,
        "n_depth": work.depth,
        "test_time": result.time,
        "n": len(result.samples_ns),
        "avg_ns": result.mean_ns,
        "stddev_ns": result.stdev_ns,
        "avg_ts": result.mean_ts,
        "stddev_ts": result.stdev_ts,
        "samples_ns": list(result.samples_ns),
        "samples_ts": result.samples_ts,
    }


def compared(constant: Record, result: Timed, results: list[Timed], n_layer: int, path: Path) -> Record:
    """A row of --compare: looped over plain, plain over stock, and what a loop should cost."""
    loop = result.variant.loop
    base = (
        None if result.variant.stock else next((r for r in results if r.variant == Variant(None, loop is None)), None)
    )
    found = None if base is None else bench.ratio(result, base)
    layers = weights = None
    if loop is not None:
        layers = bench.predicted(result.work, loop, loop.relative_cost(n_layer))
        if not result.work.prompt:  # of a prompt only the last token meets the output matrix
            weights = bench.predicted(result.work, loop, bench.weight_cost(path, loop))
    return record(constant, result) | {
        "over": None if base is None else str(base.variant),
        "ratio": None if found is None else found.mean,
        "ratio_low": None if found is None else found.low,
        "ratio_high": None if found is None else found.high,
        "ratio_level": None if found is None else found.level,
        "predicted_layers": layers,
        "predicted_weights": weights,
    }


def _pairs(texts: tuple[str, ...]) -> list[tuple[int, int]]:
    pairs = [whole_numbers(text, "-pg") for text in texts]
    for text, pair in zip(texts, pairs, strict=True):
        if len(pair) != 2:
            raise UsageError(
                f"-pg {text!r} is not a pair.", "write it like -pg 512,128: prompt, then generated tokens."
            )
    return [(pair[0], pair[1]) for pair in pairs]


def _check_context_holds(works: list[Workload], n_ctx: int) -> None:
    work = max(works, key=lambda w: w.context)
    if work.context > n_ctx:
        raise UsageError(
            f"test {work} needs {work.context} tokens of context, which has {n_ctx}.",
            "leave out -c, which then is what the tests need, or give smaller tests.",
        )


def _stock_for_comparison(required: bool) -> bool:
    """Whether there is a stock library to compare with. Raises BackendError if there must be."""
    try:
        backend.locate(stock=True)
    except BackendError as e:
        if required:
            raise
        terminal.note(f"the stock library is left out: {e.message} ({e.hint})")
        return False
    return True


def _variants(loops: list[LoopSpec], stock: bool, compare: bool, repetitions: int, over_rpc: bool) -> list[Variant]:
    """What is measured, in the order of the rows. Raises UsageError, BackendError."""
    if not compare:
        if stock and loops:
            raise UsageError("the stock llama.cpp has no loops.", "leave out --window, or add --compare.")
        return [Variant(loop) for loop in loops] or [Variant(None, stock)]
    if repetitions < 2:
        raise UsageError("--compare needs -r 2 or more: one round has no interval.", "-r 6 is the least for 95 %.")
    with_stock = not over_rpc and _stock_for_comparison(required=stock or not loops)
    if over_rpc:
        if stock or not loops:
            raise UsageError(
                "the stock library cannot be compared over RPC: a server has one client at a time.",
                "leave out --rpc, or measure it alone: --stock without --compare.",
            )
        terminal.note("the stock library is left out: an RPC server has one client at a time.")
    return [*([Variant(None, True)] if with_stock else []), Variant(), *(Variant(loop) for loop in loops)]


@click.command(name="bench")
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
@click.option("-o", "--output", "form", metavar="|".join(FORMS), default="md", show_default=True,
              help="How to print it.")  # fmt: skip
@click.option("--stock", is_flag=True, help="Measure the unpatched llama.cpp.")
@click.option("--compare", is_flag=True,
              help="Interleave stock, plain and looped, and print time ratios beside the predicted cost.")  # fmt: skip
@click.option("--no-warmup", is_flag=True, help="Do not evaluate each test once before it is timed.")
@loop_list_options
@context_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    n_prompt: str,
    n_gen: str,
    n_pg: tuple[str, ...],
    n_depth: str,
    repetitions: int,
    form: str,
    stock: bool,
    compare: bool,
    no_warmup: bool,
    **flags: Any,
) -> None:
    """Measure tokens per second, as llama-bench does: pp512 is a prompt of 512 tokens, tg128 128 generated ones.

    Every window is measured with every K and every kv. With --compare, a round measures the stock library, the plain
    model and every loop once, in a new order, and a time ratio is taken within its round: printed are the median over
    rounds and its 95 % interval, beside what the layer count (layers) and the weights read (weights) predict. The
    context is as large as the tests need.

    \b
    ggufloop bench smollm2-135m --window 10:14,12:16 --K 1,3
    ggufloop bench smollm2-135m --window 12:16 --K 3 --kv first,frozen --compare -r 7
    """
    if form not in FORMS:
        raise UsageError(f"output form {form!r} is not known.", nearest(form, FORMS))
    works = bench.workloads(
        whole_numbers(n_prompt, "-p"), whole_numbers(n_gen, "-n"), _pairs(n_pg), whole_numbers(n_depth, "-d")
    )
    check_context(flags)
    if flags["ctx_size"]:
        _check_context_holds(works, flags["ctx_size"])
    find = cache(lambda: model_from_flags(*(flags.pop(name) for name in MODEL_FLAGS)))
    loops = loops_from_flags(
        flags.pop("window"), cache(lambda: loop_suggestion(find())()), **{name: flags.pop(name) for name in LOOP_FLAGS}
    )
    variants = _variants(loops, stock, compare, repetitions, bool(flags["rpc_servers"]))
    path = find()
    check_loops(path, loops)
    if flags["ctx_size"] is None:
        flags["ctx_size"] = max(work.context for work in works)
    check_memory([path], flags, loops)
    settings = engine_settings(path, flags) | {"swa_full": False}  # as llama-bench
    _check_context_holds(works, settings["n_ctx"])
    library = backend.activate(stock=stock and not compare)
    from ggufloop.engine import LoopedLlama

    with ExitStack() as stack:
        with terminal.progress(f"loading {path.name} ..."):
            llm = LoopedLlama(path, verbose=ctx.obj["verbose"], **settings)
            stack.callback(llm.close)
            for loop in loops:
                llm.set_loop(loop)  # what only the loaded model can refuse is refused before anything is measured
            child = None
            if compare and variants[0].stock:
                child = stack.enter_context(Child(path, True, settings))
        shown = settings | {"cache_type_k": flags["type_k"], "cache_type_v": flags["type_v"]}
        constant = _constant(llm, path, library, shown, form)
        built = "stock" if library.stock else f"patch {library.patch_id or 'unknown'}"
        printer = Printer(form, columns(constant, variants, compare), f"{backend.LLAMA_CPP_COMMIT}, {built}")
        printer.begin()
        stack.callback(printer.end)

        def run(variant: Variant, work: Workload, repetition: int, warm: bool = True) -> int:
            with terminal.progress(f"{work}: {variant}, {repetition + 1} of {repetitions} ..."):
                warm = warm and not no_warmup
                if variant.stock and child is not None:
                    return child.run(work, None, repetition, warm).ns
                return bench.sample(llm, work, variant.loop, repetition, warm)

        for work in works if compare else []:
            results = bench.compare(variants, work, repetitions, run)
            for result in results:
                printer.row(compared(constant, result, results, llm.n_layer(), path))
        for variant in [] if compare else variants:
            for work in works:
                samples = tuple(run(variant, work, i, warm=i == 0) for i in range(repetitions))
                printer.row(record(constant, Timed(variant, work, samples, bench.now())))
    _notes(loops, repetitions, compare)


def _notes(loops: list[LoopSpec], n: int, compare: bool) -> None:
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
