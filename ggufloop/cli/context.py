"""Options of the commands that generate text: the context a model runs in, and how tokens are drawn.

    @model_options
    @loop_options
    @sampling_options
    @context_options
    def command(..., **flags):
        sampling = sampling_from_flags(flags)
        opened = open_from_flags(flags, verbose)

Spelled, and defaulted, as llama.cpp does, but for the context: 4096 tokens or what the model was trained on,
whichever is less, because a model's full context may not fit the machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ggufloop.backend.devices import SPLIT_MODES, parse_servers, parse_tensor_split
from ggufloop.cli import terminal
from ggufloop.cli.loop_options import LOOP_FLAGS, Suggest, loop_from_flags, loop_suggestion
from ggufloop.cli.options import MODEL_FLAGS, model_from_flags
from ggufloop.errors import BackendError, UsageError, nearest
from ggufloop.generate.sampling import Sampling
from ggufloop.loop import LoopSpec

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

C = TypeVar("C", bound=Callable[..., Any])

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_UNQUANTISED = ("f32", "f16", "bf16")
FLASH = ("auto", "on", "off")
DEFAULT_CONTEXT = 4096


class _OneOf(click.ParamType[str]):
    """One of a few words; a wrong one is answered with the nearest."""

    name = "word"

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.known:
            self.fail(f"{value!r} is not known; {nearest(value, self.known)}", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in self.known if word.startswith(incomplete)]


_POSITIVE = click.IntRange(min=1)
_CACHE_TYPE = _OneOf(CACHE_TYPES)

_CONTEXT = [
    click.option("-c", "--ctx-size", "ctx_size", type=click.IntRange(min=0), metavar="N",
                 help=f"Tokens of context (default {DEFAULT_CONTEXT} or the model's, if less; 0: the model's)."),
    click.option("-b", "--batch-size", "batch_size", type=_POSITIVE, metavar="N", default=2048, show_default=True,
                 help="Most prompt tokens submitted at once."),
    click.option("-ub", "--ubatch-size", "ubatch_size", type=_POSITIVE, metavar="N", default=512, show_default=True,
                 help="Most tokens computed at once."),
    click.option("-t", "--threads", "threads", type=_POSITIVE, metavar="N", help="Threads (default: all cores)."),
    click.option("-ngl", "--gpu-layers", "gpu_layers", type=click.IntRange(min=-1), metavar="N", default=-1,
                 show_default=True, help="Layers on GPUs and other machines; -1: all."),
    click.option("--rpc", "rpc_servers", metavar="HOST:PORT,...",
                 help="Machines that run `ggufloop rpc-server`, to share the layers with."),
    click.option("-sm", "--split-mode", "split_mode", type=_OneOf(SPLIT_MODES), metavar="|".join(SPLIT_MODES),
                 default="layer", show_default=True, help="How several devices share a model."),
    click.option("-ts", "--tensor-split", "tensor_split", metavar="N,N,...",
                 help="Share of each device, such as 3,1 (default: by free memory)."),
    click.option("-mg", "--main-gpu", "main_gpu", type=int, metavar="N", default=0, show_default=True,
                 help="The one device of -sm none."),
    click.option("-dev", "--device", "device", metavar="NAME,...",
                 help="Devices to use, such as RPC0,CUDA0; none: only the CPU (default: all)."),
    click.option("-fa", "--flash-attn", "flash_attn", type=_OneOf(FLASH), metavar="on|off|auto",
                 default="auto", show_default=True, help="Flash attention; auto is on where llama.cpp can."),
    click.option("-ctk", "--cache-type-k", "type_k", type=_CACHE_TYPE, metavar="TYPE", default="f16",
                 show_default=True, help=f"Type of the K cache: {', '.join(CACHE_TYPES)}."),
    click.option("-ctv", "--cache-type-v", "type_v", type=_CACHE_TYPE, metavar="TYPE", default="f16",
                 show_default=True, help="Type of the V cache; the same types."),
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


def _adder(options: list[Callable[[Any], Any]]) -> Callable[[C], C]:
    def add(command: C) -> C:
        for option in reversed(options):
            command = option(command)
        return command

    return add


context_options: Callable[[Any], Any] = _adder(_CONTEXT)
batch_options: Callable[[Any], Any] = _adder(_CONTEXT[1:])  # for a command with a -c of its own
sampling_options: Callable[[Any], Any] = _adder(_SAMPLING)


def sampling_from_flags(flags: dict[str, Any]) -> Sampling:
    """The Sampling of `sampling_options`, its seed drawn; takes its flags out of `flags`. Raises UsageError."""
    return Sampling(**{name: flags.pop(name) for name in Sampling.__dataclass_fields__}).seeded()


def check_context(flags: dict[str, Any]) -> None:
    """Raise UsageError for context flags that no model can be run with."""
    if flags["type_v"] not in _UNQUANTISED and flags["flash_attn"] == "off":
        raise UsageError(
            f"a V cache of type {flags['type_v']} needs flash attention, and -fa is off.",
            "leave out -fa off, or use -ctv f16.",
        )
    parse_servers(flags["rpc_servers"])
    parse_tensor_split(flags["tensor_split"])


@dataclass(frozen=True)
class Opened:
    """A loaded model, its file, and what `auto` means as its window."""

    llm: LoopedLlama
    path: Path
    suggest: Suggest


def open_from_flags(flags: dict[str, Any], verbose: bool) -> Opened:
    """Load the model that the flags of `model_options`, `loop_options` and `context_options` describe.

    What can be refused without the model is refused before it is downloaded. Raises UsageError, GgufloopError,
    BackendError.
    """
    check_context(flags)
    find = cache(lambda: model_from_flags(*(flags.pop(name) for name in MODEL_FLAGS)))
    suggest = cache(lambda: loop_suggestion(find())())
    loop = loop_from_flags(
        flags.pop("window", None),
        suggest,
        **{name: flags.pop(name) for name in LOOP_FLAGS if name in flags},
    )
    path = find()
    check_loops(path, [] if loop is None else [loop])
    check_memory([path], flags, [loop])
    terminal.note_horizon(loop)
    with terminal.progress(f"loading {path.name} ..."):
        llm = _open(path, loop, flags, verbose)
    if llm.devices:
        terminal.note(f"layers go to {', '.join(f'{d.name} ({d.description})' for d in llm.devices)}.")
    return Opened(llm, path, suggest)


def reopened(opened: Opened, flags: dict[str, Any], verbose: bool) -> Opened:
    """The same model and loop in the context these flags of `context_options` say; the old one is closed."""
    loop = opened.llm.loop
    opened.llm.close()
    with terminal.progress(f"loading {opened.path.name} ..."):
        return replace(opened, llm=_open(opened.path, loop, flags, verbose))


def check_memory(paths: Sequence[Path], flags: dict[str, Any], loops: Iterable[LoopSpec | None] = ()) -> None:
    """Raise GgufloopError if these models, open at once, each under the hungriest of `loops`, cannot fit the memory.

    Only what runs on this machine's CPU is counted: how much other devices have, llama.cpp knows.
    """
    from ggufloop.backend import library, memory

    try:
        if flags["rpc_servers"] or library.locate().name not in ("", "cpu"):
            return
    except BackendError:  # whoever loads the model says so
        return
    flash = flags["flash_attn"] != "off"
    loops = list(loops)
    memory.check([
        memory.Need.of(path, context_size(path, flags), flags["type_k"], flags["type_v"], flash_attn=flash, loops=loops)
        for path in paths
    ])  # fmt: skip


def context_size(path: Path, flags: dict[str, Any]) -> int:
    """Tokens of context that -c means for this model file."""
    from ggufloop.models.gguf import read_header

    header = read_header(path)
    trained = header.number(f"{header.text('general.architecture')}.context_length") or DEFAULT_CONTEXT
    asked: int | None = flags["ctx_size"]
    return min(DEFAULT_CONTEXT, trained) if asked is None else asked or trained


def cores() -> int:
    """Cores this process may use, the threads of one core counted once as llama.cpp does (llama_cpp halves blindly)."""
    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else f"{cpu}\n")
    return len(cores)


def check_loops(path: Path, loops: Iterable[LoopSpec]) -> None:
    """Raise UsageError for a loop that this model file cannot run; the engine checks too, but after it has loaded."""
    from ggufloop.models.architectures import check_loop
    from ggufloop.models.gguf import read_header
    from ggufloop.models.info import layer_count

    header = read_header(path)
    architecture = header.text("general.architecture") or "unknown"
    for loop in loops:
        check_loop(architecture, loop, layer_count(header, architecture), header.metadata)


def engine_settings(path: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """The keywords of LoopedLlama that the flags of `context_options` mean for this model file.

    Every command that computes asks for them, so this is where a file that nobody has computed on is tried: raises
    GgufloopError.
    """
    import gguf

    from ggufloop.backend import trial
    from ggufloop.backend.settings import NO_FLASH_ATTENTION
    from ggufloop.models.gguf import read_header

    if not flags["no_try"]:
        trial.check(path)
    header = read_header(path)
    architecture = header.text("general.architecture") or "unknown"
    can_flash = architecture not in NO_FLASH_ATTENTION
    trained = header.number(f"{architecture}.context_length") or DEFAULT_CONTEXT
    n_ctx = context_size(path, flags)
    if n_ctx > trained:
        terminal.note(f"a context of {n_ctx} tokens is more than the {trained} this model was trained on.")
    threads = flags["threads"] or cores()
    return {
        "n_ctx": n_ctx,
        "n_seq": flags.get("n_seq", 1),  # what answers questions needs many
        "n_batch": flags["batch_size"],
        "n_ubatch": flags["ubatch_size"],
        "n_threads": threads,
        "n_threads_batch": threads,  # as llama.cpp: left out, llama_cpp takes every thread of the machine for prompts
        "n_gpu_layers": flags["gpu_layers"],
        **{name: flags[name] for name in ("rpc_servers", "split_mode", "tensor_split", "main_gpu", "device")},
        "flash_attn": flags["flash_attn"] == "on" or (flags["flash_attn"] == "auto" and can_flash),
        "type_k": gguf.GGMLQuantizationType[flags["type_k"].upper()].value,
        "type_v": gguf.GGMLQuantizationType[flags["type_v"].upper()].value,
    }


def _open(path: Path, loop: LoopSpec | None, flags: dict[str, Any], verbose: bool) -> LoopedLlama:
    from ggufloop.engine import LoopedLlama

    return LoopedLlama(path, loop=loop, verbose=verbose, **engine_settings(path, flags))
