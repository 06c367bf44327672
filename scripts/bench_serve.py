"""What a loop costs llama-server: without one beside the stock server, and looped beside plain, in one run.

    ggufloop build --stock --with-tools; ggufloop build --with-tools     # once: both servers, and llama-bench
    python3 scripts/bootstrap.py python scripts/bench_serve.py [MODEL] [-r 5] [-t 2] [--loop TEXT ...] [-o csv]

Both servers run all the time with the same flags and 8 slots, and one of them is asked at a time: a round measures
everything once, what is compared in neighbouring moments and in a new order, so ratios are of the same round. Shown
are medians of the rounds, and the interval of the ratio, which is its range for 5 rounds (94 %). "cpu" is the ratio of
the CPU time that the servers took, the better number where other work is on the machine; it has no llama-bench.

A prompt is token numbers of which no other prompt has the first ones: a new client finds nothing in a cache, and its
answer is checked to say so. Every answer goes on past an end mark, so that all have as many tokens. A client waits for
a whole answer; the first token is an answer of one. Before each measurement the server gives a short answer under the
same loop, which is not counted: changing the loop is not measured.

Clients who ask at once are given the first slots. Left to the server they have whichever are free, and llama.cpp does
not batch slots that are no neighbours (with a context each, --no-kv-unified): 4 clients of 8 slots were served at half
the speed by chance, by either server.

"layers" is what a loop would cost by the count of layers, "weights" by what is read per token: the output matrix is not
looped. The last row is of two more servers with one slot: 10 conversations of two turns by chat, half of them sampled
with a seed, and how many of the 20 answers have the same text and the same counts of tokens.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
from llama_server import Server, running

from ggufloop.backend import library
from ggufloop.errors import GgufloopError
from ggufloop.loop import LoopSpec
from ggufloop.measure import bench
from ggufloop.measure.stats import ratio_interval
from ggufloop.models import registry
from ggufloop.models.info import describe
from ggufloop.table import FORMS, Column, Table

SLOTS = 8
SHORT, LONG, MESSAGE = 16, 400, 24  # tokens of a prompt, of a long one, of a conversation's next message
ANSWER, CHAT_ANSWER = 64, 32
CLIENTS = {1: True, 4: True, 8: False}  # and whether they are looped too
LOOPS = ("k=3", "k=3 kv=frozen")
TOPICS = ("the sea", "bread", "a lighthouse", "prime numbers", "Rome", "bees", "chess", "glaciers", "ink", "the moon")


@dataclass(frozen=True)
class Way:
    """One way to an answer: which program gives it, and under which loop."""

    program: str
    loop: LoopSpec | None = None

    def __str__(self) -> str:
        return f"{self.program} {self.loop}" if self.loop else self.program


STOCK, OURS, BENCH = Way("stock"), Way("plain"), Way("llama-bench")


class Spent(NamedTuple):
    """Seconds of the clock, and of the server's CPU time: nan where nobody knows."""

    wall: float
    cpu: float = math.nan


Times = dict[tuple[Way, str], list[Spent]]
"""One per round, by way and by what was measured."""


class Prompts:
    """Prompts that are told apart by their first tokens: no two of a long run share more than one."""

    def __init__(self, vocabulary: int) -> None:
        self._ids = range(vocabulary // 4, vocabulary)  # the first ones are where control tokens are
        self._count = itertools.count()
        self._random = random.Random(bench.SEED)

    def new(self, n: int) -> list[int]:
        high, low = divmod(next(self._count), len(self._ids))
        first = [self._ids[low], self._ids[high % len(self._ids)]]
        return first + self.message(n - len(first))

    def message(self, n: int) -> list[int]:
        """Tokens for a conversation to go on with."""
        return self._random.choices(self._ids, k=n)


def answers(server: Server, prompts: Prompts, loop: LoopSpec | None, clients: int) -> tuple[Spent, Spent]:
    """Time per token when so many clients ask at once, and of the last one's once its prompt was read."""
    asked = [prompts.new(SHORT) for _ in range(clients)]
    start, cpu = time.perf_counter(), server.cpu_seconds()
    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(lambda slot: server.complete(asked[slot], ANSWER, loop, slot), range(clients)))
    wall, cpu = time.perf_counter() - start, server.cpu_seconds() - cpu
    for _, answer in replies:
        check_new(answer)
    one, answer = replies[-1]
    n = clients * ANSWER
    return Spent(wall / n, cpu / n), Spent((one - answer["timings"]["prompt_ms"] / 1e3) / (ANSWER - 1))


