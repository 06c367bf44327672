"""What the header of a GGUF model tells of whether llama.cpp can compute it: numbers, types of tensors, the tokenizer.

    check(headers)                 # raises GgufloopError, one line: what holds of every file that runs
    check_tokenizer(header)        # the same, for what is to cut text into tokens

llama.cpp answers what is refused here by an assert or a crash; where it answers in words, it is left to it. Each rule
was found by damaging files (scripts/mutate.py), and is of a kind of tensor or key, not of one model. What no header
tells is tried in a process of its own (trial.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ggufloop.models.gguf import MAX_EXPERTS, MAX_LAYERS, Array, Header, Tensor, unusable

MAX_CONTEXT = 1 << 28
"""Tokens a model may say it was trained on; the most that any does is 100 million."""

NOT_WEIGHTS = ("F64", "I64", "I32", "I16", "I8", "Q8_1", "Q8_K")
"""Types that nothing multiplies with weights of: the last two are what activations become."""
_TABLES = re.compile(r"tid2eid")
"""Tensors of whole numbers."""
_EXACT = re.compile(r"norm\d?\.weight$|\.bias$|conv1d(_[qkv])?\.weight$|shortconv\.conv\.weight$|lerp_fused")
"""Tensors that are added, multiplied element by element or convolved, where the CPU has no other type than F32."""
_MATRICES_OF_ONE_ROW = re.compile(r"_inp|^cls|^output\.|nextn")
"""Vectors that are multiplied as matrices, or not at all."""

_SQUARE = """
    apertus arcee arctic baichuan codeshell cogvlm dbrx deci deepseek dots1 dream ernie4_5 ernie4_5-moe exaone exaone4
    exaone-moe falcon granite granitemoe grok grovemoe hunyuan-moe hunyuan_vl internlm2 jais2 llada llada-moe llama
    llama4 maincoder mellum mistral3 olmo olmo2 olmoe orion paddleocr pangu-embedded plamo qwen2 qwen2moe qwen2vl qwen3
    qwen3moe qwen3vl qwen3vlmoe rnd1 seed_oss smallthinker smollm3 starcoder2 talkie xverse
"""
_ONE_SIZE = frozenset(_SQUARE.split())
"""Architectures whose graph asserts that a head's K, its V and what is rotated of it are of one size."""

_OTHER_WIDTH = ("wavtokenizer-dec",)  # whose input is no embedding of its own width

# what a tokenizer assumes where the file does not say: beginning, end of text, and whether the first is added
_SPECIAL: dict[str, tuple[int | None, int | None, bool]] = {
    "llama": (1, 2, True), "gpt2": (11, 11, False), "bert": (101, None, False), "t5": (None, 1, False),
    "gemma4": (None, None, True), "plamo2": (1, 2, False),
}  # fmt: skip


def check(headers: Sequence[Header]) -> None:
    """Raise GgufloopError over what llama.cpp takes for granted in any model, and ends the process without."""
    first = headers[0]
    arch = first.text("general.architecture")
    if arch is None:
        raise unusable(first.path, "it does not say its architecture")
    _check_numbers(first, arch)
    _check_experts(first, arch)
    _check_attention(first, arch)
    width = first.positive(f"{arch}.embedding_length")
    for header in headers:
        for tensor in header.tensors:
            _check_type(header, tensor)
            row = tensor.shape[0] if tensor.shape else 1
            if tensor.name == "token_embd.weight" and row != width and arch not in _OTHER_WIDTH:
                raise unusable(first.path, f"its embedding_length is {width}, and its tokens have {row} values")
        if header.tensors and header.data_start % 32:
            raise unusable(header.path, f"its weights begin at byte {header.data_start}, not at a multiple of 32")


def _check_numbers(header: Header, arch: str) -> None:
    header.positive(f"{arch}.block_count", MAX_LAYERS)
    header.positive(f"{arch}.embedding_length")
    header.positive(f"{arch}.context_length", MAX_CONTEXT)
    for key, value in header.metadata.items():
        if not isinstance(value, float):
            continue
        if key.endswith("_epsilon") and not 0 <= value < math.inf:
            raise unusable(header.path, f"its {key} is {value}, not a small positive number")
        if ".rope." in key and not math.isfinite(value):
            raise unusable(header.path, f"its {key} is {value}")


def _numbers(header: Header, key: str) -> list[int]:
    """A setting, or its values by layer; [0] without it."""
    value = header.metadata.get(key, 0)
    if isinstance(value, Array):
        return [int(v) if isinstance(v, int) or math.isfinite(v) else 0 for v in value.values or ()] or [0]
    return [header.number(key) or 0]


