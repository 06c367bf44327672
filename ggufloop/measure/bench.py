"""How fast a model runs, plain, looped and under the stock library: what `ggufloop bench` measures.

    for work in workloads([512], [128], [], [0]):
        ns = sample(llm, work, LoopSpec((12, 16), 3), repetition=0)      # one measurement
    results = compare(variants, work, rounds=7, run=run)                 # interleaved; ratio(results[2], results[1])

Timed as llama-bench times: random tokens, a warm-up, the cache empty before each repetition, and the device's work
waited for. The binding adds some 40 microseconds to an evaluation, which shows on the smallest models only.
Speeds of a shared machine drift by more than a loop costs, so a comparison measures all variants in every round, each
round in a new order and all on the same tokens, and takes ratios within a round: what disturbs the machine for longer
than a round cancels. One process has one llama.cpp, so a `Child` holds the other library.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec, loop_text
from ggufloop.measure.stats import Estimate, ratio_interval
from ggufloop.models.gguf import read_model

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from ggufloop.backend.ggml import Device
    from ggufloop.engine import LoopedLlama

SEED = 1
"""Of the random tokens and of the orders of rounds."""

_ENDED = ("a measuring process ended early.", "see its message above; if memory is short, a smaller test helps.")


@dataclass(frozen=True)
class Workload:
    """What one test evaluates, in tokens: a prompt, then generated ones, behind `depth` that are not timed."""

    prompt: int = 0
    generated: int = 0
    depth: int = 0

    @property
    def tokens(self) -> int:
        """Tokens timed."""
        return self.prompt + self.generated

    @property
    def context(self) -> int:
        """Tokens the context must hold."""
        return self.tokens + self.depth

    def __str__(self) -> str:
        """llama-bench's name of it: pp512, tg128, pp512+tg128, pp512 @ d1024."""
        parts = [f"pp{self.prompt}"] * (self.prompt > 0) + [f"tg{self.generated}"] * (self.generated > 0)
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")


def workloads(
    prompts: Iterable[int], generated: Iterable[int], pairs: Iterable[tuple[int, int]], depths: Iterable[int]
) -> list[Workload]:
    """The tests in llama-bench's order: by depth, prompts, then generation, then both; one of 0 tokens is left out.

    Raises UsageError if none is left, or for a negative number.
    """
    shapes = [*((p, 0) for p in prompts), *((0, n) for n in generated), *pairs]
    works = [Workload(p, n, depth) for depth in depths for p, n in shapes if p or n]
    bad = next((n for w in works for n in (w.prompt, w.generated, w.depth) if n < 0), None)
    if bad is not None:
        raise UsageError(f"a test of {bad} tokens cannot be run.", "give 0 to leave a test out, or more.")
    if not works:
        raise UsageError("every test has 0 tokens, so there is nothing to measure.", "give -p, -n or -pg above 0.")
    return works


@dataclass(frozen=True)
class Variant:
    """A way to run the model. loop: None for the plain model."""

    loop: LoopSpec | None = None
    stock: bool = False

    def __str__(self) -> str:
        return "stock" if self.stock else loop_text(self.loop)


@dataclass(frozen=True)
class Timed:
    """The repetitions of one test under one variant. samples_ns: one duration each; time: of its end, UTC."""

    variant: Variant
    work: Workload
    samples_ns: tuple[int, ...]
    time: str

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [1e9 * self.work.tokens / ns for ns in self.samples_ns]

    @property
    def mean_ns(self) -> int:
        """Mean duration."""
        return round(statistics.fmean(self.samples_ns))

    @property
    def stdev_ns(self) -> int:
        """Their standard deviation (n - 1), 0 for one repetition."""
        return round(statistics.stdev(self.samples_ns)) if len(self.samples_ns) > 1 else 0

    @property
    def mean_ts(self) -> float:
        """Mean of the repetitions' tokens per second: not tokens over mean_ns, and llama-bench's figure."""
        return statistics.fmean(self.samples_ts)

    @property
    def stdev_ts(self) -> float:
        """Their standard deviation (n - 1), 0 for one repetition."""
        return statistics.stdev(self.samples_ts) if len(self.samples_ns) > 1 else 0.0


def ratio(result: Timed, base: Timed) -> Estimate:
    """Time of `result` over that of `base`, round by round: their median. Raises UsageError for fewer than 2 rounds."""
    return ratio_interval(result.samples_ns, base.samples_ns)


def predicted(work: Workload, loop: LoopSpec, plain_to_looped: float) -> float | None:
    """Cost of a test over plain, given that of one looped token: its decode policy may leave some tokens plain.

    None where nobody can say: decode entropy:t asks the text, and in a test of a prompt and generated tokens that
    only partly loops it depends on how much slower a generated token is.
    """
    if loop.decode_entropy() is not None and work.generated:
        return None
    limit = loop.decode_loops()
    prompt = work.prompt if work.depth == 0 or work.prompt > 1 else 0  # one token behind others is a generated one
    prompt += work.context == work.generated and work.generated > 0  # and one on an empty cache a prompt
    rest = work.tokens - prompt
    looped = prompt + (rest if limit is None else min(rest, limit))
    if work.prompt and work.generated and looped < work.tokens:
        return None
    return 1 + looped / work.tokens * (plain_to_looped - 1)


