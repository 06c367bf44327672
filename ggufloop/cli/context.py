"""Options of the commands that run a model: the context it runs in, and how tokens are drawn.

    @model_options
    @loop_options
    @sampling_options
    @context_options
    def command(..., **flags):
        sampling = sampling_from_flags(flags)
        opened = open_from_flags(flags, context_from_flags(flags), verbose)

Spelled, and defaulted, as llama.cpp does; backend/settings.py says what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggufloop.backend.devices import SPLIT_MODES
from ggufloop.backend.settings import DEFAULT_CONTEXT, FLASH, ContextSettings
from ggufloop.cli import terminal
from ggufloop.cli.loop_options import LOOP_FLAGS, Suggest, loop_from_flags, loop_suggestion
from ggufloop.cli.options import MODEL_FLAGS, adder, model_from_flags, template_from_flags
from ggufloop.cli.progress import shown
from ggufloop.cli.types import OneOf
from ggufloop.generate.sampling import Sampling
from ggufloop.loop import LoopSpec
from ggufloop.models.info import KV_TYPES
from ggufloop.models.template import ChatTemplate
from ggufloop.opening import check_loops, open_model

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

_POSITIVE = click.IntRange(min=1)
_CACHE_TYPE = OneOf(KV_TYPES)

_CONTEXT = [
    click.option("-c", "--ctx-size", "n_ctx", type=click.IntRange(min=0), metavar="N",
                 help=f"Tokens of context (default {DEFAULT_CONTEXT} or the model's, if less; 0: the model's)."),
    click.option("-b", "--batch-size", "n_batch", type=_POSITIVE, metavar="N", default=2048, show_default=True,
                 help="Most prompt tokens submitted at once."),
    click.option("-ub", "--ubatch-size", "n_ubatch", type=_POSITIVE, metavar="N", default=512, show_default=True,
                 help="Most tokens computed at once."),
    click.option("-t", "--threads", "n_threads", type=_POSITIVE, metavar="N", help="Threads (default: all cores)."),
    click.option("-ngl", "--gpu-layers", "n_gpu_layers", type=click.IntRange(min=-1), metavar="N", default=-1,
                 show_default=True, help="Layers on GPUs and other machines; -1: all."),
    click.option("--rpc", "rpc_servers", metavar="HOST:PORT,...",
                 help="Machines that run `ggufloop rpc-server`, to share the layers with."),
    click.option("-sm", "--split-mode", "split_mode", type=OneOf(SPLIT_MODES), metavar="|".join(SPLIT_MODES),
                 default="layer", show_default=True, help="How several devices share a model."),
    click.option("-ts", "--tensor-split", "tensor_split", metavar="N,N,...",
                 help="Share of each device, such as 3,1 (default: by free memory)."),
    click.option("-mg", "--main-gpu", "main_gpu", type=int, metavar="N", default=0, show_default=True,
                 help="The one device of -sm none."),
    click.option("-dev", "--device", "device", metavar="NAME,...",
                 help="Devices to use, such as RPC0,CUDA0; none: only the CPU (default: all)."),
    click.option("-fa", "--flash-attn", "flash_attn", type=OneOf(FLASH), metavar="on|off|auto",
                 default="auto", show_default=True, help="Flash attention; auto is on where llama.cpp can."),
    click.option("-ctk", "--cache-type-k", "type_k", type=_CACHE_TYPE, metavar="TYPE", default="f16",
                 show_default=True, help=f"Type of the K cache: {', '.join(KV_TYPES)}."),
    click.option("-ctv", "--cache-type-v", "type_v", type=_CACHE_TYPE, metavar="TYPE", default="f16",
                 show_default=True, help="Type of the V cache; the same types."),
    click.option("--repack/--no-repack", " /-nr", "repack", default=True,
                 help="Copy quantised weights in the order of this CPU's widest kernels (default: on). Off, a prompt "
                      "may be read faster on a CPU without AMX, and an answer written slower: `bench` tells."),
    click.option("--no-try", "no_try", is_flag=True,
                 help="Do not try a file that was never computed on in a process of its own first."),
]  # fmt: skip

_SAMPLING = [
    click.option("-n", "--predict", "n", type=int, metavar="N", default=-1, show_default=True,
                 help="Most tokens of an answer; -1: until the model ends it or the context is full."),
    click.option("-s", "--seed", type=int, metavar="N", default=-1, show_default=True,
                 help="The same seed gives the same text; -1: a random one."),
    click.option("--temp", type=float, metavar="X", default=Sampling.temp, show_default=True,
                 help="Temperature; 0 always takes the likeliest token."),
    click.option("--top-k", type=int, metavar="N", default=Sampling.top_k, show_default=True,
                 help="Draw from the N likeliest tokens; 0: from all."),
    click.option("--top-p", type=float, metavar="X", default=Sampling.top_p, show_default=True,
                 help="Draw from the likeliest tokens that together have probability X."),
    click.option("--min-p", type=float, metavar="X", default=Sampling.min_p, show_default=True,
                 help="Draw from tokens at least X times as likely as the likeliest."),
    click.option("--repeat-penalty", type=float, metavar="X", default=Sampling.repeat_penalty, show_default=True,
                 help="Divide the logits of recent tokens by X; 1: off."),
]  # fmt: skip


context_options: Callable[[Any], Any] = adder(_CONTEXT)
batch_options: Callable[[Any], Any] = adder(_CONTEXT[1:])  # for a command with a -c of its own
sampling_options: Callable[[Any], Any] = adder(_SAMPLING)


def sampling_from_flags(flags: dict[str, Any]) -> Sampling:
    """The Sampling of `sampling_options`, its seed drawn; takes its flags out of `flags`. Raises UsageError."""
    return Sampling(**{name: flags.pop(name) for name in Sampling.__dataclass_fields__}).seeded()


def context_from_flags(flags: dict[str, Any], **own: Any) -> ContextSettings:
    """The settings of `context_options` or `batch_options`; takes their flags out of `flags`. Raises UsageError.

    own: fields the command knows better, such as n_ctx where its -c means something else.
    """
    found = {name: flags.pop(name) for name in ContextSettings.__dataclass_fields__ if name in flags}
    return ContextSettings(**found | {"try_first": not flags.pop("no_try")} | own)


def resolve_model(flags: dict[str, Any]) -> Path:
    """The model file of `model_options`, downloaded if need be; takes their flags out of `flags`."""
    return model_from_flags(*(flags.pop(name) for name in MODEL_FLAGS))


@dataclass(frozen=True)
class Opened:
    """A loaded model, its file, what `auto` means as its window, and what its chat template is rendered with."""

    llm: LoopedLlama
    path: Path
    suggest: Suggest
    arguments: Mapping[str, Any]

    @property
    def template(self) -> ChatTemplate | None:
        """Its chat template, None if it has none. Raises GgufloopError for one that cannot be read."""
        found = ChatTemplate.of(self.llm)
        return found and found.having(self.arguments)


def model_and_loop(flags: dict[str, Any]) -> tuple[Path, LoopSpec | None, Suggest]:
    """The model file, the loop on it, and what `auto` means, of `model_options` and `loop_options`.

    What can be refused without the model is refused before it is downloaded. Raises UsageError, GgufloopError.
    """
    find = cache(lambda: resolve_model(flags))
    suggest = cache(lambda *asked: loop_suggestion(find())(*asked))
    loop = loop_from_flags(
        flags.pop("window", None), suggest, **{name: flags.pop(name) for name in LOOP_FLAGS if name in flags}
    )
    path = find()
    check_loops(path, [loop])
    terminal.note_horizon(loop)
    return path, loop, suggest


def open_from_flags(
    flags: dict[str, Any],
    settings: ContextSettings,
    verbose: bool,
    fit: Callable[[Path, ContextSettings], ContextSettings] = lambda path, settings: settings,
) -> Opened:
    """Load the model that the flags of `model_options`, `loop_options` and `template_options` describe.

    fit: what becomes of the settings for this file; it may refuse it. Raises UsageError, GgufloopError, BackendError.
    """
    path, loop, suggest = model_and_loop(flags)
    arguments = template_from_flags(flags, path)
    settings = fit(path, settings)
    settings.check_memory([path], [loop])
    with shown() as progress:
        llm = open_model(path, settings, loop, verbose=verbose, progress=progress)
    return Opened(llm, path, suggest, arguments)
