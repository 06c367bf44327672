"""Answer a prompt with a masked diffusion model (LLaDA, Dream), looped or not: the loop in a graph without a cache.

    python3 scripts/bootstrap.py python scripts/diffusion_example.py llada-8b-instruct.gguf -p "Why is the sky blue?"
        [--window 14:18 --K 3] [-n 64] [--steps 32] [--block 32] [--temp 0] [-s 0] [-v]

The answer goes to stdout. -v shows it on stderr after every step, a dot for each mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ggufloop.cli import terminal
from ggufloop.cli.loop_options import loop_from_flags, loop_options, window_suggestion
from ggufloop.cli.options import model_from_flags, model_options
from ggufloop.errors import GgufloopError
from ggufloop.generate import complete
from ggufloop.generate.diffusion import Decided, Head, Schedule, denoise
from ggufloop.models.template import ChatTemplate

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama


def prompt_tokens(llm: LoopedLlama, text: str, raw: bool) -> list[int]:
    """The prompt in the model's chat template, if it has one and `raw` does not forbid it."""
    template = None if raw else ChatTemplate.of(llm)
    if template is not None:
        text = template.render([{"role": "user", "content": text}])
    return complete.prompt_tokens(llm, text)


def shown(llm: LoopedLlama, tokens: Sequence[int], mask: int) -> str:
    """The answer up to its end, masks as dots."""
    pieces = []
    for token in tokens:
        if llm.is_eog(token):
            break
        pieces.append(b"." if token == mask else llm.detokenize([token]))
    return b"".join(pieces).decode("utf-8", "replace")


@click.command()
@model_options
@click.option("-p", "--prompt", required=True, help="What to answer.")
@click.option("--raw", is_flag=True, help="Continue the prompt as text: no chat template.")
@loop_options
@click.option("-n", "n", type=int, default=64, show_default=True, help="Tokens of the answer.")
@click.option("--steps", type=int, default=32, show_default=True, help="Evaluations.")
@click.option("--block", type=int, help="Fill the answer in blocks of so many tokens.")
@click.option("--temp", type=float, default=0.0, show_default=True, help="Temperature; 0 takes the likeliest token.")
@click.option("-s", "--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("-c", "n_ctx", type=int, default=512, show_default=True, help="Most tokens of prompt and answer.")
@click.option("-t", "threads", type=int, help="Threads (default: llama.cpp's).")
@click.option("-v", "verbose", is_flag=True, help="Show every step.")
def main(
    model: str | None,
    model_path: str | None,
    hf: str | None,
    hf_file: str | None,
    offline: bool,
    prompt: str,
    raw: bool,
    window: str | None,
    n: int,
    steps: int,
    block: int | None,
    temp: float,
    seed: int,
    n_ctx: int,
    threads: int | None,
    verbose: bool,
    **loop: Any,
) -> None:
    """Write an answer to PROMPT by unmasking it step by step."""
    try:
        schedule = Schedule(n, steps, block, temp, seed)
        path = model_from_flags(model, model_path, hf, offline, hf_file)
        spec = loop_from_flags(window, window_suggestion(path), **loop)
        from ggufloop.engine import LoopedLlama  # it looks for the library, which may not be built

        llm = LoopedLlama(path, n_ctx=n_ctx, n_batch=n_ctx, n_ubatch=n_ctx, n_threads=threads, loop=spec, verbose=False)
        head = Head.of(llm)

        def on_step(step: Decided, answer: Sequence[int]) -> None:
            if verbose:
                click.echo(f"{step.number:3} {shown(llm, answer, head.mask)!r}", err=True)

        answer = denoise(llm, head, prompt_tokens(llm, prompt, raw), schedule, on_step)
        click.echo(shown(llm, answer.tokens, head.mask))
        terminal.dim(f"[ {len(answer.steps)} evaluations | {terminal.describe(spec)} ]")
    except GgufloopError as e:
        raise click.ClickException(f"{e.message} {e.hint}") from None


if __name__ == "__main__":
    main()
