"""What a loop costs: time and memory of each plan beside the plain model and the stock library, in one run.

    python3 scripts/bootstrap.py python scripts/bench_overhead.py [MODEL ...] [-r 7] [-o md|csv|json|jsonl]

Every round measures all plans one after the other in a new random order, and a ratio is taken within its round, so
what disturbs the machine for longer than a round cancels. A round's decode time is the median over its tokens.
Printed is the median ratio over rounds with the interval of the median that the sign test gives (95 % or the widest
the rounds allow), beside two predictions:
  layers  1 + extra layer evaluations / layers, what `inspect` says;
  weights 1 + extra weight bytes / weight bytes read per token, which knows that the output matrix is not looped.
The stock library and each memory reading run in processes of their own.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from math import comb
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from ggufloop import registry
from ggufloop.errors import GgufloopError
from ggufloop.inspect import describe, plain_kv_bytes
from ggufloop.loop import LoopSpec
from ggufloop.modelfile import read_model
from ggufloop.table import Column, Table

PROMPT, GENERATED, CONTEXT = 512, 64, 1024
PLANS = ("k=3", "k=3 kv=frozen", "k=3 kv=last", "k=3 kv=each", "k=3 mode=layer", "k=6", "k=6 passes=3")


def worker() -> None:
    """Answer one JSON job per line: {"loop": text or null} -> seconds of prefill and decode, bytes of kv and rss."""
    import resource

    from ggufloop import backend

    path, stock, threads = sys.argv[2], sys.argv[3] == "stock", int(sys.argv[4])
    backend.activate(stock=stock)
    from ggufloop.engine import LoopedLlama

    llm = LoopedLlama(
        path, n_ctx=CONTEXT, n_batch=PROMPT, n_ubatch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    tokens = [1000 + 7 * i % 5000 for i in range(PROMPT + GENERATED)]
    for line in sys.stdin:
        loop = json.loads(line)["loop"]
        llm.set_loop(LoopSpec.parse(loop) if loop else None)
        llm.reset()
        llm.eval(tokens[:PROMPT])  # the first evaluation after a change allocates
        llm.eval(tokens[PROMPT : PROMPT + 1])
        llm.reset()
        start = perf_counter()
        llm.eval(tokens[:PROMPT])
        prefill = perf_counter() - start
        steps = []
        for token in tokens[PROMPT:]:
            start = perf_counter()
            llm.eval([token])
            steps.append(perf_counter() - start)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        answer = {"prefill": prefill, "decode": statistics.median(steps), "kv": llm.memory_bytes(), "rss": rss}
        print(json.dumps(answer), flush=True)


class Worker:
    """A process that holds one library and one model."""

    def __init__(self, path: Path, kind: str, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", str(path), kind, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, loop: str | None) -> dict[str, float]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"loop": loop}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise GgufloopError("a measuring process ended early.", "see its message above.")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.communicate()


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its distribution-free interval: order statistics of at least 95 % coverage, or the extremes."""
    ordered, n = sorted(values), len(values)
    depth = 0
    while 2 * sum(comb(n, i) for i in range(depth + 1)) / 2**n <= 0.05:
        depth += 1
    low = max(depth - 1, 0)
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


def weight_cost(path: Path, loop: LoopSpec) -> float:
    """Looped over plain weight bytes read per token; an embedding counts only where it is the output matrix too."""
    tensors = [t for header in read_model(path) for t in header.tensors]
    tied = not any(t.name == "output.weight" for t in tensors)
    layers = {f"blk.{il}." for il in range(*loop.window)}
    total = sum(t.nbytes for t in tensors if tied or not t.name.startswith("token_embd."))
    window = sum(t.nbytes for t in tensors if any(t.name.startswith(prefix) for prefix in layers))
    return 1 + loop.extra_layer_evaluations() / loop.layers * window / total


def measure(path: Path, rounds: int, threads: int) -> Iterator[list[Any]]:
    """Rows of the table for one model."""
    info = describe(path)
    (a, b), _ = registry.suggest_window(path)
    plans = {None: "plain", **{f"{a}:{b} {plan}": plan for plan in PLANS}}
    workers = {kind: Worker(path, kind, threads) for kind in ("stock", "patched")}
    jobs: list[tuple[str, str | None]] = [("stock", None), *(("patched", loop) for loop in plans)]
    times: dict[tuple[str, str | None], list[dict[str, float]]] = {job: [] for job in jobs}
    for round_ in range(rounds):
        click.echo(f"{path.name}: round {round_ + 1} of {rounds}", err=True)
        for job in random.Random(round_).sample(jobs, len(jobs)):
            times[job].append(workers[job[0]].run(job[1]))
    for w in workers.values():
        w.close()
    base = times["patched", None]
    memory = {loop: alone(path, loop, threads) for loop in plans}

    def ratios(job: tuple[str, str | None], what: str, over: list[dict[str, float]]) -> list[float]:
        return list(interval([mine[what] / plain[what] for mine, plain in zip(times[job], over, strict=True)]))

    yield [path.name, "off / stock", None, None, *ratios(("patched", None), "prefill", times["stock", None]),
           *ratios(("patched", None), "decode", times["stock", None]), None, None, None]  # fmt: skip
    per_layer = plain_kv_bytes(info, CONTEXT, "f16", "f16")
    for loop, label in plans.items():
        if loop is None:
            continue
        spec = LoopSpec.parse(loop)
        measured = memory[loop]
        yield [path.name, f"{a}:{b} {label}", spec.relative_cost(info.n_layer), weight_cost(path, spec),
               *ratios(("patched", loop), "prefill", base), *ratios(("patched", loop), "decode", base),
               measured["rss"] / memory[None]["rss"],
               int(measured["kv"] - memory[None]["kv"]), spec.extra_kv_bytes(per_layer)]  # fmt: skip


def alone(path: Path, loop: str | None, threads: int) -> dict[str, float]:
    """One measurement in a process that has seen no other plan: its peak memory is that plan's."""
    w = Worker(path, "patched", threads)
    try:
        return w.run(loop)
    finally:
        w.close()


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
    click.echo(f"n = {rounds} rounds, prompt {PROMPT}, {GENERATED} generated, {threads} threads", err=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker()
    else:
        main()
