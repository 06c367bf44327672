"""What a model file holds, whether and where it can loop, and what a loop would cost: `ggufloop inspect`.

    text(inspect(describe(path), None, ("f16", "f16"), LoopSpec((12, 16), 3)))

Everything is computed from the file's header. The memory of the K/V cache is for one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ggufloop.backend.settings import DEFAULT_CONTEXT
from ggufloop.loop import LoopSpec
from ggufloop.models.architectures import refusal
from ggufloop.models.info import KV_PREDICTED, Layer, ModelInfo, plain_kv_bytes
from ggufloop.models.registry import rests_on, suggest_window
from ggufloop.opening import check_loops
from ggufloop.table import Cell, Table, columns

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelLoop:
    """A loop on this model: its window's origin ('' if the user gave it), and the bytes of K/V it adds, if known."""

    spec: LoopSpec
    origin: str
    extra_kv_bytes: int | None


@dataclass(frozen=True)
class Inspection:
    """Everything shown. kv_bytes: per layer, None where the architecture's cache is not known."""

    info: ModelInfo
    reason: str | None
    suggestion: tuple[tuple[int, int], str] | None
    rests_on: str
    n_ctx: int
    types: tuple[str, str]
    kv_bytes: list[int] | None
    loop: ModelLoop | None


def inspect(
    info: ModelInfo, n_ctx: int | None, types: tuple[str, str], loop: LoopSpec | None = None, origin: str = ""
) -> Inspection:
    """What to say of a model and, if it can loop, of a loop on it. n_ctx: None as in ContextSettings.

    types: of K and V. origin: where the loop's window comes from. Raises UsageError for a loop the model cannot run.
    """
    reason = refusal(info.architecture) or (None if info.n_layer > 2 else f"it has {info.n_layer} layers, 3 are needed")
    if n_ctx is None:
        n_ctx = min(DEFAULT_CONTEXT, info.n_ctx_train)
    if reason is not None:
        return Inspection(info, reason, None, "", n_ctx, types, None, None)
    sizes = None
    if info.architecture in KV_PREDICTED:
        sizes = plain_kv_bytes(info, n_ctx, *types, flash_attn=True)
    looped = None
    if loop is not None:
        check_loops(info.files[0], [loop])
        looped = ModelLoop(loop, origin, None if sizes is None else loop.extra_kv_bytes(sizes))
    return Inspection(info, None, suggest_window(info), rests_on(info), n_ctx, types, sizes, looped)


def text(report: Inspection) -> str:
    """All of it for eyes."""
    info = report.info
    layer = info.layers[0]
    sliding = sum(each.sliding for each in info.layers)
    experts = f", {info.experts_used} of {info.experts} experts" if info.experts else ""
    rows_of = f"{layer.kv_heads} of K and V, size {layer.head_k}"
    slide = [("", f"{sliding} of {info.n_layer} layers see the last {info.sliding_window} tokens only")]
    label = f"{info.label} by its label, " if info.label else ""
    lines = [
        ("file", str(info.files[0]) + (f" and {len(info.files) - 1} more" if len(info.files) > 1 else "")),
        ("name", info.name or "none"),
        ("architecture", info.architecture),
        ("layers", f"{info.n_layer}, width {info.n_embd}{experts}"),
        ("attention", f"{layer.heads} heads, {f'one latent row of {layer.head_k}' if info.latent_kv else rows_of}"),
        *(slide if sliding else []),
        ("context", f"{info.n_ctx_train} tokens"),
        ("vocabulary", f"{info.n_vocab} tokens ({info.tokenizer})"),
        ("chat template", "yes" if info.chat_template else "no"),
        ("weights", f"{_mib(info.weight_bytes)}, {label}{info.bits_per_weight:.2f} bits per weight in truth"),
    ]
    head = columns("type", "tensors", "weights", "MiB:.1f", "bits per weight:.4g")
    rows = [(t.type, t.tensors, t.elements, t.nbytes / 2**20, t.bits_per_weight) for t in info.types]
    return _aligned(lines) + "\n" + Table(head, rows).render("md") + "\n" + _aligned(_loop_lines(report))


