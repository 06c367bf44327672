"""One transformer layer of the llama, qwen2, qwen3, gemma3 and deepseek2 families, dense or MoE, in float64.

A layer is run as `layer.run(x, pos, past, own)`: hidden states x (n_tokens, n_embd) at positions pos, attending to
the K/V `past` and to `own`, the K/V of these positions; own=None computes it from x. Both come back, so whoever
owns the cache decides what is stored. K and V are what llama.cpp stores: after biases, norms and RoPE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, sigmoid, silu, softmax

from ggufloop.errors import GgufloopError
from ggufloop.reference.gguf_file import GGUFFile

FAMILIES = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma3", "deepseek2")

_SIGMOID = 2  # value of expert_gating_func; softmax is 1, and 0 where the file does not say
_LEAST_WEIGHT_SUM = 6.103515625e-5  # smallest normal float16: a sum of expert weights is not divided by less


class KV(NamedTuple):
    """Keys and values of some positions: (n_tokens, n_head_kv, head size), each its own."""

    k: Tensor
    v: Tensor

    def then(self, other: KV) -> KV:
        """These positions followed by others."""
        return KV(torch.cat([self.k, other.k]), torch.cat([self.v, other.v]))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return functional.rms_norm(x, weight.shape, weight, eps)


class Rope:
    """Rotary position embedding of the first n_rot values of a head, with linear or YaRN scaling.

    Pairs are neighbours (2i, 2i+1) in llama and deepseek2, and (i, i + n_rot/2) in the others.
    """

    def __init__(self, file: GGUFFile, n_rot: int, sliding: bool) -> None:
        self.n_rot = n_rot
        self._at: Tensor | None = None
        self.neighbours = file.arch in ("llama", "deepseek2")
        kind = file.get("rope.scaling.type", "linear")
        if kind not in ("linear", "yarn", "none"):
            raise GgufloopError(f"rope scaling {kind} is not known to the reference.", "known: linear, yarn, none.")
        base = file.get("rope.freq_base_swa", 10000.0) if sliding else file.get("rope.freq_base", 10000.0)
        factor = 1.0 if kind == "none" else file.get("rope.scaling.factor", 0.0) or 1.0
        i = torch.arange(n_rot // 2, dtype=torch.float64)
        exact = base ** (-2 * i / n_rot)
        if (factors := file.optional("rope_freqs.weight")) is not None:
            exact = exact / factors
        self.freq = exact if sliding else exact / factor
        self.magnitude = file.get("rope.scaling.attn_factor", 1.0)
        if kind != "yarn":
            return
        # YaRN: fast pairs keep their frequency, slow ones are interpolated, and those between are mixed.
        n_orig = file.get("rope.scaling.original_context_length", 0) or file.get("context_length")
        low, high = (n_rot * math.log(n_orig / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
        low, high = max(0, math.floor(low)), min(n_rot - 1, math.ceil(high))
        keep = 1 - ((i - low) / max(0.001, high - low)).clamp(0, 1)
        self.freq = self.freq * (1 - keep) + exact * keep
        if not (file.arch == "deepseek2" and file.get("rope.scaling.yarn_log_multiplier", 0.0)):
            self.magnitude *= 1 + 0.1 * math.log(factor)

    def _turns(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        if pos is not self._at:  # queries, keys and every pass of a step ask for the same positions
            angle = (pos.double()[:, None] * self.freq)[:, None, :]
            self._at, self._cos_sin = pos, (angle.cos() * self.magnitude, angle.sin() * self.magnitude)
        return self._cos_sin

    def __call__(self, x: Tensor, pos: Tensor) -> Tensor:
        """Rotate x (n_tokens, n_head, head size)."""
        cos, sin = self._turns(pos)
        rotated, rest = x[..., : self.n_rot], x[..., self.n_rot :]
        if self.neighbours:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
            out = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        else:
            a, b = rotated.chunk(2, -1)
            out = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        return torch.cat([out, rest], -1)


def attend(q: Tensor, kv: KV, scale: float, visible: Tensor) -> Tensor:
    """Softmax attention of q (n_tokens, n_head, d) to kv, heads in groups; visible (n_tokens, n_kv) is the mask."""
    q, k, v = (x.transpose(0, 1) for x in (q, kv.k, kv.v))
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True).transpose(0, 1)


class GroupedAttention:
    """Query heads that share key and value heads, with the biases and head norms the file has."""

    def __init__(self, file: GGUFFile, il: int, eps: float, sliding: bool) -> None:
        blk = f"blk.{il}.attn_"
        self.eps = eps
        self.n_head, n_embd = file.get("attention.head_count"), file.get("embedding_length")
        self.n_head_kv = file.get("attention.head_count_kv", self.n_head)
        head = file.get("attention.key_length", n_embd // self.n_head)
        self.rope = Rope(file, file.get("rope.dimension_count", head), sliding)
        self.weight = {name: file.weight(f"{blk}{name}.weight") for name in ("q", "k", "v", "output")}
        self.bias = {name: file.optional(f"{blk}{name}.bias") for name in self.weight}
        self.norm = {name: file.optional(f"{blk}{name}_norm.weight") for name in ("q", "k")}
        self.scale = 1 / math.sqrt(head)
        if file.arch == "gemma3" and file.get("block_count") == 62:  # the 27B model alone scales otherwise
            self.scale = 1 / math.sqrt(n_embd // self.n_head)

    def _heads(self, name: str, x: Tensor, n: int) -> Tensor:
        return linear(x, self.weight[name], self.bias[name]).reshape(len(x), n, -1)

    def _placed(self, name: str, x: Tensor, n: int, pos: Tensor) -> Tensor:
        heads, norm = self._heads(name, x, n), self.norm[name]
        return self.rope(heads if norm is None else rms_norm(heads, norm, self.eps), pos)

    def kv(self, x: Tensor, pos: Tensor) -> KV:
        """What positions with normed states x store."""
        return KV(self._placed("k", x, self.n_head_kv, pos), self._heads("v", x, self.n_head_kv))

    def mix(self, x: Tensor, pos: Tensor, kv: KV, visible: Tensor) -> Tensor:
        """Attention output (n_tokens, n_embd) of normed states x."""
        q = self._placed("q", x, self.n_head, pos)
        out = attend(q, kv, self.scale, visible)
        return linear(out.flatten(-2), self.weight["output"], self.bias["output"])


class LatentAttention:
    """Multi-head latent attention: one cached row per position, a normed latent and a roped key shared by all heads.

    K is the whole row, V its latent part; llama.cpp stores the row once (its K-only cache).
    """

    def __init__(self, file: GGUFFile, il: int, eps: float) -> None:
        blk = f"blk.{il}.attn_"
        self.eps = eps
        self.n_head = file.get("attention.head_count")
        self.rank = file.get("attention.kv_lora_rank")
        head = file.get("attention.key_length_mla")
        self.nope = head - file.get("rope.dimension_count")
        self.rope = Rope(file, head - self.nope, sliding=False)
        names = ["kv_a_mqa", "kv_a_norm", "k_b", "v_b", "output"]
        names += ["q"] if file.has(f"{blk}q.weight") else ["q_a", "q_a_norm", "q_b"]
        self.w = {name: file.weight(f"{blk}{name}.weight") for name in names}
        self.scale = 1 / math.sqrt(head)
        if file.get("rope.scaling.type", "linear") == "yarn":
            log_mul = file.get("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
            factor = file.get("rope.scaling.factor")
            self.scale *= (self.rope.magnitude * (1 + 0.1 * log_mul * math.log(factor))) ** 2

    def kv(self, x: Tensor, pos: Tensor) -> KV:
        """What positions with normed states x store."""
        latent, key = linear(x, self.w["kv_a_mqa"]).tensor_split([self.rank], -1)
        latent = rms_norm(latent, self.w["kv_a_norm"], self.eps)[:, None]
        return KV(torch.cat([latent, self.rope(key[:, None], pos)], -1), latent)

    def mix(self, x: Tensor, pos: Tensor, kv: KV, visible: Tensor) -> Tensor:
        """Attention output (n_tokens, n_embd) of normed states x."""
        if "q" in self.w:
            q = linear(x, self.w["q"])
        else:
            q = linear(rms_norm(linear(x, self.w["q_a"]), self.w["q_a_norm"], self.eps), self.w["q_b"])
        plain, roped = q.reshape(len(x), self.n_head, -1).tensor_split([self.nope], -1)
        latent = torch.einsum("thn,hrn->thr", plain, self.w["k_b"])
        out = attend(torch.cat([latent, self.rope(roped, pos)], -1), kv, self.scale, visible)
        out = torch.einsum("thr,hvr->thv", out, self.w["v_b"])
        return linear(out.flatten(-2), self.w["output"])


class Gated:
    """down(act(gate x) * up x); act is SiLU, in gemma3 the tanh form of GELU (a float16 table on llama.cpp's CPU)."""

    def __init__(self, file: GGUFFile, il: int, suffix: str = "") -> None:
        self.gate, self.up, self.down = (
            file.weight(f"blk.{il}.ffn_{name}{suffix}.weight") for name in ("gate", "up", "down")
        )
        self.gelu = file.arch == "gemma3"

    def __call__(self, x: Tensor) -> Tensor:
        gate = linear(x, self.gate)
        gate = gelu(gate, approximate="tanh") if self.gelu else silu(gate)
        return linear(gate * linear(x, self.up), self.down)


class MoE:
    """The best experts_used experts of each token, weighted by the router, and the shared expert where there is one.

    `margin`: the smallest distance seen between a score that was chosen and one that was not. float32 arithmetic may
    choose otherwise when it is tiny, so tests look at it.
    """

    def __init__(self, file: GGUFFile, il: int) -> None:
        blk = f"blk.{il}."
        self.margin = math.inf
        self.router = file.weight(f"{blk}ffn_gate_inp.weight")
        gate, up, down = (file.weight(f"{blk}ffn_{name}_exps.weight") for name in ("gate", "up", "down"))
        self.n_ff = gate.shape[1]
        self.gate, self.up = gate.flatten(0, 1), up.flatten(0, 1)  # the experts side by side, as one wide layer
        self.down = down.transpose(0, 1).flatten(1)
        self.bias = file.optional(f"{blk}exp_probs_b.bias")
        self.shared = Gated(file, il, "_shexp") if file.has(f"{blk}ffn_up_shexp.weight") else None
        self.shared_gate = file.optional(f"{blk}ffn_gate_inp_shexp.weight")
        self.used = file.get("expert_used_count")
        self.groups, self.groups_used = file.get("expert_group_count", 0), file.get("expert_group_used_count", 0)
        self.sigmoid, self.normed, self.scale = False, file.arch != "qwen2moe", 1.0
        if file.arch == "deepseek2":
            self.sigmoid = file.get("expert_gating_func", 0) == _SIGMOID
            self.normed = file.get("expert_weights_norm", False)
            self.scale = file.get("expert_weights_scale", 0.0) or 1.0

    def _top(self, score: Tensor, n: int) -> Tensor:
        best = score.topk(min(n + 1, score.shape[-1]), -1)
        if best.values.shape[-1] > n:
            self.margin = min(self.margin, float((best.values[..., n - 1] - best.values[..., n]).min()))
        return best.indices[..., :n]

    def _choose(self, prob: Tensor) -> Tensor:
        score = prob if self.bias is None else prob + self.bias
        if self.groups > 1:  # experts outside the groups with the best two-expert sums are out
            grouped = score.reshape(len(score), self.groups, -1)
            kept = self._top(grouped.topk(2, -1).values.sum(-1), self.groups_used)
            out = torch.ones(grouped.shape[:-1], dtype=torch.bool).scatter(-1, kept, False)
            score = grouped.masked_fill(out[..., None], -math.inf).flatten(-2)
        return self._top(score, self.used)

    def __call__(self, x: Tensor) -> Tensor:
        logits = linear(x, self.router)
        prob = sigmoid(logits) if self.sigmoid else softmax(logits, -1)
        chosen = self._choose(prob)
        weight = prob.gather(-1, chosen)
        if self.normed:
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=_LEAST_WEIGHT_SUM)
        by_expert = torch.zeros_like(prob).scatter(-1, chosen, weight * self.scale)  # 0 for those not chosen
        hidden = silu(linear(x, self.gate)) * linear(x, self.up)
        y = linear(hidden * by_expert.repeat_interleave(self.n_ff, -1), self.down)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else shared * sigmoid(x @ self.shared_gate)[:, None])
        return y


