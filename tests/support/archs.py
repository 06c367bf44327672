"""What the architecture matrix tests: a row per architecture, and per variant where one file format has several graphs.

    ROWS["qwen3moe"].metadata(n_vocab=260)     # what to write into the GGUF file

A row is metadata and a window; which tensors follow from it, llama.cpp says itself (zoo.py). `BASE` is what most
architectures need; keys an architecture does not read do no harm. What a layer is (sliding, recurrent, dense) is
written per layer wherever the format allows it, so that the file with the window repeated says exactly the same;
where the loader has a fixed period, the window holds whole periods.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Meta = dict[str, Any]
SCALES = (r"(?<!ffn_gate_inp)\.(input_)?scale$",)
"""What llama.cpp asks for beside every matrix, for the sake of quantised ones."""


@dataclass(frozen=True)
class Row:
    """One tiny model and the window the matrix loops in it."""

    name: str
    cache: str
    meta: Meta = field(default_factory=dict)
    window: tuple[int, int] = (2, 4)
    n_layer: int = 6
    gelu: str = ""  # "up" or "gate": the matrix whose output goes through GELU
    drop: tuple[str, ...] = SCALES  # optional tensors this model has not, as regular expressions
    factors: Meta = field(default_factory=dict)  # on the weights whose names match, where the usual scale is chaotic
    flash_attn: bool = False
    stores: bool = True  # whether the window's layers have K/V or a state of their own
    unrepeatable: str = ""  # why no file can say what the loop computes
    seed: int = 1

    @property
    def arch(self) -> str:
        """`general.architecture`; what follows it in the name is the variant."""
        return self.name.split(" ")[0]

    @property
    def recurrent(self) -> bool:
        """Whether the window holds layers with a recurrent state."""
        return self.cache in (RECURRENT, HYBRID)

    def metadata(self, n_vocab: int) -> Meta:
        """Everything but the tokenizer, under the full keys."""
        meta = BASE | {"vocab_size": n_vocab, "block_count": self.n_layer} | self.meta
        return {key if key.startswith("xielu.") else f"{self.arch}.{key}": value for key, value in meta.items()}


BASE: Meta = {
    "context_length": 1024,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
}

KV, SLIDING, LATENT, LATENT_SLIDING = "K and V", "K and V, sliding", "latent K", "latent K, sliding"
HYBRID, BESIDE, RECURRENT, NONE = "hybrid", "hybrid, attention only", "recurrent", "none"

MHA: Meta = {"attention.head_count_kv": 4}
MOE: Meta = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
SHARED: Meta = {**MOE, "expert_shared_count": 1, "expert_shared_feed_forward_length": 32}
SIGMOID: Meta = {"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 1.5}
SECTIONS: Meta = {"rope.dimension_sections": [2, 2, 2, 2]}
MLA: Meta = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 32,
    "attention.key_length": 48,  # of the cached row: latent 32, rope 16
    "attention.value_length": 32,
    "attention.key_length_mla": 32,
    "attention.value_length_mla": 16,
    "rope.dimension_count": 16,
}
SSM: Meta = {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.time_step_rank": 4}
SSM2: Meta = {**SSM, "ssm.group_count": 2}
DELTA: Meta = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 64,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
    "full_attention_interval": 4,
    "attention.layer_norm_rms_epsilon": 1e-3,  # a head that hardly answers would be blown up, its rounding too
}
KDA: Meta = {"ssm.conv_kernel": 4, "kda.head_dim": 16, "kda.gate_lower_bound": -5.0, "kda.safe_gate": True}


INDEXER: Meta = {
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 24,
    "attention.indexer.block_size": 4,
    "attention.indexer.local_blocks": 1,
}
RWKV: Meta = {"wkv.head_size": 32, "attention.head_count": 0, "attention.head_count_kv": 0}
RWKV6: Meta = {**RWKV, "time_mix_extra_dim": 16, "time_decay_extra_dim": 16}
RWKV7: Meta = {
    **RWKV,
    "embedding_length": 128,
    "wkv.head_size": 64,  # with AVX-512 the CPU's kernel reads and writes 64 values of each row, whatever its length
    "attention.decay_lora_rank": 16,
    "attention.iclr_lora_rank": 16,
    "attention.value_residual_mix_lora_rank": 16,
    "attention.gate_lora_rank": 16,
}
HYPER: Meta = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.low_rank": 8,
    "hyper_connection.magnitude": 2.0,
}


def swa(pattern: str, n_layer: int = 6, window: int = 16) -> Meta:
    """Sliding windows by layer: s slides, f sees all; the pattern is repeated over the depth."""
    kinds = [pattern[il % len(pattern)] == "s" for il in range(n_layer)]
    return {"attention.sliding_window": window, "attention.sliding_window_pattern": kinds}


def per_layer(pattern: str, n_layer: int = 6, **values: Any) -> list[Any]:
    """A value by layer: each letter of the pattern names one of `values`; the pattern is repeated over the depth."""
    return [values[pattern[il % len(pattern)]] for il in range(n_layer)]


def heads(pattern: str, n_layer: int = 6) -> Meta:
    """K/V heads by layer: r is a recurrent layer, which has none, a an attention layer."""
    return {"attention.head_count_kv": per_layer(pattern, n_layer, r=0, a=2)}


_ROWS = [
    # a K/V cache of the usual kind, dense
    Row("llama", KV, {"rope.freq_base": 5e4}),
    Row("mistral3", KV, {"attention.temperature_scale": 0.1, "rope.scaling.original_context_length": 16}),
    Row("qwen", KV, MHA),
    Row("qwen2", KV),
    Row("qwen3", KV, {"rope.freq_base": 1e6}),
    Row("gemma", KV, gelu="gate"),
    Row("phi2", KV, MHA, gelu="up"),
    Row("phi3", KV),
    Row("gpt2", KV, MHA, gelu="up"),
    Row("gptneox", KV, {**MHA, "use_parallel_residual": True}, gelu="up"),
    Row("gptneox sequential", KV, {**MHA, "use_parallel_residual": False}, gelu="up"),
    Row("starcoder", KV, {"attention.head_count_kv": 1}, gelu="up"),
    Row("starcoder2", KV, gelu="up"),
    Row("stablelm", KV),
    Row("bloom", KV, MHA, gelu="up"),
    Row("falcon", KV, gelu="up"),
    Row("mpt", KV, {**MHA, "attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 4.0}, gelu="up"),
    Row("olmo", KV, {"attention.clamp_kqv": 4.0}),
    Row("olmo2", KV),
    Row("olmo2 sliding", SLIDING, swa("ssf")),
    Row("granite", KV, {"logit_scale": 4.0, "residual_scale": 0.5, "embedding_scale": 2.0, "attention.scale": 0.2}),
    Row("glm4", KV, {"rope.dimension_count": 8}),
    Row("smollm3", KV, window=(2, 6), n_layer=8),
    Row("command-r", KV, {"logit_scale": 0.5}),
    Row("exaone", KV),
    Row("exaone4", KV),
    Row("ernie4_5", KV),
    Row("hunyuan-dense", KV),
    Row("minicpm", KV, {"residual_scale": 0.5, "embedding_scale": 2.0, "logit_scale": 0.5}),
    Row("minicpm3", KV, {**MHA, "attention.q_lora_rank": 32, "attention.kv_lora_rank": 32,
                         "attention.key_length": 32, "attention.value_length": 16, "rope.dimension_count": 16},
        unrepeatable="the residual scale follows from the number of layers"),
    Row("internlm2", KV),
    Row("nemotron", KV),
    Row("seed_oss", KV),
    Row("apertus", KV, {f"xielu.{key}": value for key, value in
                        (("alpha_n", 0.8), ("alpha_p", 0.8), ("beta", 0.5), ("eps", 1e-6))}),
    Row("arcee", KV),
    Row("baichuan", KV),
    Row("orion", KV),
    Row("xverse", KV),
    Row("codeshell", KV, gelu="up"),
    Row("refact", KV),
    Row("jais", KV, {**MHA, "attention.max_alibi_bias": 8.0}),
    Row("jais2", KV),
    Row("plm", KV, {**MHA, "attention.kv_lora_rank": 32, "attention.key_length": 32,
                    "attention.value_length": 16, "rope.dimension_count": 16}),
    Row("plamo", KV),
    Row("bitnet", KV, drop=(r"\.input_scale$",)),
    Row("openelm", KV, {"attention.head_count": per_layer("ab", a=4, b=8), "attention.key_length": 16,
                        "attention.value_length": 16, "attention.head_count_kv": per_layer("ab", a=2, b=4),
                        "feed_forward_length": per_layer("ab", a=96, b=128)}),
    Row("chatglm", KV),
    Row("maincoder", KV),
    Row("pangu-embedded", KV),
    Row("paddleocr", KV, {**SECTIONS}),
    Row("qwen2vl", KV, {**SECTIONS}),
    Row("qwen3vl", KV, {**SECTIONS}),
    Row("hunyuan_vl", KV, {**SECTIONS}),
    Row("cogvlm", KV, MHA),
    Row("talkie", KV, {"logit_scale": 1.0}),
    Row("nanbeige", KV),
    Row("nanbeige twice", KV, {"block_count": 4, "num_loops": 2}, window=(5, 7), n_layer=8,
        unrepeatable="its two rounds share their layers"),
    Row("deci", KV, {"feed_forward_length": per_layer("abcaaa", a=96, b=0, c=64),
                     "attention.head_count_kv": per_layer("abcaaa", a=2, b=0, c=4),
                     "attention.head_count": per_layer("abaaca", a=4, b=0, c=4)}, window=(3, 5)),
    # K/V, mixture of experts
    Row("llama moe", KV, MOE),
    Row("qwen2moe", KV, SHARED),
    Row("qwen3moe", KV, MOE, seed=2),
    Row("qwen3vlmoe", KV, {**MOE, **SECTIONS}),
    Row("phimoe", KV, MOE),
    Row("olmoe", KV, {**MOE, **MHA}),
    Row("granitemoe", KV, {**MOE, "logit_scale": 4.0, "residual_scale": 0.5, "expert_shared_feed_forward_length": 32}),
    Row("deepseek", KV, {**SHARED, **MHA, "leading_dense_block_count": 1}),
    Row("glm4moe", KV, {**SHARED, **SIGMOID, "leading_dense_block_count": 1, "rope.dimension_count": 8}),
    Row("glm4moe nextn", KV, {**SHARED, **SIGMOID, "leading_dense_block_count": 1, "nextn_predict_layers": 1},
        n_layer=7),
    Row("ernie4_5-moe", KV, {**SHARED, "leading_dense_block_count": 1, "interleave_moe_layer_step": 1}),
    Row("hunyuan-moe", KV, SHARED),
    Row("dbrx", KV, {**MOE, "attention.clamp_kqv": 4.0}),
    Row("bailingmoe", KV, {**SHARED, "leading_dense_block_count": 1}),
    Row("bailingmoe2", KV, {**SHARED, **SIGMOID, "leading_dense_block_count": 1, "expert_count": 8,
                            "expert_group_count": 4, "expert_group_used_count": 2}),
    Row("dots1", KV, {**MHA, **SHARED, **SIGMOID, "leading_dense_block_count": 1}),
    Row("arctic", KV, MOE),
    Row("grok", KV, {**MOE, "embedding_scale": 1.0}, gelu="gate"),
    Row("grovemoe", KV, {**MOE, "expert_chunk_feed_forward_length": 16, "expert_group_scale": 0.5,
                         "experts_per_group": 2}),
    Row("minimax-m2", KV, {**MOE, "expert_gating_func": 2}),
    Row("hy_v3", KV, {**SHARED, **SIGMOID, "leading_dense_block_count": 1}),
    # K/V with sliding windows
    Row("gemma2", SLIDING, {**swa("sf"), "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        gelu="gate"),
    Row("gemma3", SLIDING, {**swa("sf"), "rope.freq_base": 1e6}, gelu="gate"),
    Row("gemma3n", SLIDING, swa("sf", 24), window=(20, 22), n_layer=24, gelu="gate", stores=False,
        factors={"attn_q_norm": 0.1, "post_": 0.3}),
    Row("gemma4", SLIDING, {**swa("sf"), "embedding_length_per_layer_input": 16, "attention.key_length_swa": 16,
                            "attention.value_length_swa": 16, "attention.key_length": 32,
                            "attention.value_length": 32, "rope.dimension_count": 32, "rope.dimension_count_swa": 16,
                            "final_logit_softcapping": 30.0}, gelu="gate"),
    Row("cohere2", SLIDING, {**swa("sf"), "logit_scale": 0.5}),
    Row("cohere2moe", SLIDING, {**swa("sf"), **SHARED, "logit_scale": 0.5, "leading_dense_block_count": 1}),
    Row("llama4", SLIDING, {**MOE, "interleave_moe_layer_step": 2, **swa("sssf", 10)}, window=(2, 6), n_layer=10),
    Row("gpt-oss", SLIDING, {**MOE, **swa("sf")}),
    Row("exaone-moe", SLIDING, {**swa("sf"), **SHARED, **SIGMOID, "leading_dense_block_count": 1}),
    Row("afmoe", SLIDING, {**swa("sssf", 10), **SHARED, **SIGMOID, "leading_dense_block_count": 1},
        window=(2, 6), n_layer=10),
    Row("smallthinker", KV, {**MOE, "expert_gating_func": 2}),
    Row("smallthinker sliding", SLIDING, {**MOE, "expert_gating_func": 2, **swa("sssf", 10)},
        window=(2, 6), n_layer=10),
    Row("mellum", SLIDING, {**MOE, **swa("sf")}),
    Row("laguna", SLIDING, {**SHARED, **swa("sf"), "leading_dense_block_count": 1}),
    Row("mimo2", SLIDING, {**MOE, **swa("sf")}),
    Row("step35", SLIDING, {**SHARED, **swa("sf")}),
    Row("plamo3", SLIDING, swa("sf")),
    Row("spark2_5", SLIDING, swa("sf"), gelu="gate"),
    Row("muse-glimmer", SLIDING, {**swa("sf"), "logit_scale": 1.0}),
    Row("granite_swa", SLIDING, {**swa("sf"), "logit_scale": 4.0, "residual_scale": 0.5}),
    Row("maple", SLIDING, {**MOE, **swa("sf"), "swiglu_clamp_exp": 7.0}),
    # a latent cache (MLA)
    Row("deepseek2", LATENT, {**MLA, **SHARED, "leading_dense_block_count": 1, "expert_weights_scale": 1.5}),
    Row("deepseek2 expanded", KV, {
        **MHA, **SHARED, "leading_dense_block_count": 1, "attention.q_lora_rank": 32, "attention.kv_lora_rank": 32,
        "attention.key_length": 32, "attention.value_length": 16, "rope.dimension_count": 16}),
    Row("deepseek2 nextn", LATENT, {**MLA, **SHARED, "leading_dense_block_count": 1, "nextn_predict_layers": 1},
        n_layer=7),
    Row("mistral4", LATENT, {**MLA, **SHARED, "leading_dense_block_count": 1}),
    Row("deepseek2-ocr", KV, {**SHARED, **MHA, "leading_dense_block_count": 1}),
    Row("deepseek32", LATENT, {**MLA, **SHARED, **SIGMOID, **INDEXER, "leading_dense_block_count": 1}),
    Row("glm-dsa", LATENT, {**MLA, **SHARED, **SIGMOID, **INDEXER, "leading_dense_block_count": 1,
                            "attention.indexer.types": per_layer("fs", f=1, s=0)}),
    Row("hy_v4", LATENT, {**MLA, **SHARED, **SIGMOID, **INDEXER, **HYPER, "leading_dense_block_count": 1,
                          "swiglu_clamp_exp": 10.0, "attention.indexer.types": per_layer("fs", f=1, s=0)}),
    Row("dots3note", LATENT_SLIDING, {
        **MLA, **SHARED, **SIGMOID, **INDEXER, **swa("fs"), "leading_dense_block_count": 1,
        "attention.kv_lora_rank_swa": 32, "attention.key_length_swa": 48, "attention.value_length_swa": 32,
        "attention.key_length_mla_swa": 32, "attention.value_length_mla_swa": 16, "rope.freq_base_swa": 1e4,
        "attention.indexer.types": per_layer("fs", f=1, s=0)}),
    # other caches
    Row("minimax-m3", KV, {**SHARED, **SIGMOID, **INDEXER, "leading_dense_block_count": 1,
                           "attention.indexer.head_count": 2}),
    Row("minimax-m3 sparse", KV, {**SHARED, **SIGMOID, **INDEXER, "leading_dense_block_count": 1,
                                  "attention.indexer.head_count": 2, "attention.indexer.top_k": 3}, flash_attn=True,
        factors={"attn_output": 0.1}),  # flash attention rounds K and V to float16, in other batches in other places
    Row("hrm_text", KV, {"hrm.layers_per_stack": 3, "hrm.h_cycles": 1, "hrm.l_cycles": 2}, window=(4, 6), n_layer=9,
        unrepeatable="its stacks share their layers"),
    Row("graniteswitch", KV, {"logit_scale": 4.0, "residual_scale": 0.5, "adapters.count": 2, "adapters.lora_rank": 8,
                              "adapters.token_ids_activate": [257, 258],
                              "adapters.token_ids_substitute": [32, 32]}),
    Row("qwen3tts", KV, SECTIONS, drop=(*SCALES, r"^output\.")),
    Row("pockettts", KV, MHA, gelu="up"),
    Row("gemma4 shared", SLIDING, {**swa("sf", 8), "embedding_length_per_layer_input": 16,
                                   "attention.shared_kv_layers": 4, "attention.key_length_swa": 16,
                                   "attention.value_length_swa": 16}, window=(5, 7), n_layer=8,
        stores=False, gelu="gate"),
    Row("gemma4 moe", SLIDING, {**swa("sf"), **MOE, "embedding_length_per_layer_input": 0,
                                "attention.key_length_swa": 16, "attention.value_length_swa": 16}, gelu="gate"),
    # recurrent layers beside attention
    Row("qwen3next", HYBRID, {**SHARED, **DELTA}, window=(2, 6), n_layer=8),
    Row("qwen35", HYBRID, {**DELTA, **SECTIONS}, window=(2, 6), n_layer=8),
    Row("qwen35 nextn", HYBRID, {**DELTA, **SECTIONS, "nextn_predict_layers": 1}, window=(2, 6), n_layer=9),
    Row("qwen3next nextn", HYBRID, {**SHARED, **DELTA, "nextn_predict_layers": 1}, window=(2, 6), n_layer=9),
    Row("qwen35moe", HYBRID, {**SHARED, **DELTA, **SECTIONS}, window=(2, 6), n_layer=8),
    Row("lfm2", HYBRID, {**heads("rra", 8), "shortconv.l_cache": 3}, window=(2, 5), n_layer=8),
    Row("lfm2moe", HYBRID, {**heads("rra", 8), **MOE, "shortconv.l_cache": 3, "leading_dense_block_count": 1,
                            "expert_gating_func": 2}, window=(2, 5), n_layer=8),
    Row("falcon-h1", HYBRID, {**SSM2, "ssm.time_step_rank": 8}),
    Row("jamba", HYBRID, {**heads("ra"), **SSM}),
    Row("granitehybrid", HYBRID, {**heads("ra"), **SSM2, "logit_scale": 4.0, "residual_scale": 0.5}),
    Row("nemotron_h", HYBRID, {**SSM2, "attention.head_count_kv": per_layer("rfaf", 10, r=0, a=2, f=0),
                               "feed_forward_length": per_layer("rfaf", 10, r=0, a=0, f=96)},
        window=(2, 6), n_layer=10),
    Row("plamo2", HYBRID, {**heads("ra"), **SSM, "ssm.group_count": 0}),
    Row("nemotron_h_moe", HYBRID, {
        **SSM2, **SHARED, **SIGMOID, "attention.head_count_kv": per_layer("rfaf", 10, r=0, a=2, f=0),
        "feed_forward_length": per_layer("rfaf", 10, r=0, a=0, f=96)}, window=(2, 6), n_layer=10),
    Row("minimax-01", HYBRID, {**MOE, "residual_scale": 3.5, "full_attention_interval": 4}, window=(2, 6), n_layer=8,
        unrepeatable="the decay of a linear layer follows from its number"),
    # windows without the recurrent layers of their model
    Row("qwen3next attention", BESIDE, {**SHARED, **DELTA,
                                        "attention.recurrent_layers": per_layer("rraarr", r=1, a=0)}),
    Row("jamba attention", BESIDE, {**heads("rraarr"), **SSM}),
    Row("lfm2 attention", BESIDE, {**heads("rraarr"), "shortconv.l_cache": 3}),
    Row("lfm2 sliding", BESIDE, {**heads("rraarr"), "shortconv.l_cache": 3, "attention.sliding_window": 16}),
    Row("kimi-linear", BESIDE, {**MLA, **KDA, **SHARED, "leading_dense_block_count": 1, "expert_gating_func": 2,
                                "attention.head_count_kv": per_layer("rraarr", r=0, a=1)}),
    Row("bailingmoe3", BESIDE, {**MLA, **KDA, **SHARED, **SIGMOID, "leading_dense_block_count": 1,
                                "attention.head_count_kv": per_layer("rraarr", r=0, a=1)}),
    Row("kimi-k3", BESIDE, {**MLA, **KDA, **SHARED, **SIGMOID, "leading_dense_block_count": 1,
                            "attention.head_count_kv": per_layer("rraarr", r=0, a=1), "attn_res.block_size": 12,
                            "activation.situ_beta": 4.0, "activation.situ_linear_beta": 25.0}),
    # recurrent layers only
    Row("mamba", RECURRENT, {**SSM, "attention.head_count": 0, "attention.head_count_kv": 0}),
    Row("mamba2", RECURRENT, {**SSM2, "attention.head_count": 0, "attention.head_count_kv": 0}),
    Row("rwkv6", RECURRENT, RWKV6),
    Row("rwkv6qwen2", RECURRENT, {**RWKV6, "token_shift_count": 1}, drop=(*SCALES, "time_mix_first")),
    Row("rwkv7", RECURRENT, RWKV7),
    Row("arwkv7", RECURRENT, {**RWKV7, "token_shift_count": 1}),
    # no cache: every call sees only its own batch
    Row("llada", NONE),
    Row("llada-moe", NONE, MOE),
    Row("dream", NONE),
    Row("rnd1", NONE, MOE),
]  # fmt: skip
ROWS = {row.name: row for row in _ROWS}
