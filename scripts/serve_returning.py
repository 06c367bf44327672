#!/usr/bin/env python3
"""What a client that comes back with a long history waits for its first token, over what its new tokens cost.

    python scripts/serve_returning.py smollm2-135m

The server is a real one, asked through HTTP; the cost is that of the same new tokens in a context of one's own that
holds the history already. Both are measured in turns. `here`: the conversation is still in its sequence; `kept`: others
had that since, so it comes back from where it was kept. Medians of the ratios, with their 95 % interval and n.
"""

from __future__ import annotations

import http.client
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from ggufloop import registry
from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError
from ggufloop.server.run import check_installed
from ggufloop.stats import ratio_interval
from ggufloop.table import Column, Table

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from serving import Server

CONTEXT = 2048


def first_token(server: Server, body: dict[str, Any]) -> float:
    """Seconds from sending a request to the first byte of the first piece of text."""
    with server.connection() as connection:
        connection.connect()
        content = json.dumps({**body, "stream": True})
        started = time.perf_counter()
        connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
        response: http.client.HTTPResponse = connection.getresponse()
        while not response.readline().startswith(b"data: "):
            pass
        seconds = time.perf_counter() - started
        response.read()
    return seconds


def alone(llm: LoopedLlama, prompt: list[int]) -> float:
    """Seconds until the first token after a prompt, in a context that holds its history."""
    started = time.perf_counter()
    next(llm.generate(prompt, temp=0.0))
    return time.perf_counter() - started


def measure(path: Path, loops: list[str], n_history: int, n_new: int, rounds: int, threads: int) -> Iterator[list[Any]]:
    """Rows of the table for one model."""
    window = "{}:{}".format(*registry.suggest_window(path)[0])
    engine = {"n_threads": threads, "n_threads_batch": threads, "flash_attn": True, "verbose": False}
    llm = LoopedLlama(path, n_ctx=CONTEXT, n_batch=CONTEXT, n_ubatch=512, **engine)
    rng = np.random.default_rng(1)

    def text(n: int) -> list[int]:
        return [int(t) for t in rng.integers(100, llm.n_vocab() - 100, n)]

    with Server(path, n_ctx=CONTEXT, cuts=(CONTEXT, 512), engine=engine, limits={"parallel": 1}) as server:
        for plan, kept in itertools.product(loops, (False, True)):
            loop = None if plan == "plain" else f"{window} {plan}"
            llm.set_loop(loop)
            waited, cost = [], []
            history = text(n_history)
            # a token that is drawn is not evaluated, so what is held is the history
            server.complete(history, loop=loop, temperature=0, max_tokens=1)
            alone(llm, history)
            for i in range(rounds):
                click.echo(f"{plan}, {'kept' if kept else 'here'}, round {i + 1} of {rounds}", err=True)
                if kept:
                    server.complete(text(8), loop=loop, temperature=0, max_tokens=1)
                prompt = history + text(n_new)
                cost.append(alone(llm, prompt))
                waited.append(first_token(server, {"prompt": prompt, "loop": loop, "temperature": 0, "max_tokens": 2}))
            ratio = ratio_interval(waited, cost)
            yield [plan, "kept" if kept else "here", 1000 * float(np.median(cost)), 1000 * float(np.median(waited)),
                   ratio.mean, ratio.low, ratio.high, ratio.n]  # fmt: skip
    llm.close()


@click.command()
@click.argument("model", default="smollm2-135m")
@click.option("--loops", default="plain,k=3,k=3 kv=frozen,k=3 kv=each", show_default=True, help="Loops, at one window.")
@click.option("--history", default=1000, show_default=True, help="Tokens of the history.")
@click.option("--new", "n_new", default=20, show_default=True, help="New tokens.")
@click.option("-r", "rounds", type=click.IntRange(6), default=9, show_default=True, help="Rounds.")
@click.option("-t", "threads", type=click.IntRange(1), default=2, show_default=True, help="Threads.")
@click.option("-o", "form", default="md", show_default=True, help="md, csv, json or jsonl.")
def main(model: str, loops: str, history: int, n_new: int, rounds: int, threads: int, form: str) -> None:
    """Measure MODEL: the first token's time through the server, over the new tokens' own cost."""
    columns = (Column("loop"), Column("conversation"), Column("cost ms", ".1f"), Column("waited ms", ".1f"),
               Column("ratio", ".3f"), Column("low", ".3f"), Column("high", ".3f"), Column("n"))  # fmt: skip
    try:
        check_installed()
        rows = list(measure(registry.resolve(model), loops.split(","), history, n_new, rounds, threads))
    except GgufloopError as e:
        raise click.ClickException(f"{e.message} {e.hint}") from None
    click.echo(Table(columns, rows).render(form), nl=False)


if __name__ == "__main__":
    main()
