"""Attention of the families the reference knows, in float64: rotary positions, grouped and latent heads.

An attention is used as `attention.mix(h, pos, kv, visible)`: normed states h (n_tokens, n_embd) at positions pos attend
to `kv`, whose rows a mask (n_tokens, n_kv) shows or hides. `attention.kv(h, pos)` is what these positions store. K and
V are what llama.cpp stores: after biases, norms and RoPE.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear, scaled_dot_product_attention, sigmoid

from ggufloop.errors import GgufloopError
from reference.gguf_file import GGUFFile


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

    Pairs are neighbours (2i, 2i+1) in llama, deepseek2 and granitehybrid, and (i, i + n_rot/2) in the others. qwen35
    has positions in several sections (of time, height, width); those of text are all the same.
    """

    def __init__(self, file: GGUFFile, n_rot: int, sliding: bool) -> None:
        self.n_rot = n_rot
        self._at: Tensor | None = None
        self.neighbours = file.arch in ("llama", "deepseek2", "granitehybrid")
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
    """Query heads that share key and value heads, with the biases and head norms the file has.

    olmoe norms all heads of a position together. qwen35 computes two values for each of a query: the query and a gate
    that its result is multiplied with, after a sigmoid.
    """

    def __init__(self, file: GGUFFile, il: int, eps: float, sliding: bool) -> None:
        blk = f"blk.{il}.attn_"
        self.eps = eps
        self.n_head, n_embd = file.get("attention.head_count"), file.get("embedding_length")
        n_head_kv = file.get("attention.head_count_kv", self.n_head)
        self.n_head_kv: int = n_head_kv[il] if isinstance(n_head_kv, list) else n_head_kv
        head = file.get("attention.key_length", n_embd // self.n_head)
        placed = file.arch != "granitehybrid" or file.get("rope.scaling.finetuned", True)
        self.rope = Rope(file, file.get("rope.dimension_count", head) if placed else 0, sliding)
        self.weight = {name: file.weight(f"{blk}{name}.weight") for name in ("q", "k", "v", "output")}
        self.bias = {name: file.optional(f"{blk}{name}.bias") for name in self.weight}
        self.norm = {name: file.optional(f"{blk}{name}_norm.weight") for name in ("q", "k")}
        self.gated = file.arch == "qwen35"
        self.scale = file.get("attention.scale", 0.0) or 1 / math.sqrt(head)
        if file.arch == "gemma3" and file.get("block_count") == 62:  # the 27B model alone scales otherwise
            self.scale = 1 / math.sqrt(n_embd // self.n_head)

    def _heads(self, name: str, x: Tensor, n: int) -> Tensor:
        return linear(x, self.weight[name], self.bias[name]).reshape(len(x), n, -1)

    def _placed(self, name: str, heads: Tensor, pos: Tensor) -> Tensor:
        norm = self.norm[name]
        if norm is not None:
            whole = heads.flatten(1) if len(norm) != heads.shape[-1] else heads
            heads = rms_norm(whole, norm, self.eps).reshape(heads.shape)
        return self.rope(heads, pos)

    def kv(self, x: Tensor, pos: Tensor) -> KV:
        """What positions with normed states x store."""
        return KV(self._placed("k", self._heads("k", x, self.n_head_kv), pos), self._heads("v", x, self.n_head_kv))

    def mix(self, x: Tensor, pos: Tensor, kv: KV, visible: Tensor) -> Tensor:
        """Attention output (n_tokens, n_embd) of normed states x."""
        q, gate = self._heads("q", x, self.n_head), None
        if self.gated:
            q, gate = q.chunk(2, -1)
        out = attend(self._placed("q", q, pos), kv, self.scale, visible)
        if gate is not None:
            out = out * sigmoid(gate)
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