def first_tokens(server: Server, prompts: Prompts, loop: LoopSpec | None) -> tuple[Spent, Spent]:
    """Time to the first token of a new client with a long prompt, and of the same one's next message."""
    prompt = prompts.new(LONG)
    cpu = [server.cpu_seconds()]
    new, answer = server.complete(prompt, 1, loop)
    cpu.append(server.cpu_seconds())
    check_new(answer)
    returning, next_ = server.complete([*prompt, *answer["tokens"], *prompts.message(MESSAGE)], 1, loop)
    cpu.append(server.cpu_seconds())
    if next_["timings"]["cache_n"] < LONG:
        click.echo(f"a returning client found {next_['timings']['cache_n']} of its {LONG} tokens", err=True)
    return Spent(new, cpu[1] - cpu[0]), Spent(returning, cpu[2] - cpu[1])


def check_new(answer: Any) -> None:
    """Raise GgufloopError for a new client that found more than a first token in a cache."""
    found = answer["timings"]["cache_n"]
    if found > 1:
        raise GgufloopError(f"a new client found {found} tokens of its prompt in a cache, so its time means nothing.")


def benched(program: Path, model: Path, flags: list[str]) -> Spent:
    """Time per generated token as llama-bench has them, as many and as deep as one client's."""
    words = [program, "-m", model, *flags, "-p", 0, "-n", ANSWER, "-d", SHORT, "-r", 1, "-o", "json"]
    done = subprocess.run(list(map(str, words)), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise GgufloopError(f"llama-bench ended ({done.returncode}): {said[-1] if said else 'it says nothing'}")
    return Spent(float(json.loads(done.stdout)[0]["avg_ns"]) / 1e9 / ANSWER)


def measure(model: Path, loops: list[LoopSpec], rounds: int, flags: list[str]) -> Times:
    """Ask both servers, and llama-bench, rounds times."""
    times: Times = defaultdict(list)
    ways = [STOCK, OURS, *(Way("looped", loop) for loop in loops)]
    tool = library.program("llama-bench")
    with ExitStack() as stack:
        stock, ours = (
            stack.enter_context(running(library.program("llama-server", stock=kind), model, SLOTS, flags))
            for kind in (True, False)
        )
        prompts = Prompts(stock.vocabulary())

        def ready(way: Way) -> Server:
            server = stock if way == STOCK else ours
            server.complete(prompts.new(SHORT), 2, way.loop)
            return server

        for round_ in range(rounds):
            click.echo(f"round {round_ + 1} of {rounds}", err=True)
            for clients, looped in CLIENTS.items():
                asked = [*(ways if looped else ways[:2]), *([BENCH] if clients == 1 else [])]
                for way in (asked[i] for i in bench.order(round_, len(asked))):
                    if way == BENCH:
                        times[way, "token"].append(benched(tool, model, flags))
                        continue
                    each, token = answers(ready(way), prompts, way.loop, clients)
                    times[way, f"{clients}"].append(each)
                    if clients == 1:
                        times[way, "token"].append(token)
            for way in (ways[i] for i in bench.order(round_, len(ways))):
                new, returning = first_tokens(ready(way), prompts, way.loop)
                times[way, "new"].append(new)
                times[way, "returning"].append(returning)
    return times


def said(server: Server) -> list[Any]:
    """What it answers in 10 conversations of two turns: all but names and times."""
    found = []
    for i, topic in enumerate(TOPICS):
        sampling = {"temperature": 0.8, "seed": i} if i % 2 else {"temperature": 0}
        messages = [{"role": "user", "content": f"Tell me about {topic}."}]
        for _ in range(2):
            body = {"messages": messages, "max_tokens": CHAT_ANSWER, **sampling}
            answer = server.ask("/v1/chat/completions", body)
            counts = [answer["timings"][name] for name in ("cache_n", "prompt_n", "predicted_n")]
            found.append([answer["choices"], answer["usage"], counts])
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "Go on."}]
    return found


def alike(model: Path, flags: list[str]) -> list[Any]:
    """The row that says whether off is stock."""
    with ExitStack() as stack:
        stock, ours = (
            said(stack.enter_context(running(library.program("llama-server", stock=kind), model, 1, flags)))
            for kind in (True, False)
        )
    same = sum(json.dumps(a) == json.dumps(b) for a, b in zip(stock, ours, strict=True))
    return ["answers alike: plain / stock", 1, "answers", same, len(stock), same / len(stock), *[None] * 7]


