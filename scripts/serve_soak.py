#!/usr/bin/env python3
"""Many clients at one server for a while: every answer is the one computed alone, none is lost, memory stays flat.

    python scripts/serve_soak.py                            # 64 clients, 60 seconds, a tiny random model
    python scripts/serve_soak.py --clients 8 --seconds 10

Clients ask with mixed loops, stream or not, come back with a conversation, and now and then go away in the middle of
an answer. What each answer must be is computed beforehand by a LoopedLlama of its own. Exit code 0 if all of
it held; prints one line of counts either way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError
from ggufloop.generate import complete
from ggufloop.sampling import Sampling
from ggufloop.server.run import check_installed

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import tiny
from serving import SMALL, Server

LOOPS = (
    None, "2:5 k=3", "2:5 k=3 kv=frozen", "2:5 k=2 kv=each", "2:5 k=3 kv=each", "2:5 k=2 kv=last",
    "2:5 k=6 decode=bypass", "2:5 k=3 decode=entropy:4.2",
)  # fmt: skip


@dataclass(frozen=True)
class Talk:
    """A conversation of two turns: prompts as tokens, and what must be answered.

    answers: as a conversation in a context of its own. anew: where the prompt is read from the start instead, which is
    the same for the first turn, and for the second of a conversation that had to make room.
    """

    loop: str | None
    prompts: tuple[tuple[int, ...], tuple[int, ...]]
    answers: tuple[str, str]
    anew: tuple[str, str]
    samplings: tuple[Sampling, Sampling]


@dataclass
class Counts:
    """What came of it."""

    right: int = 0
    anew: int = 0
    wrong: list[str] = field(default_factory=list)
    left: int = 0
    busy: int = 0
    lost: list[str] = field(default_factory=list)


def talks(model: Path, n: int, seed: int) -> list[Talk]:
    """n conversations, answered by models of their own."""
    rng = random.Random(seed)
    out = []
    for loop in LOOPS:
        llm = LoopedLlama(model, n_ctx=512, n_batch=512, n_ubatch=512, loop=loop, **SMALL)
        for _ in range(n // len(LOOPS)):
            llm.reset()
            said = [rng.randrange(256) for _ in range(rng.randrange(4, 120))]
            first, second = (Sampling(seed=rng.randrange(10**6), n=rng.randrange(2, 14)) for _ in range(2))
            answer = complete(llm, said, first)
            more = [*said, *answer.tokens, *(rng.randrange(256) for _ in range(rng.randrange(1, 20)))]
            texts = (answer.text, complete(llm, more, second).text)
            llm.reset()
            anew = (answer.text, complete(llm, more, second).text)
            out.append(Talk(loop, (tuple(said), tuple(more)), texts, anew, (first, second)))
        llm.close()
    rng.shuffle(out)
    return out


def resident() -> int:
    """Bytes of memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def client(server: Server, number: int, asked: list[Talk], until: float, counts: Counts, lock: threading.Lock) -> None:
    """Ask until the time is up, each conversation from its first turn to its last."""
    rng = random.Random(number)
    for talk in itertools.cycle(asked[number % len(asked) :] + asked[: number % len(asked)]):
        for prompt, goes_on, anew, sampling in zip(talk.prompts, talk.answers, talk.anew, talk.samplings, strict=True):
            if time.monotonic() >= until:
                return
            body: dict[str, Any] = {
                "prompt": prompt, "loop": talk.loop, "seed": sampling.seed, "max_tokens": sampling.n,
                "user": f"client {number}", "stream": rng.random() < 0.5, "stream_options": {"include_usage": True},
            }  # fmt: skip
            if rng.random() < 0.1:
                _leave(server, {**body, "max_tokens": 300}, rng)
                with lock:
                    counts.left += 1
            try:
                reply = server.post("/v1/completions", body)
            except OSError as e:
                with lock:
                    counts.lost.append(repr(e))
                continue
            with lock:
                if reply.status == 503:
                    counts.busy += 1
                elif reply.status != 200:
                    counts.lost.append(f"{reply.status} {reply.body[:200]!r}")
                else:
                    text, cached = _read(reply.events if body["stream"] else [reply.json])
                    expected = goes_on if cached else anew
                    if text == expected:
                        counts.right += 1
                        counts.anew += prompt == talk.prompts[1] and not cached
                    else:
                        counts.wrong.append(f"{talk.loop}: {text!r} instead of {expected!r}, {cached} cached")


def _read(events: list[Any]) -> tuple[str, int]:
    """The text of an answer, and how many tokens of its prompt were not read for it."""
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    return text, int(events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"])


def _leave(server: Server, body: dict[str, Any], rng: random.Random) -> None:
    """Ask, and go away while the answer is awaited or read."""
    with server.connection() as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        if rng.random() < 0.5:
            connection.getresponse().read(rng.randrange(1, 400))
        else:
            time.sleep(rng.random() * 0.1)


def soak(
    clients: int, seconds: float, conversations: int, parallel: int, cache_mib: int, seed: int = 1
) -> tuple[Counts, float]:
    """Run it; -> what came of it, and the memory's growth from a fifth of the time to the end, in MiB."""
    counts, lock = Counts(), threading.Lock()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.write(Path(folder, "tiny.gguf"), tiny.FAMILIES["llama"])
        asked = talks(model, conversations, seed)
        limits = {"parallel": parallel, "queue": 2 * clients, "cache_bytes": cache_mib * 2**20}
        with Server(model, limits=limits) as server:
            until = time.monotonic() + seconds
            threads = [
                threading.Thread(target=client, args=(server, i, asked, until, counts, lock)) for i in range(clients)
            ]
            for thread in threads:
                thread.start()
            time.sleep(seconds / 5)
            early = resident()
            for thread in threads:
                thread.join()
            growth = (resident() - early) / 2**20
            deadline = time.monotonic() + 5
            worker = server.running.worker
            while (worker.running() or worker.waiting()) and time.monotonic() < deadline:
                time.sleep(0.01)
            if worker.running() or worker.waiting():
                counts.lost.append("jobs of clients that left are still there")
    return counts, growth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--conversations", type=int, default=160)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--cache-ram", type=int, default=8, help="MiB for conversations; few make many start anew")
    args = parser.parse_args()
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that goes away
    try:
        check_installed()
    except GgufloopError as e:
        parser.error(f"{e.message} {e.hint}")
    counts, growth = soak(args.clients, args.seconds, args.conversations, args.parallel, args.cache_ram)
    for line in (counts.wrong + counts.lost)[:10]:
        print(line, file=sys.stderr)
    print(
        f"{args.clients} clients, {args.seconds:g} s: {counts.right} answers right "
        f"({counts.anew} conversations read anew), {len(counts.wrong)} wrong, "
        f"{len(counts.lost)} lost, {counts.busy} refused, {counts.left} abandoned; memory {growth:+.1f} MiB"
    )
    return 1 if counts.wrong or counts.lost or not counts.right else 0


if __name__ == "__main__":
    sys.exit(main())
