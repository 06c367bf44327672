"""What a model is, by its file alone: shape, tensor types at their true size, memory of its K/V cache. No llama_cpp.

    info = describe(path)
    info.bits_per_weight                             # bytes * 8 / weights, not what the file calls itself
    sum(plain_kv_bytes(info, n_ctx=4096))            # what llama.cpp will allocate, to the byte

The cache rules repeat llama.cpp's (llama-context.cpp, llama-kv-cache.cpp, llama-kv-cache-iswa.cpp, and
load_arch_hparams of the families in KV_PREDICTED); a test holds them against the sizes llama.cpp logs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.models.gguf import Array, Header, read_model, type_sizes, unusable

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""Types llama.cpp lets a K/V cache have."""
_SLIDING = {
    "gemma2": (2, False), "gemma3": (6, False), "cohere2": (4, False), "cohere2moe": (4, True), "gpt-oss": (2, False),
    "afmoe": (4, False), "mellum": (4, False), "laguna": (4, True), "muse-glimmer": (4, False), "olmo2": (4, False),
    "plamo3": (8, False), "granite_swa": (0, False), "maple": (0, False), "spark2_5": (0, False),
}  # fmt: skip
"""Architectures with sliding layers: the period if the file gives none, and whether it starts with the full layer."""
_PLAIN = """
    apertus arcee arctic baichuan bailingmoe bitnet bloom chatglm codeshell cogvlm command-r dbrx deci deepseek
    deepseek2-ocr dots1 ernie4_5 ernie4_5-moe exaone falcon gemma glm4 gpt2 gptneox granite granitemoe grok grovemoe
    hunyuan-dense hunyuan-moe hunyuan_vl internlm2 jais jais2 llama maincoder minicpm minicpm3 minimax-m2 mistral3 mpt
    nemotron olmo olmoe openelm orion paddleocr pangu-embedded phi2 phi3 phimoe plamo pockettts qwen qwen2 qwen2moe
    qwen2vl qwen3 qwen3moe qwen3tts qwen3vl qwen3vlmoe refact seed_oss smollm3 stablelm starcoder starcoder2 talkie
    xverse
"""
KV_PREDICTED = frozenset(_PLAIN.split()) | frozenset(_SLIDING) | {"deepseek2"}
"""Architectures whose cache `plain_kv_bytes` knows."""


@dataclass(frozen=True)
class TypeShare:
    """The tensors of one type. nbytes: their data, without padding."""

    type: str
    tensors: int
    elements: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """True size: scales and padding of blocks included."""
        return self.nbytes * 8 / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Layer:
    """The attention of one layer; its cache holds kv_heads rows of head_k and of head_v values per token.

    sliding: it sees only the last `ModelInfo.sliding_window` tokens.
    """

    heads: int
    kv_heads: int
    head_k: int
    head_v: int
    sliding: bool


