"""The reference model: embeddings, layers with or without the loop, output; and the cache with its policies.

Each window layer has one K/V slot, or one per evaluation with kv='each'. A loop runs over a unit, the whole window
in block mode and each layer of it in layer mode, and only after its last evaluation is anything stored; evaluations
therefore see stored K/V of earlier positions and what they are given for their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike

import torch
from torch import Tensor
from torch.nn.functional import linear

from ggufloop.errors import GgufloopError, nearest
from ggufloop.loop import LoopSpec
from ggufloop.reference.gguf_file import GGUFFile
from ggufloop.reference.layers import FAMILIES, KV, MoE, load_layer, rms_norm
from ggufloop.reference.solvers import evaluations, solve


class Reference:
    """A GGUF model in float64, looped as `loop` says (None: plain), with a cache.

    Raises GgufloopError for a file that cannot be read or holds something unknown, UsageError for a window that does
    not fit.
    """

    def __init__(self, path: str | PathLike[str], loop: LoopSpec | None = None) -> None:
        file = GGUFFile(path)
        if file.arch not in FAMILIES:
            raise GgufloopError(f"the reference does not know architecture {file.arch}.", nearest(file.arch, FAMILIES))
        self.n_layer: int = file.get("block_count")
        self._embd = file.weight("token_embd.weight")
        self._embd_scale = math.sqrt(self._embd.shape[1]) if file.arch == "gemma3" else 1.0
        self._eps: float = file.get("attention.layer_norm_rms_epsilon")
        self._layers = [load_layer(file, il) for il in range(self.n_layer)]
        self._routers = [layer.ffn for layer in self._layers if isinstance(layer.ffn, MoE)]
        self._norm = file.weight("output_norm.weight")
        self._output = file.weight("output.weight") if file.has("output.weight") else self._embd
        self._output_bias = file.optional("output.bias")
        self._softcap: float = file.get("final_logit_softcapping", 0.0) if file.arch == "gemma3" else 0.0
        if unread := file.unread():
            raise GgufloopError(
                f"the reference does not know tensor {unread[0]} and {len(unread) - 1} others.",
                "compare with a model without them.",
            )
        self.set_loop(loop)

    def set_loop(self, loop: LoopSpec | None) -> None:
        """Loop like this from now on (None: not at all) and clear the cache. Raises UsageError."""
        if loop is not None:
            loop.check(self.n_layer)
        self._passes = 1 if loop is None else evaluations(loop)
        self._loop = loop if self._passes > 1 else None
        self.reset()

    def reset(self) -> None:
        """Clear the cache, and forget how close the routers have come to a tie."""
        for router in self._routers:
            router.margin = math.inf
        self._n_past = 0
        self._n_decoded = 0
        self._slots: list[list[KV | None]] = [[None] * self._n_slots(il) for il in range(self.n_layer)]

    def _n_slots(self, il: int) -> int:
        loop = self._loop
        return self._passes if loop and loop.kv == "each" and loop.window[0] <= il < loop.window[1] else 1

    def kv(self, il: int, slot: int = 0) -> KV:
        """What layer `il` stores: K (n_past, n_head_kv, head size) and V; slot: the evaluation, with kv='each'."""
        kv = self._slots[il][slot]
        if kv is None:
            raise GgufloopError("the cache is empty.", "evaluate some tokens first.")
        return kv

    @property
    def router_margin(self) -> float:
        """Smallest margin by which an expert was chosen over another since `reset`; infinite without MoE layers."""
        return min((router.margin for router in self._routers), default=math.inf)

    def eval(self, tokens: Sequence[int]) -> Tensor:
        """Logits (n_tokens, n_vocab) of the tokens as one batch after those evaluated before."""
        pos = torch.arange(self._n_past, self._n_past + len(tokens))
        loop = self._loop if self._loops(len(tokens)) else None
        x = self._embd[list(tokens)] * self._embd_scale
        il = 0
        while il < self.n_layer:
            if loop is None or not loop.window[0] <= il < loop.window[1]:
                x = self._run_plain(il, x, pos)
                il += 1
            else:
                end = il + 1 if loop.mode == "layer" else loop.window[1]
                x = self._run_unit(loop, range(il, end), x, pos)
                il = end
        self._n_past += len(tokens)
        logits = linear(rms_norm(x, self._norm, self._eps), self._output, self._output_bias)
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    def _loops(self, n_tokens: int) -> bool:
        """Whether this step loops by the decode policy: one token after others is decode, all else a prompt."""
        if n_tokens != 1 or self._n_past == 0:
            self._n_decoded = 0
            return True
        self._n_decoded += 1
        policy = "full" if self._loop is None else self._loop.decode
        if policy.startswith("first:"):
            return self._n_decoded <= int(policy.removeprefix("first:"))
        return policy == "full"

    def _store(self, il: int, slot: int, own: KV) -> None:
        past = self._slots[il][slot]
        self._slots[il][slot] = own if past is None else past.then(own)

    def _run_plain(self, il: int, x: Tensor, pos: Tensor) -> Tensor:
        x, own = self._layers[il].run(x, pos, self._slots[il][0], None)
        for slot in range(len(self._slots[il])):  # a plain token has one pass, and that is what every pass sees of it
            self._store(il, slot, own)
        return x

    def _run_unit(self, loop: LoopSpec, unit: range, x0: Tensor, pos: Tensor) -> Tensor:
        passes: list[list[KV]] = []

        def g(x: Tensor) -> Tensor:
            n, kvs = len(passes), []
            for i, il in enumerate(unit):
                past = self._slots[il][n if loop.kv == "each" else 0]
                own = passes[0][i] if loop.kv == "frozen" and n > 0 else None
                x, kv = self._layers[il].run(x, pos, past, own)
                kvs.append(kv)
            passes.append(kvs)
            return x

        out: Tensor = solve(loop, g, x0)
        if loop.kv == "last":
            g(out)
            passes = passes[-1:]
        for i, il in enumerate(unit):
            for slot in range(len(self._slots[il])):
                self._store(il, slot, passes[slot][i])
        return out
