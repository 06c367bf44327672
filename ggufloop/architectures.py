"""Which architectures can loop a window, by the name a GGUF file gives as `general.architecture`, and which windows.

    check_architecture("qwen3")                    # returns, or raises GgufloopError with the reason
    check_window("gemma4", (20, 24), 35, header.metadata)

An architecture is allowed once the architecture matrix (tests/matrix.py) has run tiny models of it: loop off equal to
the stock library, an undamped loop equal to the file with the window repeated, damped loops independent of how a text
is cut into batches. A graph may look loopable and still be wrong without any error, so everything else is refused by
name. docs/architectures.md is the matrix's table.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec

_LOOPS = """
    afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bitnet bloom chatglm codeshell
    cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr deepseek32 dots1 dots3note dream
    ernie4_5 ernie4_5-moe exaone exaone-moe exaone4 falcon falcon-h1 gemma gemma2 gemma3 gemma3n gemma4 glm-dsa glm4
    glm4moe gpt-oss gpt2 gptneox granite granite_swa granitehybrid granitemoe graniteswitch grok grovemoe
    hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais jais2 jamba kimi-k3 kimi-linear laguna lfm2 lfm2moe
    llada llada-moe llama llama4 maincoder mamba mamba2 maple mellum mimo2 minicpm minicpm3 minimax-01 minimax-m2
    minimax-m3 mistral3 mistral4 mpt muse-glimmer nanbeige nemotron nemotron_h nemotron_h_moe olmo olmo2 olmoe
    openelm orion paddleocr pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 plm pockettts qwen qwen2 qwen2moe
    qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3next qwen3tts qwen3vl qwen3vlmoe refact rnd1 rwkv6 rwkv6qwen2 rwkv7
    seed_oss smallthinker smollm3 spark2_5 stablelm starcoder starcoder2 step35 talkie xverse
"""
LOOPS = tuple(_LOOPS.split())
"""Green in the architecture matrix."""

_REFUSED = {
    "its compressed cache is read and rewritten by every pass": "deepseek4",
    "its graph gives no hold at the end of a layer": "hy_v4",
    "it is a draft model without a stack of its own": "dflash eagle3 gemma4-assistant",
    "it has no stack of transformer layers": "clip wavtokenizer-dec",
    "it computes embeddings, not the next token": (
        "bert eurobert gemma-embedding jina-bert-v2 jina-bert-v3 llama-embed modern-bert neo-bert nomic-bert"
        " nomic-bert-moe t5encoder"
    ),
    "its recurrent layers share their cache with an indexer, which has no slot per pass": "glm5-next qwen4exp",
    "its stacks take turns on two streams, which is a loop already": "hrm_text",
    "it has two stacks, an encoder and a decoder, and a window would mean both": "t5",
    "llama.cpp has it half done and means to remove it": "chameleon",
    "llama.cpp knows its name but has no graph for it": "gptj",
}
# what the indexer chooses need not be among the last positions, and a token that sees none becomes NaN; the sparse
# layers of minimax-m3 do not pass where attention is limited
_INDEXED = ("deepseek32", "dots3note", "glm-dsa", "minimax-m3")

_REASON = {arch: reason for reason, archs in _REFUSED.items() for arch in archs.split()}
KNOWN = frozenset(LOOPS) | frozenset(_REASON)
"""Every architecture of the pinned llama.cpp."""


def refusal(arch: str) -> str | None:
    """Why models of this architecture cannot loop, None if they can."""
    return None if arch in LOOPS else _REASON.get(arch, "the pinned llama.cpp does not know it")


def check_architecture(arch: str) -> None:
    """Raise GgufloopError, naming the reason, unless models of this architecture can loop."""
    reason = refusal(arch)
    if reason is None:
        return
    close = difflib.get_close_matches(arch, LOOPS, n=1) if arch not in KNOWN else []
    hint = f"did you mean {close[0]}?" if close else "run it without --window."
    raise GgufloopError(
        f"architecture {arch} cannot loop: {reason}.", f"{hint} docs/architectures.md lists all that can."
    )


def check_loop(arch: str, loop: LoopSpec, n_layer: int, metadata: Mapping[str, Any]) -> None:
    """Raise GgufloopError unless a model of `arch` with `n_layer` layers can loop like this; metadata: its file's."""
    check_architecture(arch)
    loop.check(n_layer)
    check_window(arch, loop.window, n_layer, metadata)
    if loop.attention is not None and arch in _INDEXED:
        raise UsageError(
            f"attention {loop.attention} cannot run on {arch}: an indexer chooses the keys its layers attend to.",
            "leave out attention and sinks.",
        )


# windows


Window = tuple[int, int]
_Value = Callable[[str, Any], Any]  # of a metadata key without the architecture's prefix, or the default
_Broken = tuple[str, str]  # why, and what to do


