"""How fast a model runs on a machine that has other work: how long OpenMP's barriers spin, and what that costs.

    python3 scripts/bootstrap.py python scripts/bench_loaded.py [MODEL] [-r 10] [-t 1,2] [-b 2] [-o md|csv|json|jsonl]

A thread that is done spins at a barrier until the others are, and a graph has hundreds of barriers. With a core each
that is the fastest way to wait; where something else wants the core, what is waited for does not run meanwhile.
libgomp gives up spinning after GOMP_SPINCOUNT rounds and sleeps. The default is `backend.SPIN_COUNT`, marked with a
star; it was chosen from this table: as fast as any on a quiet machine, and usable on a loaded one.

libgomp reads its environment when it is loaded, so every setting has a process of its own. A round measures every
setting without and with busy loops beside it, in a new order; "quiet ratio" is the speed over that of libgomp's own
setting in the same round, "kept" the loaded speed over the median of the quiet one.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from ggufloop.backend.library import SPIN_COUNT
from ggufloop.errors import GgufloopError
from ggufloop.measure import bench
from ggufloop.measure.bench import Child, Workload
from ggufloop.measure.stats import ratio_interval
from ggufloop.models import registry
from ggufloop.table import FORMS, Column, Table

WORKS = (Workload(0, 32, 32), Workload(128))
OWN = "GOMP_SPINCOUNT=300000"  # what libgomp takes where nothing is set
SETTINGS = (OWN, *(f"GOMP_SPINCOUNT={n}" for n in (0, 100, 1000, 10000)), "OMP_WAIT_POLICY=passive")
DEFAULT = f"GOMP_SPINCOUNT={SPIN_COUNT}"


@contextmanager
def environment(setting: str) -> Iterator[None]:
    """In which a child is started: the setting and no other word to libgomp."""
    before = dict(os.environ)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)
    name, value = setting.split("=")
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def busy(n: int) -> Iterator[None]:
    """n processes that want a core each."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        time.sleep(0.5)  # until they loop
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(path: Path, threads: int, rounds: int, loops: int) -> Iterator[list[Any]]:
    """Rows of the table for one number of threads."""
    settings = {"n_ctx": 256, "n_batch": 256, "n_threads": threads, "n_threads_batch": threads}
    names = SETTINGS if DEFAULT in SETTINGS else (*SETTINGS, DEFAULT)
    times: dict[tuple[str, Workload, int], list[int]] = {}
    with ExitStack() as stack:
        children = {}
        for name in names:
            with environment(name):
                children[name] = stack.enter_context(Child(path, False, settings))
        for round_ in range(rounds):
            for n in (0, loops):
                click.echo(f"{threads} threads, {n} busy loops, round {round_ + 1} of {rounds}", err=True)
                with busy(n):
                    for work in WORKS:
                        for i in bench.order(round_, len(names)):
                            ns = children[names[i]].run(work, None, round_).ns
                            times.setdefault((names[i], work, n), []).append(ns)
    for work in WORKS:
        for name in names:
            quiet, loaded = ([1e9 * work.tokens / ns for ns in times[name, work, n]] for n in (0, loops))
            ratio = ratio_interval(times[OWN, work, 0], times[name, work, 0])
            middle = statistics.median(quiet)
            yield [str(work), threads, name + (" *" if name == DEFAULT else ""), middle, min(quiet),
                   ratio.mean, ratio.low, ratio.high, statistics.median(loaded), min(loaded),
                   statistics.median(loaded) / middle, min(loaded) / middle]  # fmt: skip


def thread_counts(ctx: click.Context, option: click.Parameter, text: str | None) -> list[int]:
    """Those asked for; without a word 1, 2, 4 and so on to all cores."""
    if text:
        if not all(n.isdecimal() and int(n) > 0 for n in text.split(",")):
            raise click.BadParameter(f"{text!r} is no list of thread counts such as 1,2.")
        return [int(n) for n in text.split(",")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({cores, *(2**i for i in range(cores.bit_length()) if 2**i <= cores)})


@click.command()
@click.argument("model", default="smollm2-135m")
@click.option("-r", "rounds", type=click.IntRange(2), default=10, show_default=True, help="Runs of each cell.")
@click.option("-t", "threads", metavar="N,...", callback=thread_counts, help="Threads; default: 1, 2, 4 ... all cores.")
@click.option("-b", "loops", type=click.IntRange(1), default=2, show_default=True, help="Busy loops beside it.")
@click.option("-o", "form", type=click.Choice(FORMS), default="md", show_default=True, help="How to print it.")
def main(model: str, rounds: int, threads: list[int], loops: int, form: str) -> None:
    """Measure MODEL quiet and beside busy loops, in tokens per second, for each way to wait at a barrier."""
    columns = [Column("test"), Column("threads"), Column("setting"), Column("quiet", ".1f"), Column("worst", ".1f"),
               Column("quiet ratio", ".3f"), Column("low", ".3f"), Column("high", ".3f"), Column("loaded", ".1f"),
               Column("loaded worst", ".1f"), Column("kept", ".2f"), Column("kept worst", ".2f")]  # fmt: skip
    try:
        path = registry.resolve(model)
        rows = [row for n in threads for row in measure(path, n, rounds, loops)]
    except GgufloopError as e:
        raise click.ClickException(f"{e.message} {e.hint}") from None
    click.echo(Table(tuple(columns), rows).render(form), nl=False)
    click.echo(f"n = {rounds} runs, {loops} busy loops; * the default", err=True)


if __name__ == "__main__":  # children import this file too
    main()
