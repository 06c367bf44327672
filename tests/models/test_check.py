"""What a header tells llama.cpp cannot compute is refused in one line, and what it can is not.

Nearly all that is refused here ends llama.cpp's process: by an assert, a crash or a C++ exception. The rest (a base
that is no number, a context of two thousand million tokens) describes no model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutations import gguf

from ggufloop.errors import GgufloopError
from ggufloop.models.gguf import check_model_file, read_model

TinyModel = Callable[[str], Path]
Change = Callable[[gguf.File], None]


def put(name: str, value: Any) -> Change:
    """Set a key in the type GGUF files have it in."""

    def change(file: gguf.File) -> None:
        kind = 7 if isinstance(value, bool) else 4 if isinstance(value, int) else 6
        kind = gguf.STRING if isinstance(value, bytes) else kind
        file.keys = [k for k in file.keys if k.name != name.encode()]
        file.keys.append(gguf.Key(name.encode(), kind, value, False))

    return change


def kind(name: str, number: int) -> Change:
    """Make a tensor of another type, with the data of that."""

    def change(file: gguf.File) -> None:
        w = next(w for w in file.weights if w.name == name.encode())
        w.kind, w.data = number, b""
        w.data = gguf._fit(w).data

    return change


def aligned(n: int) -> Change:
    def change(file: gguf.File) -> None:
        put("general.alignment", n)(file)
        file.layout = n

    return change


def sections(*values: int) -> Change:
    def change(file: gguf.File) -> None:
        key = file.key(b"qwen35.rope.dimension_sections")
        assert key is not None
        key.value = list(values)

    return change


def without_bytes(file: gguf.File) -> None:
    tokens = file.key(b"tokenizer.ggml.tokens")
    assert tokens is not None
    tokens.value[3:13] = [b"gone%d" % i for i in range(10)]


def few_tokens(file: gguf.File) -> None:
    put("tokenizer.ggml.model", b"t5")(file)
    put("tokenizer.ggml.add_bos_token", True)(file)


def damaged(source: Path, target: Path, change: Change, sentencepiece: bool = False) -> Path:
    data = source.read_bytes()
    file = gguf.parse(gguf.sentencepiece(data) if sentencepiece else data)
    change(file)
    target.write_bytes(gguf.build(file))
    return target


F16, Q8_0, I8, I32, F64, Q8_K = 1, 8, 24, 26, 28, 15
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("family", "change", "why"),
    [
        ("llama", kind("blk.1.attn_norm.weight", F16), "tensor blk.1.attn_norm.weight is of type F16, and only F32"),
        ("llama", kind("rope_freqs.weight", F16), "its tensor rope_freqs.weight is of type F16, and only F32"),
        ("qwen2", kind("blk.0.attn_q.bias", Q8_0), "its tensor blk.0.attn_q.bias is of type Q8_0, and only F32"),
        ("granitehybrid", kind("blk.0.ssm_conv1d.weight", F16), "blk.0.ssm_conv1d.weight is of type F16, and only F32"),
        ("granitehybrid", kind("blk.0.ssm_norm.weight", F16), "blk.0.ssm_norm.weight is of type F16, and only F32"),
        ("llama", kind("token_embd.weight", I8), "token_embd.weight is of type I8, which no weights have"),
        ("llama", kind("blk.0.ffn_up.weight", F64), "blk.0.ffn_up.weight is of type F64, which no weights have"),
        ("llama", kind("output.weight", I32), "output.weight is of type I32, which no weights have"),
        ("llama", put("llama.attention.layer_norm_rms_epsilon", NAN), "its llama.attention.layer_norm_rms_epsilon is "),
        ("llama", put("llama.attention.layer_norm_rms_epsilon", -1e-5), "layer_norm_rms_epsilon is -9.99"),
        ("llama", put("llama.rope.freq_base", NAN), "its llama.rope.freq_base is nan."),
        ("gemma3", put("gemma3.rope.dimension_count", 31), "have 32 values of K, 32 of V, and 31 that are rotated"),
        ("gemma3", put("gemma3.rope.dimension_count", 34), "have 32 values of K, 32 of V, and 34 that are rotated"),
        ("qwen3", put("qwen3.rope.dimension_count", 16), "have 32 values of K, 32 of V, and 16 that are rotated"),
        ("qwen3", put("qwen3.attention.value_length", 16), "have 32 values of K, 16 of V, and 32 that are rotated"),
        ("qwen3", put("qwen3.attention.head_count_kv", 3), "its 4 heads of layer 0 do not share 3 heads of K and V"),
        ("qwen35", sections(3, 3, 64, 0), "its heads of 32 values are rotated in sections of [3, 3, 64, 0]."),
        ("qwen35", sections(0, 0, 0, 0), "its heads of 32 values are rotated in sections of [0, 0, 0, 0]."),
        ("llama", put("llama.embedding_length", 128), "its embedding_length is 128, and its tokens have 64 values."),
        ("llama", put("llama.context_length", 2**31 - 1), "its llama.context_length is 2147483647, not in 1 to"),
        ("llama", aligned(1), "its weights begin at byte "),
        ("llama", few_tokens, "its tokenizer adds a token (bos) that is not among its 260"),
    ],
)  # fmt: skip
def test_refused(family: str, change: Change, why: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    path = damaged(tiny_model(family), tmp_path / "m.gguf", change)
    with pytest.raises(GgufloopError) as e:
        check_model_file(path)
    assert e.value.message.startswith(f"{path} is no model that can run: ")
    assert why in e.value.message
    assert e.value.hint


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", kind("token_embd.weight", F16)),
        ("llama", kind("blk.0.ffn_up.weight", Q8_0)),
        ("qwen2moe", kind("blk.0.ffn_gate_inp_shexp.weight", F16)),
        ("llama", aligned(64)),
        ("gemma3", put("gemma3.rope.dimension_count", 16)),
        ("llama", put("llama.attention.layer_norm_rms_epsilon", 0.0)),
        ("llama", put("tokenizer.ggml.bos_token_id", 2**31)),
        ("llama", put("llama.context_length", 10_000_000)),
    ],
)
def test_what_runs_is_not_refused(family: str, change: Change, tiny_model: TinyModel, tmp_path: Path) -> None:
    check_model_file(damaged(tiny_model(family), tmp_path / "m.gguf", change))


def test_a_sentencepiece_tokenizer_needs_a_token_for_each_byte(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = damaged(tiny_model("llama"), tmp_path / "m.gguf", lambda file: None, sentencepiece=True)
    check_model_file(path)
    damaged(tiny_model("llama"), path, without_bytes, sentencepiece=True)
    read_model(path)  # can be looked at and quantised
    with pytest.raises(GgufloopError, match=r"its tokenizer has tokens for 246 of the 256 bytes\.$"):
        check_model_file(path)


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        (b"blk.0.attn_norm.weight\0", [64], "holds a zero byte"),
        (b"", [64], "the tensor name '' is empty"),
        (b"blk.0.attn_norm.weight", [64, 0], r"has the shape \(64, 0\)"),
    ],
)
def test_names_and_shapes_of_no_tensor(
    name: bytes, shape: list[int], why: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    def change(file: gguf.File) -> None:
        w = next(w for w in file.weights if w.name == b"blk.0.attn_norm.weight")
        w.name, w.shape = name, shape

    with pytest.raises(GgufloopError, match=rf"is corrupt: .*{why}"):
        read_model(damaged(tiny_model("llama"), tmp_path / "m.gguf", change))
