#!/usr/bin/env python3
"""Many clients at one server for a while: no answer is lost, and each is one that the request can have.

    python scripts/serve_soak.py                            # 64 clients, 60 seconds, a tiny random model
    python scripts/serve_soak.py --clients 8 --seconds 10

Clients ask `ggufloop serve` with mixed loops, stream or not, come back with a conversation, and now and then go away in
the middle of an answer. What each answer must be is computed beforehand by a LoopedLlama of its own. llama.cpp computes
one row by other kernels than several, so an answer that was generated beside others may take another turn where two
tokens are about as likely: it is right as far as it is the same, and one whose first token differs is wrong.
The prompt of a loop with kv first or last has its batch to itself, so its first token is exact; so are all tokens at
--parallel 1. Exit code 0 if all of it held; prints one line of counts either way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from support import tiny
from support.serving import SMALL, Server, alone, served

LOOPS = (
    None, "2:5 k=3", "2:5 k=3 kv=frozen", "2:5 k=2 kv=last", "2:5 k=6 decode=bypass", "2:5 k=3 decode=first:3",
    "2:5 k=6 passes=3 kv=frozen decode=bypass", "3:5 k=4 solver=naive",
)  # fmt: skip
LENGTH = 10
TEXT = 256
"""Tokens from here on are no text of the model, but an end, which a server counts to the answer."""


@dataclass(frozen=True)
class Question:
    """A prompt, under which loop it is read, and the likeliest tokens after it."""

    loop: str | None
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass
class Counts:
    """What came of it. turned: answers that are the same up to a token, and go on otherwise."""

    right: int = 0
    turned: int = 0
    wrong: list[str] = field(default_factory=list)
    left: int = 0
    lost: list[str] = field(default_factory=list)


def questions(model: Path, n: int, seed: int) -> list[Question]:
    """n of them, answered by models of their own."""
    rng = random.Random(seed)
    out = []
    for loop, _ in zip(itertools.cycle(LOOPS), range(n), strict=False):
        prompt = tuple(rng.randrange(256) for _ in range(rng.randrange(4, 120)))
        answer = tuple(alone(model, prompt, LENGTH, loop))
        if answer:  # some are at an end already
            out.append(Question(loop, prompt, answer))
    rng.shuffle(out)
    return out


def client(server: Server, number: int, asked: list[Question], until: float, counts: Counts, lock: Any) -> None:
    """Ask until the time is up."""
    rng = random.Random(number)
    for question in itertools.cycle(asked[number % len(asked) :] + asked[: number % len(asked)]):
        if time.monotonic() >= until:
            return
        body = {
            "prompt": question.prompt, "loop": question.loop, "n_predict": LENGTH, "temperature": 0,
            "return_tokens": True, "stream": rng.random() < 0.5,
        }  # fmt: skip
        if rng.random() < 0.1:
            _leave(server, {**body, "n_predict": 300}, rng)
            with lock:
                counts.left += 1
        try:
            reply = server.post("/completion", body)
            found = reply.events if body["stream"] else [reply.json]
            tokens = [token for event in found for token in event.get("tokens", ()) if token < TEXT]
            told = found[-1]["timings"].get("loop")
        except (OSError, ValueError, KeyError, LookupError) as e:
            with lock:
                counts.lost.append(f"{question.loop}: {e!r}")
            continue
        if body["stream"]:
            left = iter(question.answer)  # a stream leaves out the tokens of bytes that make no character
            same = all(token in left for token in tokens)
            right = True
        else:
            same = tuple(tokens[: len(question.answer)]) == question.answer
            right = tokens[:1] == list(question.answer[:1])
        with lock:
            if reply.status != 200:
                counts.lost.append(f"{reply.status} {reply.body[:200]!r}")
            elif not right or told != question.loop:
                counts.wrong.append(f"{question.loop}: {tokens} instead of {list(question.answer)}, told {told}")
            else:
                counts.right += same
                counts.turned += not same


def _leave(server: Server, body: dict[str, Any], rng: random.Random) -> None:
    """Ask, and go away while the answer is awaited or read."""
    with server.connection() as connection:
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        if rng.random() < 0.5:
            connection.getresponse().read(rng.randrange(1, 400))
        else:
            time.sleep(rng.random() * 0.1)


def soak(clients: int, seconds: float, n: int, parallel: int, seed: int = 1) -> Counts:
    """Run it; -> what came of it."""
    counts, lock = Counts(), threading.Lock()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.write(Path(folder, "tiny.gguf"), tiny.FAMILIES["llama"])
        asked = questions(model, n, seed)
        with served(model, *SMALL, "-np", str(parallel)) as server:
            until = time.monotonic() + seconds
            threads = [
                threading.Thread(target=client, args=(server, i, asked, until, counts, lock)) for i in range(clients)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if server.get("/health").status != 200 or not server.tokens([1, 2, 3], 2):
                counts.lost.append("the server does not answer afterwards")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--questions", type=int, default=160)
    parser.add_argument("--parallel", type=int, default=4)
    args = parser.parse_args()
    counts = soak(args.clients, args.seconds, args.questions, args.parallel)
    for line in (counts.wrong + counts.lost)[:10]:
        print(line, file=sys.stderr)
    print(
        f"{args.clients} clients, {args.seconds:g} s: {counts.right} answers right, {counts.turned} that took another "
        f"turn, {len(counts.wrong)} wrong, {len(counts.lost)} lost, {counts.left} abandoned"
    )
    return 1 if counts.wrong or counts.lost or not counts.right else 0


if __name__ == "__main__":
    sys.exit(main())
