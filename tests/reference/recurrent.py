"""Recurrent layers in float64: the gated delta net of qwen35 and the Mamba-2 mixer of granitehybrid.

A mixer is run as `mixer.run(h, past)`: normed states h (n_tokens, n_embd) after `past`, the state that earlier
positions left (None: there are none). Back come its output and the state after the last position. Both are the
recurrences as they are defined, one position after the other, not the chunked forms that compute the same faster.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, sigmoid, silu, softplus

from reference.attention import rms_norm
from reference.gguf_file import GGUFFile


class State(NamedTuple):
    """What a recurrent layer keeps of all positions so far.

    conv: (width - 1, n_channels), the last inputs of its convolution.
    s: (n_head, n_in, n_out) of a delta net, (n_head, head size, n_state) of Mamba-2.
    """

    conv: Tensor
    s: Tensor

    def then(self, other: State) -> State:
        """The state after these positions and others: the later one, which began with this."""
        return other


class Convolution:
    """A causal convolution of each channel by itself, over the position and the width - 1 before it."""

    def __init__(self, file: GGUFFile, il: int) -> None:
        self.weight = file.weight(f"blk.{il}.ssm_conv1d.weight")  # (n_channels, width)
        self.bias = file.optional(f"blk.{il}.ssm_conv1d.bias")

    def blank(self) -> Tensor:
        """The inputs before the first position: zeros."""
        channels, width = self.weight.shape
        return torch.zeros(width - 1, channels, dtype=torch.float64)

    def __call__(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """SiLU of the convolved x (n_tokens, n_channels), and the inputs that the next position needs."""
        inputs = torch.cat([before, x])
        out = torch.zeros_like(x)
        for j, weight in enumerate(self.weight.T):
            out = out + weight * inputs[j : j + len(x)]
        if self.bias is not None:
            out = out + self.bias
        return silu(out), inputs[len(inputs) - len(before) :]


class DeltaNet:
    """Gated delta net: a matrix per head that forgets by a gate and then learns to answer each key with its value.

        S <- decay S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q / sqrt(d)

    q and k have length one. Head h of the values uses head h mod n of the n heads of keys and queries.
    """

    def __init__(self, file: GGUFFile, il: int, eps: float) -> None:
        blk = f"blk.{il}."
        self.eps = eps
        self.size = file.get("ssm.state_size")
        self.n_key, self.n_value = file.get("ssm.group_count"), file.get("ssm.time_step_rank")
        self.conv = Convolution(file, il)
        self.qkv, self.gate = file.weight(f"{blk}attn_qkv.weight"), file.weight(f"{blk}attn_gate.weight")
        self.alpha, self.beta = file.weight(f"{blk}ssm_alpha.weight"), file.weight(f"{blk}ssm_beta.weight")
        self.a, self.dt = file.weight(f"{blk}ssm_a"), file.weight(f"{blk}ssm_dt.bias")
        self.norm, self.out = file.weight(f"{blk}ssm_norm.weight"), file.weight(f"{blk}ssm_out.weight")

    def _keys(self, x: Tensor) -> Tensor:
        heads = x.reshape(len(x), self.n_key, self.size)
        heads = heads / (heads.square().sum(-1, keepdim=True) + self.eps).sqrt()
        return heads.repeat(1, self.n_value // self.n_key, 1)

    def run(self, x: Tensor, past: State | None) -> tuple[Tensor, State]:
        """Output (n_tokens, n_embd) of normed states x, and the state after them."""
        before = self.conv.blank() if past is None else past.conv
        mixed, conv = self.conv(linear(x, self.qkv), before)
        q, k, v = mixed.tensor_split([self.n_key * self.size, 2 * self.n_key * self.size], -1)
        q, k, v = self._keys(q), self._keys(k), v.reshape(len(x), self.n_value, -1)
        beta = sigmoid(linear(x, self.beta))
        decay = (softplus(linear(x, self.alpha) + self.dt) * self.a).exp()
        s = torch.zeros(self.n_value, self.size, v.shape[-1], dtype=torch.float64) if past is None else past.s
        outs = []
        for t in range(len(x)):
            s = decay[t, :, None, None] * s
            missing = v[t] - torch.einsum("hio,hi->ho", s, k[t])
            s = s + torch.einsum("hi,ho->hio", k[t], beta[t, :, None] * missing)
            outs.append(torch.einsum("hio,hi->ho", s, q[t]) / math.sqrt(self.size))
        gate = silu(linear(x, self.gate)).reshape(v.shape)
        out = rms_norm(torch.stack(outs), self.norm, self.eps) * gate
        return linear(out.flatten(1), self.out), State(conv, s)


class Mamba2:
    """Selective state space with one decay per head.

        S <- exp(dt a) S + (dt x) B^T;  y = S C + d x

    B and C are shared by the heads of a group, neighbours. The gate is multiplied before the norm, which is of each
    group by itself.
    """

    def __init__(self, file: GGUFFile, il: int, eps: float) -> None:
        blk = f"blk.{il}."
        self.eps = eps
        self.n_head, self.n_group = file.get("ssm.time_step_rank"), file.get("ssm.group_count")
        self.inner, self.state = file.get("ssm.inner_size"), file.get("ssm.state_size")
        self.conv = Convolution(file, il)
        self.into, self.out = file.weight(f"{blk}ssm_in.weight"), file.weight(f"{blk}ssm_out.weight")
        self.a, self.d = file.weight(f"{blk}ssm_a"), file.weight(f"{blk}ssm_d")  # (n_head, 1)
        self.dt, self.norm = file.weight(f"{blk}ssm_dt.bias"), file.weight(f"{blk}ssm_norm.weight")

    def _groups(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.n_group, -1).repeat_interleave(self.n_head // self.n_group, 1)

    def run(self, h: Tensor, past: State | None) -> tuple[Tensor, State]:
        """Output (n_tokens, n_embd) of normed states h, and the state after them."""
        before = self.conv.blank() if past is None else past.conv
        z, xbc, dt = linear(h, self.into).tensor_split([self.inner, self.inner + before.shape[-1]], -1)
        mixed, conv = self.conv(xbc, before)
        x, b, c = mixed.tensor_split([self.inner, self.inner + self.n_group * self.state], -1)
        x, b, c = x.reshape(len(h), self.n_head, -1), self._groups(b), self._groups(c)
        dt = softplus(dt + self.dt)
        decay = (dt * self.a[:, 0]).exp()
        s = torch.zeros(self.n_head, x.shape[-1], self.state, dtype=torch.float64) if past is None else past.s
        ys = []
        for t in range(len(h)):
            s = decay[t, :, None, None] * s + torch.einsum("hd,hs->hds", dt[t, :, None] * x[t], b[t])
            ys.append(torch.einsum("hds,hs->hd", s, c[t]))
        y = torch.stack(ys) + self.d * x
        y = (silu(z) * y.flatten(1)).reshape(len(h), self.n_group, -1)
        y = rms_norm(y, torch.ones(y.shape[-1], dtype=torch.float64), self.eps) * self.norm
        return linear(y.flatten(1), self.out), State(conv, s)
