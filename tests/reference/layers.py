"""One transformer layer of the families the reference knows, dense or MoE, in float64.

A layer is run as `layer.run(x, pos, past, given)`: hidden states x (n_tokens, n_embd) at positions pos, after `past`,
what the layer stores of earlier positions (K and V, or a recurrent state). What comes back holds the state after the
layer, what it would store, and which experts it took; whoever owns the cache decides what is stored, and may give a
later pass what the first one computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, sigmoid, silu, softmax

from reference.attention import KV, GroupedAttention, LatentAttention, rms_norm
from reference.gguf_file import GGUFFile
from reference.recurrent import DeltaNet, Mamba2, State

RECURRENT: dict[str, type[DeltaNet] | type[Mamba2]] = {"qwen35": DeltaNet, "granitehybrid": Mamba2}
"""Families some of whose layers are recurrent, and what those layers are."""

FAMILIES = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "olmoe", "gemma3", "deepseek2", *RECURRENT)

_SIGMOID = 2  # value of expert_gating_func; softmax is 1, and 0 where the file does not say
_LEAST_WEIGHT_SUM = 6.103515625e-5  # smallest normal float16: a sum of expert weights is not divided by less


class Gated:
    """down(act(gate x) * up x); act is SiLU, in gemma3 the tanh form of GELU (a float16 table on llama.cpp's CPU)."""

    def __init__(self, file: GGUFFile, il: int, suffix: str = "") -> None:
        self.gate, self.up, self.down = (
            file.weight(f"blk.{il}.ffn_{name}{suffix}.weight") for name in ("gate", "up", "down")
        )
        self.gelu = file.arch == "gemma3"

    def __call__(self, x: Tensor) -> Tensor:
        """(n_tokens, n_embd) of normed states x."""
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
        self.sigmoid, self.normed, self.scale = False, file.arch not in ("qwen2moe", "olmoe"), 1.0
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

    def route(self, x: Tensor) -> Tensor:
        """The weight of every expert (n_tokens, n_expert) for normed states x; 0 for those not chosen."""
        logits = linear(x, self.router)
        prob = sigmoid(logits) if self.sigmoid else softmax(logits, -1)
        chosen = self._choose(prob)
        weight = prob.gather(-1, chosen)
        if self.normed:
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=_LEAST_WEIGHT_SUM)
        return torch.zeros_like(prob).scatter(-1, chosen, weight * self.scale)

    def __call__(self, x: Tensor, routed: Tensor) -> Tensor:
        """(n_tokens, n_embd) of normed states x, by the experts and weights `route` gave."""
        hidden = silu(linear(x, self.gate)) * linear(x, self.up)
        y = linear(hidden * routed.repeat_interleave(self.n_ff, -1), self.down)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else shared * sigmoid(x @ self.shared_gate)[:, None])
        return y


@dataclass(frozen=True)
class Given:
    """What a pass is given by the layer's first one, and how far it sees.

    own     K/V of the batch's positions; None: those of its own states.
    routed  weights of the experts; None: the router decides anew.
    attention, sinks  keys at the last `attention` positions (None: all) and the first `sinks` are visible.
    """

    own: KV | None = None
    routed: Tensor | None = None
    attention: int | None = None
    sinks: int = 0


NOTHING = Given()


class Done(NamedTuple):
    """A layer's run: the state after it, what it would store, and its experts' weights (None in a dense layer)."""

    x: Tensor
    own: KV | State
    routed: Tensor | None