def _loop_lines(report: Inspection) -> list[tuple[str, str]]:
    if report.suggestion is None:
        return [("can loop", f"no: {report.reason}")]
    info, (window, origin) = report.info, report.suggestion
    lines = [
        ("can loop", f"yes, windows within 1:{info.n_layer - 1}"),
        ("suggested", f"--window {window[0]}:{window[1]} ({origin}), which rests on {report.rests_on}"),
        *_memory_lines(report),
    ]
    if report.loop is None:
        return lines
    spec = report.loop.spec
    evaluations, more = spec.tableau().evaluations, spec.extra_layer_evaluations()
    return [
        *lines,
        ("", ""),
        ("loop", str(spec) + (f" ({report.loop.origin})" if report.loop.origin else "")),
        ("evaluations", f"{evaluations} of the window, {more} layers more per looped token"),
        ("cost", f"{spec.relative_cost(info.n_layer):.2f} times a plain token's"
                 + (" at most" if spec.costs_less else "")),
        *_looped_memory_lines(report, report.loop),
    ]  # fmt: skip


def _memory_lines(report: Inspection) -> list[tuple[str, str]]:
    info = report.info
    if report.kv_bytes is None:
        return [("K/V cache", "how large is not known here for this architecture")]
    plain = sum(report.kv_bytes)
    kinds = report.types[0] if info.latent_kv or len(set(report.types)) == 1 else "/".join(report.types)
    return [
        ("K/V cache", f"{_mib(plain)} for {report.n_ctx or info.n_ctx_train} tokens in {kinds}"),
        ("memory", f"{_mib(info.weight_bytes + plain)} without a loop, compute buffers aside"),
    ]


def _looped_memory_lines(report: Inspection, loop: ModelLoop) -> list[tuple[str, str]]:
    extra = loop.extra_kv_bytes
    if report.kv_bytes is None or extra is None:
        slots = loop.spec.extra_kv_slots()
        more = f"{slots} more for each of the window's {loop.spec.layers} layers" if slots else "no more"
        return [("K/V cache", more)]
    plain = sum(report.kv_bytes)
    return [
        ("K/V cache", f"{_mib(plain + extra)}, {_mib(extra)} more" if extra else f"{_mib(plain)}, no more"),
        ("memory", f"{_mib(report.info.weight_bytes + plain + extra)} with the loop"),
    ]


def _aligned(lines: list[tuple[str, str]]) -> str:
    return "".join(f"{name:<14}{text}".rstrip() + "\n" for name, text in lines)


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"


def record(report: Inspection) -> dict[str, Any]:
    """For JSON."""
    info = report.info
    types: list[dict[str, Cell]] = [
        {"type": t.type, "tensors": t.tensors, "weights": t.elements, "bytes": t.nbytes,
         "bits_per_weight": t.bits_per_weight}
        for t in info.types
    ]  # fmt: skip
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "files": [str(p) for p in info.files],
        "name": info.name,
        "architecture": info.architecture,
        "layers": info.n_layer,
        "width": info.n_embd,
        **{name: [getattr(each, name) for each in info.layers] for name in Layer.__dataclass_fields__},
        **{name: getattr(info, name) for name in ("sliding_window", "latent_kv", "experts", "experts_used")},
        "context": info.n_ctx_train,
        "vocabulary": info.n_vocab,
        **{name: getattr(info, name) for name in ("tokenizer", "chat_template", "label", "bits_per_weight")},
        "weights": info.elements,
        "weight_bytes": info.weight_bytes,
        "types": types,
        "can_loop": report.reason is None,
        "reason": report.reason,
        "n_ctx": report.n_ctx or info.n_ctx_train,
        "cache_type_k": report.types[0],
        "cache_type_v": report.types[1],
        "kv_bytes_per_layer": report.kv_bytes,
        "kv_bytes": None if report.kv_bytes is None else sum(report.kv_bytes),
        "suggested_window": None,
        "suggested_window_origin": None,
        "suggested_window_rests_on": None,
        "loop": None,
    }
    if report.suggestion is not None:
        data["suggested_window"], data["suggested_window_origin"] = report.suggestion
        data["suggested_window_rests_on"] = report.rests_on
    if report.loop is not None:
        spec = report.loop.spec
        data["loop"] = {
            "spec": str(spec),
            "window": spec.window,
            "evaluations": spec.tableau().evaluations,
            "extra_layer_evaluations": spec.extra_layer_evaluations(),
            "relative_cost": spec.relative_cost(info.n_layer),
            "extra_kv_bytes": report.loop.extra_kv_bytes,
        }
    return data
