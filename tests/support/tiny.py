"""Tiny random models in every family the loop is tested on, written as F32 GGUF files of about one megabyte.

    path = tiny.write(tmp / "m.gguf", tiny.FAMILIES["gemma3"])   # or of HYBRIDS, which have recurrent layers
    tiny.repeat_window(path, tmp / "twice.gguf", (4, 6), 2)      # layers 4, 5 physically there twice

Every file loads in llama.cpp and has a byte-level tokenizer, so any text works as a prompt. Widths are multiples of
32, so weights and K/V can be quantised. A family switches on what its real files use and another family does not
(biases, tied output, rope factors, YaRN, shared experts, expert groups), so that one run over all families meets
every branch. Weights have the scale at which a loop visibly moves the logits, and all numbers follow from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter, TokenType

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tiny:
    """One tiny model: its shape, the window its tests loop, and what its metadata says besides."""

    arch: str
    window: tuple[int, int] = (2, 4)
    seed: int = 1
    n_layer: int = 6
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    head: int = 32
    n_ff: int = 96
    n_ff_expert: int = 32
    gate_gain: float = 1.0
    experts: int = 0
    experts_used: int = 2
    dense_lead: int = 0
    tied: bool = False
    meta: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    f.arch: f
    for f in (
        Tiny("llama", window=(2, 5), n_layer=7, meta={"rope.freq_base": 5e4}),
        Tiny("qwen2", n_embd=128, tied=True),
        Tiny("qwen2moe", seed=10, n_embd=128, experts=4),
        Tiny("qwen3", tied=True, meta={"rope.freq_base": 1e6}),
        Tiny("qwen3moe", seed=2, experts=4),
        Tiny("olmoe", seed=29, n_embd=128, n_head_kv=4, n_ff=32, experts=4),
        Tiny(
            "gemma3",
            window=(4, 6),
            n_layer=8,
            tied=True,
            gate_gain=100.0,  # llama.cpp rounds GELU to float16 below 10; far from there it is exact
            meta={
                "attention.sliding_window": 16,
                "rope.freq_base": 1e6,
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0,
            },
        ),
        Tiny(
            "deepseek2",
            window=(2, 4),
            n_head_kv=1,
            experts=8,
            dense_lead=3,
            meta={
                "attention.key_length": 64,  # of the cached row: latent 32, rope 32
                "attention.value_length": 32,
                "attention.key_length_mla": 64,
                "attention.value_length_mla": 32,
                "attention.q_lora_rank": 32,
                "attention.kv_lora_rank": 32,
                "rope.dimension_count": 32,
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 256,
                "rope.scaling.yarn_log_multiplier": 0.0707,
                "expert_shared_count": 1,
                "expert_gating_func": 2,  # sigmoid
                "expert_weights_norm": True,
                "expert_weights_scale": 1.5,
                "expert_group_count": 4,
                "expert_group_used_count": 2,
            },
        ),
    )
}


_SSM_KEYS = ("conv_kernel", "inner_size", "state_size", "time_step_rank", "group_count")


def _ssm(*values: int) -> dict[str, int]:
    return {f"ssm.{key}": value for key, value in zip(_SSM_KEYS, values, strict=True)}


HYBRIDS = {
    f.arch: f
    for f in (
        # attention in layers 2 and 5, a delta net in the others: 4 heads of values over 2 of keys
        Tiny(
            "qwen35",
            window=(2, 5),
            n_layer=7,
            meta={
                "rope.freq_base": 1e6,
                "rope.dimension_count": 16,
                "rope.dimension_sections": [3, 3, 2, 0],
                "full_attention_interval": 3,
                **_ssm(4, 128, 32, 4, 2),
            },
        ),
        # attention, without positions, in layers 3 and 6, Mamba-2 in the others
        Tiny(
            "granitehybrid",
            window=(2, 5),
            n_layer=8,
            tied=True,
            meta={
                "attention.head_count_kv": [0, 0, 0, 2, 0, 0, 2, 0],
                "attention.scale": 0.125,
                "embedding_scale": 2.0,
                "residual_scale": 0.75,
                "logit_scale": 1.25,
                "rope.scaling.finetuned": False,
                **_ssm(4, 128, 32, 4, 2),
            },
        ),
    )
}
"""Families some of whose layers are recurrent, by name."""


class _Weights:
    """Collects random tensors under their GGUF names; `np.random.Generator` makes them reproducible."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.tensors: Tensors = {}

    def matrix(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """Rows of outputs, columns of inputs; unit variance in gives `gain` out."""
        self._put(f"{name}.weight", gain / np.sqrt(shape[-1]) * self.rng.standard_normal(shape))

    def norm(self, name: str, *shape: int) -> None:
        self._put(f"{name}.weight", 1 + 0.1 * self.rng.standard_normal(shape))

    def decay(self, name: str, *shape: int) -> None:
        """Rates of forgetting, from slow to fast."""
        self._put(name, -np.exp(self.rng.uniform(-3, 0, shape)))

    def bias(self, name: str, n: int, scale: float = 0.2) -> None:
        self._put(f"{name}.bias", scale * self.rng.standard_normal(n))

    def _put(self, name: str, value: np.ndarray) -> None:
        self.tensors[name] = value.astype(np.float32)


def vocabulary() -> tuple[list[str], list[TokenType]]:
    """256 byte tokens in GPT-2's spelling of bytes, one merge, and three control tokens: 260 in all."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    bytes_ = [chr(b) if b in printable else chr(next(hidden)) for b in range(256)]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return [*bytes_, "th", *control], [TokenType.NORMAL] * 257 + [TokenType.CONTROL] * 3


def _delta_net(w: _Weights, t: Tiny, blk: str) -> None:
    width, inner, size, n_value, n_key = (t.meta[f"ssm.{key}"] for key in _SSM_KEYS)
    channels = 2 * n_key * size + inner
    w.matrix(f"{blk}.attn_qkv", channels, t.n_embd)
    w.matrix(f"{blk}.attn_gate", inner, t.n_embd)
    w.matrix(f"{blk}.ssm_conv1d", channels, width, gain=1.5)
    w.matrix(f"{blk}.ssm_beta", n_value, t.n_embd)
    w.matrix(f"{blk}.ssm_alpha", n_value, t.n_embd)
    w.bias(f"{blk}.ssm_dt", n_value)
    w.decay(f"{blk}.ssm_a", n_value)
    w.norm(f"{blk}.ssm_norm", inner // n_value)
    w.matrix(f"{blk}.ssm_out", t.n_embd, inner)


def _mamba2(w: _Weights, t: Tiny, blk: str) -> None:
    width, inner, size, n_head, n_group = (t.meta[f"ssm.{key}"] for key in _SSM_KEYS)
    channels = inner + 2 * n_group * size
    w.matrix(f"{blk}.ssm_in", inner + channels + n_head, t.n_embd)
    w.matrix(f"{blk}.ssm_conv1d", channels, width, gain=1.5)
    w.bias(f"{blk}.ssm_conv1d", channels)
    w.bias(f"{blk}.ssm_dt", n_head)
    w.decay(f"{blk}.ssm_a", n_head, 1)
    w._put(f"{blk}.ssm_d", 1 + 0.2 * w.rng.standard_normal((n_head, 1)))
    w.norm(f"{blk}.ssm_norm", n_group, inner // n_group)
    w.matrix(f"{blk}.ssm_out", t.n_embd, inner)


def recurs(t: Tiny, il: int) -> bool:
    """Whether layer `il` is recurrent."""
    if t.arch == "qwen35":
        return bool((il + 1) % t.meta["full_attention_interval"])
    return t.arch == "granitehybrid" and t.meta["attention.head_count_kv"][il] == 0


def _attention(w: _Weights, t: Tiny, blk: str) -> None:
    if t.arch == "deepseek2":
        rank, rope = t.meta["attention.kv_lora_rank"], t.meta["rope.dimension_count"]
        k, v = t.meta["attention.key_length_mla"], t.meta["attention.value_length_mla"]
        if q_rank := t.meta.get("attention.q_lora_rank"):
            w.matrix(f"{blk}.attn_q_a", q_rank, t.n_embd)
            w.norm(f"{blk}.attn_q_a_norm", q_rank)
            w.matrix(f"{blk}.attn_q_b", t.n_head * k, q_rank, gain=1.5)
        else:
            w.matrix(f"{blk}.attn_q", t.n_head * k, t.n_embd, gain=1.5)
        w.matrix(f"{blk}.attn_kv_a_mqa", rank + rope, t.n_embd)
        w.norm(f"{blk}.attn_kv_a_norm", rank)
        w.matrix(f"{blk}.attn_k_b", t.n_head, rank, k - rope)
        w.matrix(f"{blk}.attn_v_b", t.n_head, v, rank)
        w.matrix(f"{blk}.attn_output", t.n_embd, t.n_head * v)
        return
    q, kv = t.n_head * t.head, t.n_head_kv * t.head
    w.matrix(f"{blk}.attn_q", 2 * q if t.arch == "qwen35" else q, t.n_embd, gain=1.5)  # queries and their gates
    w.matrix(f"{blk}.attn_k", kv, t.n_embd)
    w.matrix(f"{blk}.attn_v", kv, t.n_embd)
    w.matrix(f"{blk}.attn_output", t.n_embd, q)
    if t.arch in ("qwen2", "qwen2moe"):
        for name, n in (("q", q), ("k", kv), ("v", kv)):
            w.bias(f"{blk}.attn_{name}", n)
    if t.arch == "olmoe":
        w.norm(f"{blk}.attn_q_norm", q)
        w.norm(f"{blk}.attn_k_norm", kv)
    if t.arch in ("qwen3", "qwen3moe", "gemma3", "qwen35"):
        w.norm(f"{blk}.attn_q_norm", t.head)
        w.norm(f"{blk}.attn_k_norm", t.head)
    if t.arch == "gemma3":
        w.norm(f"{blk}.post_attention_norm", t.n_embd)
        w.norm(f"{blk}.post_ffw_norm", t.n_embd)


def _ffn(w: _Weights, t: Tiny, blk: str, il: int) -> None:
    if not t.experts or il < t.dense_lead:
        w.matrix(f"{blk}.ffn_gate", t.n_ff, t.n_embd, gain=t.gate_gain)
        w.matrix(f"{blk}.ffn_up", t.n_ff, t.n_embd)
        w.matrix(f"{blk}.ffn_down", t.n_embd, t.n_ff, gain=2.0)
        return
    w.matrix(f"{blk}.ffn_gate_inp", t.experts, t.n_embd, gain=2.0)
    w.matrix(f"{blk}.ffn_gate_exps", t.experts, t.n_ff_expert, t.n_embd)
    w.matrix(f"{blk}.ffn_up_exps", t.experts, t.n_ff_expert, t.n_embd)
    w.matrix(f"{blk}.ffn_down_exps", t.experts, t.n_embd, t.n_ff_expert, gain=2.0)
    if t.arch in ("qwen2moe", "deepseek2"):
        w.matrix(f"{blk}.ffn_gate_shexp", t.n_ff_expert, t.n_embd)
        w.matrix(f"{blk}.ffn_up_shexp", t.n_ff_expert, t.n_embd)
        w.matrix(f"{blk}.ffn_down_shexp", t.n_embd, t.n_ff_expert, gain=2.0)
    if t.arch == "qwen2moe":
        w.matrix(f"{blk}.ffn_gate_inp_shexp", t.n_embd)
    if t.arch == "deepseek2":
        w.bias(f"{blk}.exp_probs_b", t.experts, scale=0.1)


def tensors(t: Tiny) -> Tensors:
    """All weights of a tiny model by GGUF name."""
    w = _Weights(t.seed)
    n_vocab = len(vocabulary()[0])
    w.matrix("token_embd", n_vocab, t.n_embd, gain=2.0 if t.tied else np.sqrt(t.n_embd))
    for il in range(t.n_layer):
        blk = f"blk.{il}"
        w.norm(f"{blk}.attn_norm", t.n_embd)
        if recurs(t, il):
            (_delta_net if t.arch == "qwen35" else _mamba2)(w, t, blk)
        else:
            _attention(w, t, blk)
        w.norm(f"{blk}.post_attention_norm" if t.arch == "qwen35" else f"{blk}.ffn_norm", t.n_embd)
        _ffn(w, t, blk, il)
    w.norm("output_norm", t.n_embd)
    if not t.tied:
        w.matrix("output", n_vocab, t.n_embd, gain=2.0)
    if t.arch == "llama":
        w._put("rope_freqs.weight", np.linspace(1, 8, t.head // 2))
    return w.tensors


def add_tokenizer(writer: GGUFWriter) -> None:
    """The byte-level tokenizer every tiny model has."""
    tokens, types = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Write one metadata value in the GGUF type llama.cpp reads it in; a list has one type throughout."""
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def finish(writer: GGUFWriter, path: Path) -> Path:
    """Write what was added to the file and return its path."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write(path: Path, t: Tiny) -> Path:
    """Write the model to `path` and return it."""
    writer = GGUFWriter(path, t.arch)
    meta: dict[str, Any] = {
        "vocab_size": len(vocabulary()[0]),
        "block_count": t.n_layer,
        "context_length": 1024,
        "embedding_length": t.n_embd,
        "feed_forward_length": t.n_ff,
        "attention.head_count": t.n_head,
        "attention.head_count_kv": t.n_head_kv,
        "attention.key_length": t.head,
        "attention.value_length": t.head,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": t.head,
    }
    if t.experts:
        meta |= {
            "expert_count": t.experts,
            "expert_used_count": t.experts_used,
            "expert_feed_forward_length": t.n_ff_expert,
        }
    if t.arch == "qwen2moe":
        meta["expert_shared_feed_forward_length"] = t.n_ff_expert
    if t.arch == "deepseek2":
        meta["leading_dense_block_count"] = t.dense_lead
    for key, value in (meta | t.meta).items():
        add(writer, f"{t.arch}.{key}", value)
    add_tokenizer(writer)
    for name, value in tensors(t).items():
        writer.add_tensor(name, value)
    return finish(writer, path)


def repeat_window(path: Path, out: Path, window: tuple[int, int], times: int) -> Path:
    """Copy a GGUF file with the layers of `window` physically present `times` times, one run after another.

    Works on quantised files: tensor data is copied as it is. ValueError if the metadata cannot say what kind each
    layer of the longer file is.
    """
    reader = GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    meta = {key.removeprefix(f"{arch}."): f.contents() for key, f in reader.fields.items()}
    changes = _repeat_metadata(meta, window, times)
    order = _order(meta["block_count"], window, times)
    writer = GGUFWriter(out, arch)
    for key, f in reader.fields.items():
        if key.removeprefix(f"{arch}.") not in changes and key != "general.architecture" and key[:5] != "GGUF.":
            writer.add_key_value(key, f.contents(), f.types[0], sub_type=f.types[-1] if len(f.types) > 1 else None)
    for key, value in changes.items():
        add(writer, f"{arch}.{key}", value)
    for t in reader.tensors:
        _, _, rest = t.name.split(".", 2) if t.name.startswith("blk.") else ("", "", "")
        names = [f"blk.{new}.{rest}" for new, old in enumerate(order) if t.name == f"blk.{old}.{rest}"]
        data = t.data if names else _repeat_slices(t.name, t.data, meta["block_count"], order)
        for name in names or [t.name]:
            writer.add_tensor(name, data, raw_dtype=t.tensor_type)
    return finish(writer, out)


def _order(n_layer: int, window: tuple[int, int], times: int) -> list[int]:
    a, b = window
    return [*range(a), *list(range(a, b)) * times, *range(b, n_layer)]


def _repeat_slices(name: str, data: np.ndarray, n_layer: int, order: list[int]) -> np.ndarray:
    """gemma3n and gemma4 keep something of every layer in one tensor; its slices follow the layers."""
    axis = {"per_layer_token_embd.weight": -1, "per_layer_model_proj.weight": 0}.get(name)
    return data if axis is None else np.concatenate([np.split(data, n_layer, axis)[il] for il in order], axis)


def _repeat_metadata(meta: dict[str, Any], window: tuple[int, int], times: int) -> dict[str, Any]:
    """The values that change when layers are repeated: counts, values by layer, and layers meant by their number."""
    (a, b), n_layer = window, meta["block_count"]
    added, order = (times - 1) * (b - a), _order(n_layer, window, times)
    changes: dict[str, Any] = {"block_count": n_layer + added}

    lead = meta.get("leading_dense_block_count", 0)
    if a < lead < b:
        raise ValueError(f"window {a}:{b} mixes dense and MoE layers: {lead} lead.")
    if lead >= b:
        changes["leading_dense_block_count"] = lead + added

    shared = meta.get("attention.shared_kv_layers", 0)  # the last ones
    if a < n_layer - shared < b:
        raise ValueError(f"window {a}:{b} mixes layers with K/V of their own and without: the last {shared} share.")
    if a >= n_layer - shared:
        changes["attention.shared_kv_layers"] = shared + added

    for key, by_layer in (
        ("interleave_moe_layer_step", ""),
        ("full_attention_interval", "attention.recurrent_layers"),  # which says it by layer, if it is there
    ):
        if by_layer not in meta and added % meta.get(key, 1):
            raise ValueError(f"window {a}:{b} does not hold whole periods of {key} {meta[key]}.")

    lists = {key: value for key, value in meta.items() if isinstance(value, list) and len(value) == n_layer}
    changes |= {key: [value[il] for il in order] for key, value in lists.items()}
    pattern = meta.get("attention.sliding_window_pattern", 6)
    if "attention.sliding_window" in meta and not isinstance(pattern, list):  # a period no longer says which slide
        changes["attention.sliding_window_pattern"] = [il % pattern < pattern - 1 for il in order]
    return changes
