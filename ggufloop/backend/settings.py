"""Settings of a context that llama.cpp would answer with an assert or a crash, refused before it sees them.

check_settings({"n_ctx": 4096, "type_v": 8}, "llama")  # raises UsageError: a quantised V cache needs flash attention
"""

from __future__ import annotations

import secrets
from typing import Any

from gguf import GGMLQuantizationType

from ggufloop.errors import UsageError
from ggufloop.models.info import KV_TYPES

_KV_TYPES = {GGMLQuantizationType[name.upper()].value: name for name in KV_TYPES}


NO_FLASH_ATTENTION = ("plm",)
"""Architectures whose graph llama.cpp builds wrongly with flash attention, on any device, and then ends the process."""


def check_settings(settings: dict[str, Any], architecture: str) -> None:
    """Raise UsageError for keywords of llama_cpp.Llama that no model of this architecture can be run with."""
    if architecture in NO_FLASH_ATTENTION and settings.get("flash_attn", False):
        raise UsageError(f"llama.cpp cannot run {architecture} with flash attention.", "leave it off (-fa off).")
    for name, least in (("n_ctx", 0), ("n_batch", 1), ("n_ubatch", 1)):
        value = settings.get(name, least)
        if value < least:
            raise UsageError(f"{name} {value} is less than {least}.", f"give {least} or more.")
    for name in ("type_k", "type_v"):
        value = settings.get(name)
        if value is not None and value not in _KV_TYPES:
            known = ", ".join(f"{n} ({number})" for number, n in _KV_TYPES.items())
            raise UsageError(f"{name} {value} is not a type a K/V cache can have.", f"known: {known}.")
    quantized_v = _KV_TYPES.get(settings.get("type_v") or 0, "f32") not in ("f32", "f16", "bf16")
    if quantized_v and not settings.get("flash_attn", False):
        raise UsageError("a quantised V cache needs flash attention.", "switch it on: flash_attn=True (-fa on).")


RANDOM_SEED = 2**32 - 1
"""llama.cpp's mark for "no seed given", so seeds are smaller than this."""


def drawn(seed: int | None) -> int:
    """The seed, or a random one in place of None, -1 and llama.cpp's mark."""
    return secrets.randbelow(RANDOM_SEED) if seed in (None, -1, RANDOM_SEED) else int(seed or 0)