@dataclass(frozen=True)
class Layer:
    """One layer; `sliding` is the number of positions it sees, itself included, or None for all."""

    attention: GroupedAttention | LatentAttention
    ffn: Gated | MoE
    norms: dict[str, Tensor]
    eps: float
    sliding: int | None

    def run(self, x: Tensor, pos: Tensor, past: KV | None, own: KV | None) -> tuple[Tensor, KV]:
        """State after the layer and K/V of these positions; past: K/V of those before, None if there are none."""
        h = rms_norm(x, self.norms["attn_norm"], self.eps)
        if own is None:
            own = self.attention.kv(h, pos)
        kv = own if past is None else past.then(own)
        distance = pos[:, None] - torch.arange(len(kv.k))
        visible = distance >= 0
        if self.sliding is not None:
            visible &= distance < self.sliding
        x = x + self._post("post_attention_norm", self.attention.mix(h, pos, kv, visible))
        return x + self._post("post_ffw_norm", self.ffn(rms_norm(x, self.norms["ffn_norm"], self.eps))), own

    def _post(self, name: str, y: Tensor) -> Tensor:
        return rms_norm(y, self.norms[name], self.eps) if name in self.norms else y


def slides(file: GGUFFile, il: int) -> bool:
    """Whether a gemma3 layer sees only the sliding window: five of six do, unless the file says otherwise."""
    if file.arch != "gemma3" or not file.get("attention.sliding_window", 0):
        return False
    pattern = file.get("attention.sliding_window_pattern", 6)
    return bool(pattern[il]) if isinstance(pattern, list) else pattern == 0 or il % pattern < pattern - 1


def load_layer(file: GGUFFile, il: int) -> Layer:
    """Layer `il` of the file. Raises GgufloopError for a missing tensor or key."""
    blk, sliding = f"blk.{il}.", slides(file, il)
    eps = file.get("attention.layer_norm_rms_epsilon")
    names = ("attn_norm", "ffn_norm", *(("post_attention_norm", "post_ffw_norm") if file.arch == "gemma3" else ()))
    latent = file.arch == "deepseek2"
    return Layer(
        LatentAttention(file, il, eps) if latent else GroupedAttention(file, il, eps, sliding),
        MoE(file, il) if file.has(f"{blk}ffn_gate_inp.weight") else Gated(file, il),
        {name: file.weight(f"{blk}{name}.weight") for name in names},
        eps,
        file.get("attention.sliding_window") if sliding else None,
    )
