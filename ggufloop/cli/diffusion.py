"""`run` on a masked diffusion model (LLaDA, Dream, RND1), which writes all of its answer at once, step by step.

    @diffusion_options
    def command(ctx, prompt, **flags):
        asked = Asked.from_flags(ctx, flags, sampling)
        opened = open_from_flags(flags, settings, verbose, fit=asked.fit)
        if is_diffusion(opened.path):
            asked.answer(opened, text, system, raw)

Flags are named as llama-diffusion-cli's. It has four more ways to choose which tokens stay; ours is its default, the
tokens that the model is surest of, and --temp is 0 unless it is given, as the models' authors have it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ggufloop.backend.settings import ContextSettings, trained
from ggufloop.cli import terminal
from ggufloop.cli.context import Opened
from ggufloop.cli.options import adder
from ggufloop.cli.progress import shown
from ggufloop.errors import UsageError
from ggufloop.generate.complete import prompt_tokens
from ggufloop.generate.diffusion import ARCHITECTURES, Decided, Head, Schedule, denoise
from ggufloop.generate.sampling import Sampling, spelled
from ggufloop.models.gguf import read_header
from ggufloop.models.template import Message
from ggufloop.progress import Step

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

CONTEXT = 512
"""Tokens of prompt and answer if -c does not say: all of them are computed at once, and have logits at every step."""

_POSITIVE = click.IntRange(min=1)
_OWN = ("diffusion_steps", "diffusion_block_length", "diffusion_visual")
_OTHERS = ("top_k", "top_p", "min_p", "repeat_penalty", "prefill")

diffusion_options: Callable[[Any], Any] = adder([
    click.option("--diffusion-steps", type=_POSITIVE, metavar="N",
                 help="Evaluations, at most -n, which is 64 here if not given (default: half of -n)."),
    click.option("--diffusion-block-length", type=_POSITIVE, metavar="N",
                 help="Fill the answer in blocks of N tokens from the left (default: all at once)."),
    click.option("--diffusion-visual", is_flag=True, help="Show the answer after every step, a dot for each mask."),
])  # fmt: skip


def architecture(path: Path) -> str:
    """The architecture that a model file names."""
    return read_header(path).text("general.architecture") or "unknown"


def is_diffusion(path: Path) -> bool:
    """Whether the model in this file writes by diffusion."""
    return architecture(path) in ARCHITECTURES


def refuse_diffusion(path: Path) -> None:
    """Raise UsageError for a model that can only write one whole answer."""
    if is_diffusion(path):
        raise UsageError(
            f"{path.name} is a diffusion model ({architecture(path)}): it writes one whole answer to one prompt.",
            'use: ggufloop run MODEL -p "..."',
        )


def chatting(path: Path, settings: ContextSettings) -> ContextSettings:
    """The settings of a model to chat with. Raises UsageError as `refuse_diffusion`."""
    refuse_diffusion(path)
    return settings


@dataclass(frozen=True)
class Asked:
    """What the flags ask of a diffusion model. given: parameters that the user gave a value of his own."""

    steps: int | None
    block: int | None
    visual: bool
    sampling: Sampling
    given: frozenset[str]

    @classmethod
    def from_flags(cls, ctx: click.Context, flags: dict[str, Any], sampling: Sampling) -> Asked:
        """Take the flags of `diffusion_options` out of `flags`."""
        given = {name for name in ctx.params if ctx.get_parameter_source(name) != ParameterSource.DEFAULT}
        steps, block, visual = (flags.pop(name) for name in _OWN)
        return cls(steps, block, visual, sampling, frozenset(given))

    def fit(self, path: Path, settings: ContextSettings) -> ContextSettings:
        """The settings for this model, which for one that writes by diffusion hold all of a text in one batch.

        Raises UsageError for flags that are for models of the other kind, and as `schedule`.
        """
        diffusion = is_diffusion(path)
        wrong = [name for name in (_OTHERS if diffusion else _OWN) if name in self.given]
        if wrong:
            kind = "a diffusion model" if diffusion else "no diffusion model"
            raise UsageError(f"--{spelled(wrong[0])} is not for {path.name}, which is {kind}.", "leave it out.")
        if not diffusion:
            return settings
        self.schedule()
        n = min(CONTEXT, trained(path)) if settings.n_ctx is None else settings.context(path)
        batch = -(-n // 256) * 256  # as far as llama.cpp rounds the context up
        return replace(settings, n_ctx=n, n_batch=batch, n_ubatch=batch)

    def schedule(self) -> Schedule:
        """How the answer is made. Raises UsageError."""
        n = Schedule.n if self.sampling.n == -1 else self.sampling.n
        block = self.block or n
        steps = self.steps or max(1, block // 2) * max(1, n // block)
        temp = self.sampling.temp if "temp" in self.given else 0.0
        return Schedule(n, steps, self.block, temp, self.sampling.seed)

    def answer(self, opened: Opened, text: str, system: str | None, raw: bool) -> None:
        """Write the answer to stdout, and how it came about to stderr. Raises UsageError."""
        llm = opened.llm
        head, schedule = Head.of(llm), self.schedule()
        template = None if raw else opened.template
        if template is not None:
            told: list[Message] = [] if system is None else [{"role": "system", "content": system}]
            text = template.render([*told, {"role": "user", "content": text}])
        elif not raw:
            terminal.note_no_template({"-sys": system})
        prompt = prompt_tokens(llm, text)
        began = time.monotonic()
        with shown() as progress:

            def on_step(step: Decided, answer: Sequence[int]) -> None:
                if self.visual:
                    progress(Step(f"{step.number:3} {readable(llm, answer, head.mask)!r}"))
                else:
                    progress(Step("writing", step.number, schedule.steps, "step"))

            answer = denoise(llm, head, prompt, schedule, on_step)
        terminal.say(readable(llm, answer.tokens, head.mask))
        speed = schedule.n / (time.monotonic() - began)
        loop = terminal.describe(llm.loop)
        terminal.dim(f"[ {schedule.n} tokens in {len(answer.steps)} evaluations, {speed:.1f} t/s | {loop} ]")


def readable(llm: LoopedLlama, tokens: Sequence[int], mask: int) -> str:
    """The answer up to its end, masks as dots."""
    pieces = []
    for token in tokens:
        if llm.is_eog(token):
            break
        pieces.append(b"." if token == mask else llm.detokenize([token]))
    return b"".join(pieces).decode("utf-8", "replace")