@dataclass(frozen=True)
class ModelInfo:
    """A model as its file describes it. Sizes in bytes, contexts and windows in tokens.

    files          its parts, usually one
    layers         one per layer of the stack a window is counted in (prediction heads excluded)
    latent_kv      the cache holds one latent row per token instead of K and V (MLA)
    sliding_window tokens a sliding layer sees, 0 without such layers
    label          the quantisation the file says it has, '' if it says none
    types          its tensor types, the largest first
    """

    files: tuple[Path, ...]
    architecture: str
    name: str
    layers: tuple[Layer, ...]
    n_embd: int
    n_ctx_train: int
    n_vocab: int
    experts: int
    experts_used: int
    latent_kv: bool
    sliding_window: int
    tokenizer: str
    chat_template: str | None
    label: str
    types: tuple[TypeShare, ...]

    @property
    def n_layer(self) -> int:
        """Number of layers a window is counted in."""
        return len(self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.types)

    @property
    def elements(self) -> int:
        """Number of weights."""
        return sum(t.elements for t in self.types)

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight of the whole model."""
        return self.weight_bytes * 8 / self.elements if self.elements else 0.0


def describe(path: Path) -> ModelInfo:
    """Read what the GGUF model at `path` is; milliseconds, the weights are not touched.

    Raises GgufloopError as `modelfile.read_model`, and for metadata without the shape of a model.
    """
    headers = read_model(path)
    first = headers[0]
    arch = first.text("general.architecture") or ""  # read_model has seen that there is one
    experts_used = _per_layer(first, f"{arch}.expert_used_count", 1, 0)[0]
    tokens = first.metadata.get("tokenizer.ggml.tokens")
    mla = [bool(first.number(f"{arch}.attention.{x}_length_mla")) for x in ("key", "value")]
    return ModelInfo(
        files=tuple(h.path for h in headers),
        architecture=arch,
        name=first.text("general.name") or "",
        layers=_layers(first, arch),
        n_embd=first.positive(f"{arch}.embedding_length"),
        n_ctx_train=first.positive(f"{arch}.context_length"),
        n_vocab=tokens.length if isinstance(tokens, Array) else first.number(f"{arch}.vocab_size") or 0,
        experts=first.number(f"{arch}.expert_count") or 0,
        experts_used=experts_used,
        latent_kv=arch == "deepseek2" and all(mla),
        sliding_window=_sliding_window(first, arch),
        tokenizer=first.text("tokenizer.ggml.model") or "none",
        chat_template=first.text("tokenizer.chat_template"),
        label=_label(first),
        types=_types(headers),
    )


def _per_layer(header: Header, key: str, n: int, default: int) -> list[int]:
    """A setting that is one number for all n layers, or an array of one each."""
    value = header.metadata.get(key, default)
    values = [value] * n if not isinstance(value, Array) else list(value.values or ())[:n]
    if len(values) != n or not all(isinstance(v, int) and 0 <= v < 2**31 for v in values):
        raise unusable(header.path, f"its {key} is not a number per layer")
    return [int(v) for v in values]


def _sliding_window(header: Header, arch: str) -> int:
    """Tokens a sliding layer sees, 0 if the architecture has no such layers, whatever the file says."""
    default = 4096 if arch == "gemma2" else 0
    return _per_layer(header, f"{arch}.attention.sliding_window", 1, default)[0] if arch in _SLIDING else 0


def _sliding(header: Header, arch: str, n: int) -> list[bool]:
    """Which of n layers slide."""
    if not _sliding_window(header, arch):
        return [False] * n
    key = f"{arch}.attention.sliding_window_pattern"
    default, full_first = _SLIDING[arch]
    if isinstance(header.metadata.get(key), Array):
        return [bool(v) for v in _per_layer(header, key, n, 0)]
    period = _per_layer(header, key, 1, default)[0]
    full = 0 if full_first else period - 1
    return [period == 0 or il % period != full for il in range(n)]


def layer_count(header: Header, arch: str) -> int:
    """Number of layers a window is counted in: those of multi-token prediction are not. Raises GgufloopError."""
    return header.positive(f"{arch}.block_count") - (header.number(f"{arch}.nextn_predict_layers") or 0)


def _layers(header: Header, arch: str) -> tuple[Layer, ...]:
    n_all = header.positive(f"{arch}.block_count")
    n = layer_count(header, arch)
    n_embd = header.positive(f"{arch}.embedding_length")
    heads = _per_layer(header, f"{arch}.attention.head_count", n_all, 0)
    kv_heads = _per_layer(header, f"{arch}.attention.head_count_kv", n_all, 0)
    if f"{arch}.attention.head_count_kv" not in header.metadata:
        kv_heads = heads
    default = n_embd // heads[0] if heads[0] else 0
    given = (header.number(f"{arch}.attention.{x}_length") for x in ("key", "value"))
    head_k, head_v = (default if size is None else size for size in given)
    sliding = _sliding(header, arch, n_all)
    return tuple(Layer(heads[il], kv_heads[il], head_k, head_v, sliding[il]) for il in range(n))


def _label(header: Header) -> str:
    """The `general.file_type` by name: what most of the tensors were meant to be."""
    number = header.number("general.file_type")
    if number is None:
        return ""
    from gguf.constants import LlamaFileType

    newer = {40: "Q1_0", 41: "Q2_0"}
    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return newer.get(number, f"type {number}")


def _types(headers: tuple[Header, ...]) -> tuple[TypeShare, ...]:
    totals: dict[str, tuple[int, int, int]] = {}
    for tensor in (t for h in headers for t in h.tensors):
        n, elements, nbytes = totals.get(tensor.type, (0, 0, 0))
        totals[tensor.type] = (n + 1, elements + tensor.elements, nbytes + tensor.nbytes)
    shares = [TypeShare(name, *total) for name, total in totals.items()]
    return tuple(sorted(shares, key=lambda s: (-s.nbytes, s.type)))


def plain_kv_bytes(
    info: ModelInfo,
    n_ctx: int,
    type_k: str = "f16",
    type_v: str = "f16",
    *,
    n_seq_max: int = 1,
    n_batch: int = 512,
    n_ubatch: int = 512,
    swa_full: bool = True,
    kv_unified: bool = False,
    flash_attn: bool = False,
) -> list[int]:
    """Bytes of K/V cache llama.cpp allocates for each layer without a loop; defaults as llama_cpp.Llama has them.

    n_ctx: tokens, 0 for the model's own context. type_k, type_v: one of KV_TYPES. Buffer padding (less than 32 bytes
    per tensor) is not counted. Raises UsageError for an unknown or unfitting type, GgufloopError for an architecture
    whose cache is not known here.
    """
    if info.architecture not in KV_PREDICTED:
        raise GgufloopError(
            f"how large the cache of architecture {info.architecture} is, is not known here.",
            "load the model: llama.cpp logs it (-v).",
        )
    if n_ctx < 0:
        raise UsageError(f"context {n_ctx} is negative.", "give a number of tokens, or 0 for the model's own.")
    if info.latent_kv and type_k.lower() != type_v.lower():
        raise UsageError(
            f"cache types {type_k} and {type_v} differ, but this model keeps K and V in one row.",
            f"give both as {type_k}.",
        )
    n_ctx = n_ctx or info.n_ctx_train
    n_ubatch = min(n_ubatch, n_batch, n_ctx)
    n_stream = 1 if kv_unified else n_seq_max
    cells = _pad256(_pad256(n_ctx) // n_stream)
    cells_sliding = cells
    if not swa_full:
        cells_sliding = _pad256(min(cells, info.sliding_window * (n_seq_max if kv_unified else 1) + n_ubatch))

    rows_v = [layer.head_v * layer.kv_heads for layer in info.layers]
    if not flash_attn:  # V is stored transposed then, and every layer gets the widest row
        rows_v = [max(rows_v)] * len(rows_v)
    sizes = []
    for layer, row_v in zip(info.layers, rows_v, strict=True):
        row = _row_bytes(type_k, layer.head_k * layer.kv_heads, "K")
        if not info.latent_kv:
            row += _row_bytes(type_v, row_v, "V")
        sizes.append(row * n_stream * (cells_sliding if layer.sliding else cells))
    return sizes


def _pad256(n: int) -> int:
    return (n + 255) // 256 * 256


def _row_bytes(kind: str, elements: int, which: str) -> int:
    if kind.lower() not in KV_TYPES:
        raise UsageError(f"{which} cache type {kind!r} is not known.", nearest(kind.lower(), KV_TYPES))
    block, size = next((b, s) for name, b, s in type_sizes().values() if name == kind.upper())
    if elements % block:
        raise UsageError(
            f"{which} cache type {kind} stores blocks of {block}, and this model's rows have {elements} values.",
            "use f16.",
        )
    return elements // block * size