def weight_cost(path: Path, loop: LoopSpec) -> float:
    """Looped over plain weight bytes read per token, what generating costs where memory is the limit.

    Unlike the count of layers it knows that the output matrix is not looped; an embedding counts only where it is
    the output matrix too.
    """
    tensors = [t for header in read_model(path) for t in header.tensors]
    tied = not any(t.name == "output.weight" for t in tensors)
    layers = tuple(f"blk.{il}." for il in range(*loop.window))
    total = sum(t.nbytes for t in tensors if tied or not t.name.startswith("token_embd."))
    window = sum(t.nbytes for t in tensors if t.name.startswith(layers))
    return 1 + loop.extra_layer_evaluations() / loop.layers * window / total


def sample(llm: LoopedLlama, work: Workload, loop: LoopSpec | None, repetition: int, warm: bool = True) -> int:
    """One measurement: nanoseconds of the timed tokens. A repetition has the same tokens under every loop.

    warm: evaluate the prompt and one generated token first, untimed, because the first evaluation after a change
    allocates. Raises as `LoopedLlama.set_loop` and `eval`.
    """
    llm.set_loop(loop)
    tokens = np.random.default_rng((SEED, repetition)).integers(llm.n_vocab(), size=work.context).tolist()
    if 0 <= llm.token_bos() < llm.n_vocab():
        tokens[0] = llm.token_bos()
    begin, end = work.depth, work.depth + work.prompt
    if warm:
        llm.reset()
        _evaluate(llm, tokens[begin:end], tokens[end : end + 1])
    llm.reset()
    if work.depth:
        llm.eval(tokens[:begin])
        llm.synchronize()
    start = perf_counter_ns()
    _evaluate(llm, tokens[begin:end], tokens[end:])
    return perf_counter_ns() - start


def _evaluate(llm: LoopedLlama, prompt: list[int], generated: list[int]) -> None:
    """A prompt as one step and generated tokens one by one; the device is waited for after each."""
    for tokens in [prompt] * (len(prompt) > 0) + [[token] for token in generated]:
        llm.eval(tokens)
        llm.synchronize()


def order(round_: int, n: int) -> list[int]:
    """In which order a round measures n variants: random, and the same every time it is asked."""
    return random.Random(f"{SEED} {round_}").sample(range(n), n)


def compare(
    variants: Sequence[Variant], work: Workload, rounds: int, run: Callable[[Variant, Workload, int], int]
) -> list[Timed]:
    """Measure variants interleaved: every round measures each of them once, in the order of `order`.

    run(variant, work, round) makes one measurement and returns nanoseconds. Results are in the order of `variants`.
    """
    samples: list[list[int]] = [[] for _ in variants]
    for round_ in range(rounds):
        for i in order(round_, len(variants)):
            samples[i].append(run(variants[i], work, round_))
    end = now()
    return [Timed(variant, work, tuple(ns), end) for variant, ns in zip(variants, samples, strict=True)]


def now() -> str:
    """The time, as llama-bench writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Measured:
    """One measurement in a Child. kv_bytes: its K/V cache (0 for stock); peak_bytes: its process (0: not known)."""

    ns: int
    kv_bytes: int
    peak_bytes: int


class Child:
    """A process of its own that holds one library and one model, and measures when asked.

    settings: keywords of LoopedLlama. Raises what loading the model raises, as `run` what measuring does.
    """

    def __init__(self, path: Path, stock: bool, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")  # nothing of this process, its library above all
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, path, stock, settings), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive()  # it is ready
        except BaseException:
            self.close()
            raise

    def run(self, work: Workload, loop: LoopSpec | None, repetition: int, warm: bool = True) -> Measured:
        """`sample` there."""
        try:
            self._pipe.send((work, loop, repetition, warm))
        except OSError:
            raise GgufloopError(*_ENDED) from None
        answer = self._receive()
        assert isinstance(answer, Measured)
        return answer

    def _receive(self) -> Measured | None:
        try:
            answer: Measured | GgufloopError | None = self._pipe.recv()
        except (EOFError, OSError):
            raise GgufloopError(*_ENDED) from None
        if isinstance(answer, GgufloopError):
            raise answer
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _serve(pipe: Connection[Any, Any], path: Path, stock: bool, settings: dict[str, Any]) -> None:
    """The life of a Child: load, then measure until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends this process
    from ggufloop.backend import library

    try:
        library.activate(stock=stock)
        from ggufloop.engine import LoopedLlama

        llm = LoopedLlama(path, verbose=False, **settings)
    except GgufloopError as e:
        pipe.send(e)
        return
    pipe.send(None)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            ns = sample(llm, *job)
            pipe.send(Measured(ns, llm.memory_bytes(), _peak_bytes()))
        except GgufloopError as e:
            pipe.send(e)


def _peak_bytes() -> int:
    """The most memory this process ever held at once; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def backends(directory: Path, devices: Iterable[Device] = ()) -> str:
    """What llama.cpp computes on besides the CPU, as llama-bench names it: the library's devices and those given."""
    from ggufloop.backend.ggml import Ggml

    found = [*(d for d in Ggml(directory).devices() if d.kind != "CPU"), *devices]
    return ",".join(dict.fromkeys(d.name.rstrip("0123456789") for d in found)) or "CPU"
