"""Which architectures can loop a window, by the name a GGUF file gives as `general.architecture`, and which windows.

    check_architecture("qwen3")                    # returns, or raises GgufloopError with the reason
    check_window("gemma4", (20, 24), 35, header.metadata)

Names and sentences are in patches/llama-loop-archs.h, which says when an architecture is allowed; the C++ of the patch
reads the same file and has the same rules, so that a plan set from C is refused like one set here.
docs/architectures.md is the matrix's table.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.files import shipped
from ggufloop.loop import LoopSpec


def _table() -> list[tuple[str, list[str]]]:
    """The entries of llama-loop-archs.h, each with its arguments; strings in several parts are joined."""
    text = (shipped("patches") / "llama-loop-archs.h").read_text(encoding="utf-8")
    entries = re.findall(r'^LOOP_(\w+)\(((?:"[^"]*"|[^"()])*)\)', text, re.MULTILINE)
    arguments = re.compile(r'(?:"[^"]*"\s*)+|\w+')
    return [
        (kind, ["".join(re.findall(r'"([^"]*)"', a)) or a for a in arguments.findall(body)]) for kind, body in entries
    ]


def _names(kind: str) -> tuple[str, ...]:
    return tuple(name for found, (names, *_) in _table() if found == kind for name in names.split())


LOOPS = _names("ARCHS")
"""Green in the architecture matrix."""

INDEXED = _names("INDEXED")
_REASON = {
    name: reason for kind, (names, reason, *_) in ((k, [*a, ""]) for k, a in _table()) if kind == "REFUSED"
    for name in names.split()
}  # fmt: skip
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
    if loop.attention is not None and arch in INDEXED:
        raise UsageError(
            f"attention {loop.attention} cannot run on {arch}: an indexer chooses the keys its layers attend to.",
            "leave out attention and sinks.",
        )


# windows


Window = tuple[int, int]
_Value = Callable[[str, Any], Any]  # of a metadata key without the architecture's prefix, or the default
_Broken = tuple[int, ...]  # the numbers of the sentence


def check_window(arch: str, window: Window, n_layer: int, metadata: Mapping[str, Any]) -> None:
    """Raise UsageError if the layers in `window` depend on others in a way that a loop would break.

    metadata: a file's, under its full keys; arrays as sequences, or with the sequence as `.values`. What holds for
    every architecture, LoopSpec.check says.
    """

    def value(key: str, default: Any) -> Any:
        found = metadata.get(f"{arch}.{key}")
        found = getattr(found, "values", found)
        return default if found is None else found

    for rule, broken, remedy in WINDOW_RULES.get(arch, ()):
        numbers = rule(window, n_layer, value)
        if numbers is not None:
            reason = broken.format(*numbers)
            raise UsageError(
                f"window {window[0]}:{window[1]} of {arch} cannot loop: {reason}.", remedy.format(*numbers)
            )


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
    return None if start >= n_layer or last <= start - 2 or first >= start else (start, start - 2, start - 1)


def _ends_with_ffn(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """No layer without a feed-forward network, also not right before: the graph gives no hold at its end."""
    sizes = _by_layer(value("feed_forward_length", 1), n_layer)
    return next(((il,) for il in range(window[0] - 1, min(window[1], len(sizes))) if not sizes[il]), None)


def _after_deepstack(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """After the layers that add the features of an image, or every pass would add them again."""
    n = int(value("n_deepstack_layers", 0))
    return (n, n + 1) if n and window[0] <= n else None


def _outside_deepstack(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """No layer that adds the features of an image, or every pass would add them again."""
    mapping = _by_layer(value("deepstack_mapping", -1), n_layer)
    return next(((il,) for il in range(*window) if il < len(mapping) and mapping[il] >= 0), None)


def _starts_with_indexer(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """Layers without an indexer use what the last one before them selected; a later pass must not bring it along."""
    plain = [1, 1] + [1, 0, 0, 0] * n_layer  # of the long-context files, which need not say it
    types = value("attention.indexer.types", plain if int(value("context_length", 0)) >= 1 << 20 else 1)
    full = [bool(f) for f in _by_layer(types, n_layer)[window[0] : window[1]]]
    return None if not any(full) or full[0] else (window[0], window[0] + full.index(True))


def _without_kda(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """Attention layers only (those with K/V heads): the others store their state where the loop does not follow."""
    heads = _by_layer(value("attention.head_count_kv", 1), n_layer)
    return next(((il,) for il in range(*window) if il < len(heads) and not heads[il]), None)


def _between_banks(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """Between two layers that bank the residual: every pass would bank it again."""
    size = int(value("attn_res.block_size", 0))
    return next(((il, size) for il in range(*window) if size and il % size == 0), None)


def _without_rescale(window: Window, n_layer: int, value: _Value) -> _Broken | None:
    """No layer that halves the residual (every `rescale_every_n_layers`), or every pass would halve it again."""
    n = int(value("rescale_every_n_layers", 0))
    return next(((il, il + 1) for il in range(*window) if n and (il + 1) % n == 0), None)


_Rule = tuple[Callable[[Window, int, _Value], "_Broken | None"], str, str]


def _window_rules() -> dict[str, tuple[_Rule, ...]]:
    rules: dict[str, tuple[_Rule, ...]] = {}
    for kind, arguments in _table():
        if kind == "RULE":
            names, rule, broken, remedy = arguments
            for name in names.split():
                rules[name] = (*rules.get(name, ()), (globals()[f"_{rule}"], broken, remedy))
    return rules


WINDOW_RULES = _window_rules()
"""By architecture: each rule, and what is said of a window that breaks it. What it allows is its docstring."""