@dataclass(frozen=True)
class Layer:
    """One layer; `sliding` is the number of positions it sees, itself included, or None for all.

    `residual` scales what attention and feed-forward add to the state.
    """

    mixer: GroupedAttention | LatentAttention | DeltaNet | Mamba2
    ffn: Gated | MoE
    norms: dict[str, Tensor]
    eps: float
    sliding: int | None
    residual: float

    @property
    def recurrent(self) -> bool:
        """Whether the layer stores one state instead of K and V of every position."""
        return isinstance(self.mixer, (DeltaNet, Mamba2))

    def run(self, x: Tensor, pos: Tensor, past: KV | State | None, given: Given = NOTHING) -> Done:
        """Run states x at positions pos; past: what is stored of those before, None if there are none."""
        h = rms_norm(x, self.norms["attn_norm"], self.eps)
        own: KV | State
        if isinstance(self.mixer, (DeltaNet, Mamba2)):
            assert past is None or isinstance(past, State)
            mixed, own = self.mixer.run(h, past)
        else:
            assert past is None or isinstance(past, KV)
            own = self.mixer.kv(h, pos) if given.own is None else given.own
            kv = own if past is None else past.then(own)
            mixed = self.mixer.mix(h, pos, kv, self._visible(pos, len(kv.k), given))
        x = x + self.residual * self._post("post_attention_norm", mixed)
        h, routed = rms_norm(x, self.norms["ffn_norm"], self.eps), given.routed
        if isinstance(self.ffn, MoE):
            routed = self.ffn.route(h) if routed is None else routed
            y = self.ffn(h, routed)
        else:
            y = self.ffn(h)
        return Done(x + self.residual * self._post("post_ffw_norm", y), own, routed)

    def _visible(self, pos: Tensor, n_kv: int, given: Given) -> Tensor:
        key = torch.arange(n_kv)
        distance = pos[:, None] - key
        visible = distance >= 0
        if self.sliding is not None:
            visible &= distance < self.sliding
        if given.attention is not None:
            visible &= (distance < given.attention) | (key < given.sinks)
        return visible

    def _post(self, name: str, y: Tensor) -> Tensor:
        return rms_norm(y, self.norms[name], self.eps) if name in self.norms else y


def slides(file: GGUFFile, il: int) -> bool:
    """Whether a gemma3 layer sees only the sliding window: five of six do, unless the file says otherwise."""
    if file.arch != "gemma3" or not file.get("attention.sliding_window", 0):
        return False
    pattern = file.get("attention.sliding_window_pattern", 6)
    return bool(pattern[il]) if isinstance(pattern, list) else pattern == 0 or il % pattern < pattern - 1


def recurs(file: GGUFFile, il: int) -> bool:
    """Whether the layer is recurrent: in granitehybrid those without K/V heads, in qwen35 by a list or a period."""
    if file.arch == "granitehybrid":
        return bool(file.get("attention.head_count_kv")[il] == 0)
    if file.arch != "qwen35":
        return False
    if (listed := file.get("attention.recurrent_layers", None)) is not None:
        return bool(listed[il])
    return bool((il + 1) % file.get("full_attention_interval", 4) != 0)


def load_layer(file: GGUFFile, il: int) -> Layer:
    """Layer `il` of the file. Raises GgufloopError for a missing tensor or key."""
    blk, sliding = f"blk.{il}.", slides(file, il)
    eps = file.get("attention.layer_norm_rms_epsilon")
    names = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}
    if file.arch == "gemma3":
        names |= {name: name for name in ("post_attention_norm", "post_ffw_norm")}
    if file.arch == "qwen35":
        names["ffn_norm"] = "post_attention_norm"  # what the file calls the norm before its feed-forward
    mixer: GroupedAttention | LatentAttention | DeltaNet | Mamba2
    if recurs(file, il):
        mixer = RECURRENT[file.arch](file, il, eps)
    elif file.arch == "deepseek2":
        mixer = LatentAttention(file, il, eps)
    else:
        mixer = GroupedAttention(file, il, eps, sliding)
    return Layer(
        mixer,
        MoE(file, il) if file.has(f"{blk}ffn_gate_inp.weight") else Gated(file, il),
        {name: file.weight(f"{blk}{tensor}.weight") for name, tensor in names.items()},
        eps,
        file.get("attention.sliding_window") if sliding else None,
        (file.get("residual_scale", 0.0) or 1.0) if file.arch == "granitehybrid" else 1.0,
    )
