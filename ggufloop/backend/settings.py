"""How a model is run: `ContextSettings`, and what llama.cpp would answer with an assert, refused before it sees it.

    settings = ContextSettings(n_ctx=8192, type_k="q8_0")             # raises UsageError for what no model can have
    settings.check_memory([path], [loop])                            # raises GgufloopError if it cannot fit
    llm = LoopedLlama(path, loop=loop, **settings.keywords(path))

The defaults are llama.cpp's, but for the context: 4096 tokens or what the model was trained on, whichever is less,
because a model's full context may not fit the machine.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ggufloop.backend import library, memory
from ggufloop.backend.devices import parse_servers, parse_split_mode, parse_tensor_split
from ggufloop.errors import BackendError, UsageError, nearest
from ggufloop.loop import LoopSpec
from ggufloop.models.gguf import read_header
from ggufloop.models.info import KV_TYPES

DEFAULT_CONTEXT = 4096
FLASH = ("auto", "on", "off")
_UNQUANTISED = ("f32", "f16", "bf16")

NO_FLASH_ATTENTION = ("plm",)
"""Architectures whose graph llama.cpp builds wrongly with flash attention, on any device, and then ends the process."""


@dataclass(frozen=True)
class ContextSettings:
    """Context, batches, threads, K/V types and devices of a model, by llama_cpp's names and in llama.cpp's words.

    n_ctx          tokens of context; None: 4096 or the model's, if less, 0: the model's
    n_seq          sequences the cache holds apart: questions are answered many at once
    n_batch        most prompt tokens submitted at once, n_ubatch: most computed at once
    n_threads      None: all cores
    flash_attn     auto, on or off; type_k, type_v: one of KV_TYPES
    n_gpu_layers   -1: all; rpc_servers, device, split_mode, tensor_split, main_gpu: as devices.Placement
    repack         whether quantised weights are copied in the order that this CPU's widest kernels want
    try_first      whether a file nobody has computed on is tried in a process of its own

    Raises UsageError for what no model can be run with.
    """

    n_ctx: int | None = None
    n_seq: int = 1
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int | None = None
    flash_attn: str = "auto"
    type_k: str = "f16"
    type_v: str = "f16"
    repack: bool = True
    try_first: bool = True
    n_gpu_layers: int = -1
    rpc_servers: str | None = None
    split_mode: str = "layer"
    tensor_split: str | None = None
    main_gpu: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("flash_attn", FLASH), ("type_k", KV_TYPES), ("type_v", KV_TYPES)):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"{name} {value!r} is not known.", nearest(str(value), known))
        _check_least(vars(self))
        if self.type_v not in _UNQUANTISED and self.flash_attn == "off":
            raise UsageError(
                f"a V cache of type {self.type_v} needs flash attention, and -fa is off.",
                "leave out -fa off, or use -ctv f16.",
            )
        parse_servers(self.rpc_servers)
        parse_split_mode(self.split_mode)
        parse_tensor_split(self.tensor_split)

    @property
    def threads(self) -> int:
        """Threads, all cores if nothing else was said."""
        return self.n_threads or cores()

    def context(self, path: Path) -> int:
        """Tokens of context that n_ctx means for this model file."""
        length = trained(path)
        return min(DEFAULT_CONTEXT, length) if self.n_ctx is None else self.n_ctx or length

    def uses_flash(self, path: Path) -> bool:
        """Whether this model file is computed with flash attention."""
        can = (read_header(path).text("general.architecture") or "unknown") not in NO_FLASH_ATTENTION
        return self.flash_attn == "on" or (self.flash_attn == "auto" and can)

    @property
    def kernels(self) -> dict[str, Any]:
        """What a record says of the kernels, beside the rest: nothing where they are llama.cpp's choice."""
        return {} if self.repack else {"repack": False}

    def check_memory(self, paths: Sequence[Path], loops: Iterable[LoopSpec | None] = ()) -> None:
        """Raise GgufloopError if these models, open at once, each under the hungriest of `loops`, do not fit.

        Only what runs on this machine's CPU is counted: how much other devices have, llama.cpp knows.
        """
        try:
            if self.rpc_servers or library.locate().name not in ("", "cpu"):
                return
        except BackendError:  # whoever loads the model says so
            return
        flash, loops = self.flash_attn != "off", list(loops)
        memory.check([
            memory.Need.of(path, self.context(path), self.type_k, self.type_v, flash_attn=flash, loops=loops)
            for path in paths
        ])  # fmt: skip

    def keywords(self, path: Path) -> dict[str, Any]:
        """The keywords of LoopedLlama that they mean for this model file.

        Whoever computes asks for them, so this is where a file that nobody has computed on is tried: raises
        GgufloopError.
        """
        from ggufloop.backend import trial

        if self.try_first:
            trial.check(path, self.repack)
        placed = ("n_gpu_layers", "rpc_servers", "split_mode", "tensor_split", "main_gpu", "device")
        return {
            "n_ctx": self.context(path),
            "n_seq": self.n_seq,
            "n_batch": self.n_batch,
            "n_ubatch": self.n_ubatch,
            "n_threads": self.threads,
            "n_threads_batch": self.threads,  # as llama.cpp: left out, llama_cpp takes every thread of the machine
            **{name: getattr(self, name) for name in placed},
            "flash_attn": self.uses_flash(path),
            "repack": self.repack,
            "type_k": _number(self.type_k),
            "type_v": _number(self.type_v),
        }