def check_window(arch: str, window: Window, n_layer: int, metadata: Mapping[str, Any]) -> None:
    """Raise UsageError if the layers in `window` depend on others in a way that a loop would break.

    metadata: a file's, under its full keys; arrays as sequences, or with the sequence as `.values`. What holds for
    every architecture, LoopSpec.check says.
    """

    def value(key: str, default: Any) -> Any:
        found = metadata.get(f"{arch}.{key}")
        found = getattr(found, "values", found)
        return default if found is None else found

    rule = WINDOW_RULES.get(arch)
    broken = rule(window, n_layer, value) if rule else None
    if broken is not None:
        raise UsageError(f"window {window[0]}:{window[1]} of {arch} cannot loop: {broken[0]}.", broken[1])


def _by_layer(found: Any, n_layer: int) -> Sequence[Any]:
    return list(found) if isinstance(found, (list, tuple)) else [found] * n_layer


def _shared_kv(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """All before the last two layers with K/V of their own, or all behind them: the layers there read theirs."""
    return _around(window, n_layer - int(value("attention.shared_kv_layers", 0)), n_layer)


def _shared_kv_from_20(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """All before layer 18, or all from 20 on: the layers there read the K/V of 18 and 19."""
    return _around(window, 20, n_layer)


def _around(window: Window, start: int, n_layer: int) -> _Broken | None:
    first, last = window
    if start >= n_layer or last <= start - 2 or first >= start:
        return None
    return (
        f"its layers from {start} on read the K/V of layers {start - 2} and {start - 1}",
        f"use a window that ends at {start - 2}, or one that starts at {start}.",
    )


def _ends_with_ffn(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """No layer without a feed-forward network, also not right before: the graph gives no hold at its end."""
    sizes = _by_layer(value("feed_forward_length", 1), n_layer)
    bare = [il for il in range(window[0] - 1, min(window[1], len(sizes))) if not sizes[il]]
    if not bare:
        return None
    return (
        f"layer {bare[0]} has no feed-forward network",
        "use a window that holds no such layer and does not start right after one.",
    )


def _after_deepstack(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """After the layers that add the features of an image, or every pass would add them again."""
    n = int(value("n_deepstack_layers", 0))
    if window[0] > n or not n:
        return None
    return f"its first {n} layers add the features of an image", f"use a window that starts at {n + 1} or later."


def _outside_deepstack(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """No layer that adds the features of an image, or every pass would add them again."""
    mapping = _by_layer(value("deepstack_mapping", -1), n_layer)
    held = [il for il in range(*window) if il < len(mapping) and mapping[il] >= 0]
    if not held:
        return None
    return f"layer {held[0]} adds the features of an image", "use a window that holds no such layer."


def _starts_with_indexer(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """Layers without an indexer use what the last one before them selected; a later pass must not bring it along."""
    full = _by_layer(value("attention.indexer.types", 1), n_layer)[window[0] : window[1]]
    if not any(full) or full[0]:
        return None
    return (
        f"layer {window[0]} uses the selection of an earlier layer's indexer",
        f"use a window that starts at {window[0] + [bool(f) for f in full].index(True)}.",
    )


def _without_kda(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """Attention layers only (those with K/V heads): the others store their state where the loop does not follow."""
    heads = _by_layer(value("attention.head_count_kv", 1), n_layer)
    held = [il for il in range(*window) if il < len(heads) and not heads[il]]
    if not held:
        return None
    return f"layer {held[0]} is recurrent", "use a window of attention layers only."


def _without_kda_and_banks(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """Attention layers only, between two layers that bank the residual: every pass would bank it again."""
    return _without_kda(window, n_layer, value) or _between_banks(window, n_layer, value)


def _between_banks(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    size = int(value("attn_res.block_size", 0))
    banks = [il for il in range(*window) if size and il % size == 0]
    if not banks:
        return None
    return f"layer {banks[0]} banks the residual, once more on every pass", f"use a window between multiples of {size}."


def _without_rescale(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """No layer that halves the residual (every `rescale_every_n_layers`), or every pass would halve it again."""
    n = int(value("rescale_every_n_layers", 0))
    held = [il for il in range(*window) if n and (il + 1) % n == 0]
    if not held:
        return None
    return f"layer {held[0]} halves the residual", f"use a window that ends at {held[0]} or starts at {held[0] + 1}."


WINDOW_RULES: dict[str, Callable[[Window, int, _Value], _Broken | None]] = {
    "bailingmoe3": _without_kda,
    "deci": _ends_with_ffn,
    "gemma3n": _shared_kv_from_20,
    "gemma4": _shared_kv,
    "glm-dsa": _starts_with_indexer,
    "granite": _outside_deepstack,
    "granite_swa": _outside_deepstack,
    "kimi-k3": _without_kda_and_banks,
    "kimi-linear": _without_kda,
    "qwen3tts": _after_deepstack,
    "qwen3vl": _after_deepstack,
    "qwen3vlmoe": _after_deepstack,
    "rwkv6": _without_rescale,
    "rwkv6qwen2": _without_rescale,
}
"""What each says of the windows it allows is its docstring."""