def ratios(a: list[Spent], b: list[Spent]) -> list[float | None]:
    """Of the clock's times of a over those of b, and of the CPU's, each with its interval."""
    found: list[float | None] = []
    for i in (0, 1):
        times, base = [spent[i] for spent in a], [spent[i] for spent in b]
        if any(map(math.isnan, times + base)):
            found += [None] * 3
        else:
            ratio = ratio_interval(times, base)
            found += [ratio.mean, ratio.low, ratio.high]
    return found


def rows(model: Path, loops: list[LoopSpec], times: Times) -> Iterator[list[Any]]:
    """The table's rows: speeds against stock, times of all else."""
    costs: dict[LoopSpec | None, list[Any]] = {None: [None, None]}
    costs |= {loop: [loop.relative_cost(describe(model).n_layer), bench.weight_cost(model, loop)] for loop in loops}

    def row(name: str, n: int, own: list[Spent], base: list[Spent], loop: LoopSpec | None = None) -> list[Any]:
        middle = [1e3 * median(wall for wall, _ in spent) for spent in (own, base)]
        return [name, n, "ms", *middle, *ratios(own, base), *costs[loop]]

    for n in CLIENTS:
        own, base = (times[way, f"{n}"] for way in (OURS, STOCK))
        speeds = [median(1 / wall for wall, _ in spent) for spent in (own, base)]
        yield ["tokens per second: plain / stock", n, "t/s", *speeds, *ratios(base, own), *costs[None]]
    for way in (Way("looped", loop) for loop in loops):
        for n in (n for n, looped in CLIENTS.items() if looped):
            yield row(f"time per token: {way} / plain", n, times[way, f"{n}"], times[OURS, f"{n}"], way.loop)
    yield row("first token of 400: plain / stock", 1, times[OURS, "new"], times[STOCK, "new"])
    for way in (Way("looped", loop) for loop in loops):
        yield row(f"first token of 400: {way} / plain", 1, times[way, "new"], times[OURS, "new"], way.loop)
    for way in (STOCK, OURS, *(Way("looped", loop) for loop in loops)):
        yield row(f"first token, {way}: returning / new", 1, times[way, "returning"], times[way, "new"])
    for way in (STOCK, OURS):
        yield row(f"time per token: {way} / llama-bench", 1, times[way, "token"], times[BENCH, "token"])


@click.command()
@click.argument("model", default="smollm2-135m")
@click.option("-r", "rounds", type=click.IntRange(2), default=5, show_default=True, help="Rounds.")
@click.option("-t", "threads", type=click.IntRange(1), default=2, show_default=True, help="Threads.")
@click.option("-fa", "flash", type=click.Choice(["on", "off", "auto"]), default="auto", show_default=True,
              help="Flash attention.")  # fmt: skip
@click.option("--loop", "texts", metavar="TEXT", multiple=True,
              help="A loop to measure; default: k=3 at the suggested window, and the same with kv=frozen.")  # fmt: skip
@click.option("-o", "form", type=click.Choice(FORMS), default="md", show_default=True, help="How to print it.")
def main(model: str, rounds: int, threads: int, flash: str, texts: tuple[str, ...], form: str) -> None:
    """Measure llama-server with MODEL (default: smollm2-135m): stock, with no loop, and looped."""
    columns = [Column("what"), Column("clients"), Column("unit"), Column("value", ".4g"), Column("against", ".4g")]
    for name in ("ratio", "cpu"):
        low, high = ("low", "high") if name == "ratio" else ("cpu low", "cpu high")
        columns += [Column(column, ".3f") for column in (name, low, high)]
    columns += [Column("layers", ".3f"), Column("weights", ".3f")]
    try:
        path = registry.resolve(model)
        window = "{}:{}".format(*registry.suggest_window(path)[0])
        loops = [LoopSpec.parse(text) for text in texts or [f"{window} {settings}" for settings in LOOPS]]
        library.spin_briefly()
        flags = ["-t", str(threads), "-fa", flash]
        found = [*rows(path, loops, measure(path, loops, rounds, flags)), alike(path, flags)]
    except GgufloopError as e:
        raise click.ClickException(f"{e.message} {e.hint}") from None
    click.echo(Table(tuple(columns), found).render(form), nl=False)
    click.echo(f"n = {rounds} rounds, {SHORT} tokens before {ANSWER} generated ones, {threads} threads", err=True)


if __name__ == "__main__":
    main()
