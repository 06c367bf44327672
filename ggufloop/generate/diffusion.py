"""Text from masked diffusion models (LLaDA, Dream), whose layers see the whole text at once: a minimal sampler.

    head = Head.of(llm)                                            # its mask token, and whether its logits are shifted
    answer = denoise(llm, head, prompt, Schedule(n=64, steps=32))
    llm.detokenize(list(answer.tokens))

The answer starts as n masks. Each step evaluates prompt and answer as one batch, draws a token for every mask, and
keeps those it is most confident of, confidence being the token's probability; the others stay masked and are drawn
anew (arXiv 2502.09992, low-confidence remasking). With `block`, the answer is filled block by block from the left.
Nothing is cached, so a step costs a prompt of that length; a loop runs in each of them as in any prompt.

A token kept is never changed. What is still masked is known by position, so a prompt may hold mask tokens, and the
mask itself is never drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ggufloop.errors import UsageError

ARCHITECTURES = ("dream", "llada", "llada-moe", "rnd1")
"""Those of masked diffusion models, by llama.cpp's names."""


class Denoiser(Protocol):
    """What is used of `engine.LoopedLlama`."""

    def n_ctx(self) -> int: ...
    def reset(self) -> None: ...
    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]: ...


class _WithMetadata(Protocol):
    @property
    def metadata(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Head:
    """What a model's logits mean. mask: the token of unknown text.

    shifted: row i is about token i + 1, as in models made from causal ones (Dream), not about token i (LLaDA).
    """

    mask: int
    shifted: bool

    @classmethod
    def of(cls, model: _WithMetadata) -> Head:
        """As the GGUF says; without `diffusion.shift_logits` they are shifted, which is llama.cpp's rule.

        Raises UsageError for a model without a mask token.
        """
        mask = model.metadata.get("tokenizer.ggml.mask_token_id")
        if mask is None:
            raise UsageError(
                "this model has no mask token: it is no masked diffusion model.",
                "get a file that names it, or convert the model again.",
            )
        return cls(int(mask), model.metadata.get("diffusion.shift_logits", "true") == "true")


@dataclass(frozen=True)
class Schedule:
    """How an answer is made.

    n      its tokens, all of them written; a shorter text ends in an end-of-text token.
    steps  evaluations, at most n; fewer keep several tokens per step.
    block  fill the answer in blocks of so many tokens; None: all at once. Divides n; the blocks share the steps evenly.
    temp   temperature of the draws; 0 takes the likeliest token.
    seed   of the draws; not used at temperature 0.

    Raises UsageError naming the value and the rule.
    """

    n: int = 64
    steps: int = 32
    block: int | None = None
    temp: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"n {self.n} is less than 1.", "give the answer 1 token or more.")
        if not 1 <= self.steps <= self.n:
            raise UsageError(
                f"steps {self.steps} is not in the range 1 to {self.n}, the tokens of the answer.",
                "each step keeps one token or more.",
            )
        if not (np.isfinite(self.temp) and self.temp >= 0):
            raise UsageError(f"temp {self.temp} is not a number of 0 or more.", "0 always takes the likeliest token.")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative.", "give 0 or more.")
        if self.block is None:
            return
        if self.block < 1 or self.n % self.block:
            raise UsageError(f"block {self.block} does not divide n {self.n}.", "all blocks are of one length.")
        if self.steps % (self.n // self.block):
            raise UsageError(
                f"steps {self.steps} cannot be shared by {self.n // self.block} blocks.",
                f"give a multiple of {self.n // self.block}.",
            )

    def counts(self) -> list[list[int]]:
        """How many tokens each step keeps, block by block; the first steps of a block take what does not divide."""
        block = self.block or self.n
        steps = self.steps * block // self.n
        return [[block // steps + (i < block % steps) for i in range(steps)] for _ in range(self.n // block)]


@dataclass(frozen=True)
class Decided:
    """What one evaluation decided. kept: positions in the answer, most confident first, with their tokens."""

    number: int
    kept: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Denoised:
    """A finished answer: its n tokens, and how it came about, a step per evaluation."""

    tokens: tuple[int, ...]
    steps: tuple[Decided, ...]


def denoise(
    model: Denoiser,
    head: Head,
    prompt: Sequence[int],
    schedule: Schedule,
    on_step: Callable[[Decided, Sequence[int]], object] = lambda step, answer: None,
) -> Denoised:
    """Write an answer after `prompt`. on_step: called after every evaluation with the answer as it is then.

    Raises UsageError for a prompt that does not fit, or that is empty where the first token needs a row before it.
    """
    if head.shifted and not prompt:
        raise UsageError("the prompt is empty.", "the first token is read from the one before it: give one at least.")
    if len(prompt) + schedule.n > model.n_ctx():
        raise UsageError(
            f"the prompt has {len(prompt)} tokens and the answer {schedule.n}; the context holds {model.n_ctx()}.",
            "give a larger context with -c, or a shorter answer with -n.",
        )
    rng = np.random.default_rng(schedule.seed)
    start = len(prompt)
    text = [*prompt, *[head.mask] * schedule.n]
    masked = np.ones(schedule.n, dtype=bool)
    steps: list[Decided] = []
    for block, counts in enumerate(schedule.counts()):
        width = sum(counts)
        for count in counts:
            open_ = block * width + np.flatnonzero(masked[block * width : (block + 1) * width])
            model.reset()
            rows = model.logits(text)[start + open_ - head.shifted].astype(np.float64)
            tokens, confidence = _draw(rows, head.mask, schedule.temp, rng)
            best = np.argsort(-confidence, kind="stable")[:count]
            kept = tuple((int(open_[i]), int(tokens[i])) for i in best)
            for position, token in kept:
                text[start + position] = token
                masked[position] = False
            steps.append(Decided(len(steps) + 1, kept))
            on_step(steps[-1], text[start:])
    return Denoised(tuple(text[start:]), tuple(steps))


def _draw(
    rows: NDArray[np.float64], mask: int, temp: float, rng: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """A token for each row of logits, and the probability the model gives it at temperature 1.

    The largest of logit + temp * Gumbel noise is a draw from the softmax of logits / temp.
    """
    rows[:, mask] = -np.inf
    noisy = rows + temp * rng.gumbel(size=rows.shape) if temp else rows
    tokens = noisy.argmax(axis=-1)
    rows = rows - rows.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(rows, tokens[:, None], axis=-1)[:, 0]
    return tokens, np.exp(chosen) / np.exp(rows).sum(axis=-1)