def _check_experts(header: Header, arch: str) -> None:
    def number(key: str) -> int:
        return max(_numbers(header, f"{arch}.{key}"))

    layers = header.positive(f"{arch}.block_count", MAX_LAYERS)
    experts, used = number("expert_count"), number("expert_used_count")
    groups, groups_used = number("expert_group_count"), number("expert_group_used_count")
    if number("nextn_predict_layers") >= layers:
        raise unusable(header.path, "all its layers are prediction heads")
    if experts > MAX_EXPERTS or used > experts or (experts > 0 and used == 0):
        raise unusable(header.path, f"it uses {used} of {experts} experts")
    if groups > 0 and (groups >= experts or (groups > 1 and (experts % groups or not 0 < groups_used < groups))):
        raise unusable(header.path, f"it has {experts} experts in {groups} groups, of which {groups_used} are used")


def _check_attention(header: Header, arch: str) -> None:
    def number(key: str) -> int:
        return max(_numbers(header, f"{arch}.{key}"))

    scaling = header.text(f"{arch}.rope.scaling.type")
    if scaling not in (None, "none", "linear", "yarn", "longrope"):
        raise unusable(header.path, f"its rope scaling {scaling!r} is not known")
    head, rope = number("attention.key_length_mla"), number("rope.dimension_count")
    row, latent = number("attention.key_length"), number("attention.kv_lora_rank")
    if arch == "deepseek2" and head and (head <= rope or row != latent + rope):
        raise unusable(
            header.path, f"heads of {head} and rows of {row} do not fit {latent} latent and {rope} rotary values"
        )
    heads, kv = (_numbers(header, f"{arch}.attention.head_count{x}") for x in ("", "_kv"))
    if len(heads) == 1:
        heads *= len(kv)
    kv = kv * len(heads) if len(kv) == 1 else kv
    for il, (n, n_kv) in enumerate(zip(heads, kv, strict=False)):
        if n > 0 and n_kv > 0 and n % n_kv:
            raise unusable(header.path, f"its {n} heads of layer {il} do not share {n_kv} heads of K and V evenly")
    if heads[0] > 0:
        given = {"key": row, "value": number("attention.value_length")}
        default = header.positive(f"{arch}.embedding_length") // heads[0]
        size, value = (
            given[x] if f"{arch}.attention.{x}_length" in header.metadata else default for x in ("key", "value")
        )
        rope = rope if f"{arch}.rope.dimension_count" in header.metadata else size
        if rope % 2 or rope > size or (arch in _ONE_SIZE and not rope == size == value):
            raise unusable(header.path, f"its heads have {size} values of K, {value} of V, and {rope} that are rotated")
        sections = _numbers(header, f"{arch}.rope.dimension_sections")[:4]
        if f"{arch}.rope.dimension_sections" in header.metadata and not 0 < sum(sections) <= size:
            raise unusable(header.path, f"its heads of {size} values are rotated in sections of {sections}")


def _check_type(header: Header, tensor: Tensor) -> None:
    def wrong(what: str) -> Exception:
        return unusable(header.path, f"its tensor {tensor.name} is of type {tensor.type}, {what}")

    if tensor.type in NOT_WEIGHTS and not _TABLES.search(tensor.name):
        raise wrong("which no weights have")
    vector = math.prod(tensor.shape[1:]) == 1 and not _MATRICES_OF_ONE_ROW.search(tensor.name)
    if tensor.type != "F32" and (vector or _EXACT.search(tensor.name)):
        raise wrong("and only F32 is computed there")


def check_tokenizer(header: Header) -> None:
    """Raise GgufloopError if cutting a text into tokens may end the process. None at all is the engine's to tell."""
    model = header.text("tokenizer.ggml.model") or ""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Array) or model not in _SPECIAL:
        return
    if model == "llama" and tokens.bytes < 256:
        raise unusable(header.path, f"its tokenizer has tokens for {tokens.bytes} of the 256 bytes")
    bos, eos, adds = _SPECIAL[model]
    for what, default, added in (("bos", bos, adds), ("eos", eos, False)):
        given = header.number(f"tokenizer.ggml.{what}_token_id")
        known = [n for n in (given, default) if n is not None and 0 <= n < tokens.length]
        if not known and header.metadata.get(f"tokenizer.ggml.add_{what}_token", added) is True:
            raise unusable(header.path, f"its tokenizer adds a token ({what}) that is not among its {tokens.length}")