def trained(path: Path) -> int:
    """Tokens of context the model at `path` was trained on; 4096 where it does not say."""
    header = read_header(path)
    return header.number(f"{header.text('general.architecture')}.context_length") or DEFAULT_CONTEXT


def cores() -> int:
    """Cores this process may use, the threads of one core counted once as llama.cpp does (llama_cpp halves blindly)."""
    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
    found = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found.add(siblings.read_text() if siblings.is_file() else f"{cpu}\n")
    return len(found)


@cache
def _types() -> dict[int, str]:
    """The types of a K/V cache by ggml's number."""
    from gguf import GGMLQuantizationType  # half a second, which --help does not need

    return {GGMLQuantizationType[name.upper()].value: name for name in KV_TYPES}


def _number(name: str) -> int:
    return next(number for number, known in _types().items() if known == name)


def _check_least(settings: dict[str, Any]) -> None:
    for name, least in (("n_ctx", 0), ("n_batch", 1), ("n_ubatch", 1), ("n_threads", 1)):
        value = settings.get(name)
        if value is not None and value < least:
            raise UsageError(f"{name} {value} is less than {least}.", f"give {least} or more.")


def check_settings(settings: dict[str, Any], architecture: str) -> None:
    """Raise UsageError for keywords of llama_cpp.Llama that no model of this architecture can be run with."""
    if architecture in NO_FLASH_ATTENTION and settings.get("flash_attn", False):
        raise UsageError(f"llama.cpp cannot run {architecture} with flash attention.", "leave it off (-fa off).")
    _check_least(settings)
    for name in ("type_k", "type_v"):
        value = settings.get(name)
        if value is not None and value not in _types():
            known = ", ".join(f"{n} ({number})" for number, n in _types().items())
            raise UsageError(f"{name} {value} is not a type a K/V cache can have.", f"known: {known}.")
    quantized_v = _types().get(settings.get("type_v") or 0, "f32") not in _UNQUANTISED
    if quantized_v and not settings.get("flash_attn", False):
        raise UsageError("a quantised V cache needs flash attention.", "switch it on: flash_attn=True (-fa on).")


RANDOM_SEED = 2**32 - 1
"""llama.cpp's mark for "no seed given", so seeds are smaller than this."""


def drawn(seed: int | None) -> int:
    """The seed, or a random one in place of None, -1 and llama.cpp's mark."""
    return secrets.randbelow(RANDOM_SEED) if seed in (None, -1, RANDOM_SEED) else int(seed or 0)
