"""The reference model: embeddings, layers with or without the loop, output; and the cache with its policies.

Each window layer has one slot for what it stores (K and V, or its recurrent state), or one per evaluation with
kv='each'. A loop runs over a unit, the whole window in block mode and each layer of it in layer mode, and only after
its last evaluation is anything stored; evaluations therefore see what is stored of earlier positions and what they are
given for their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.loop import LoopSpec
from reference.attention import KV, rms_norm
from reference.gguf_file import GGUFFile
from reference.layers import FAMILIES, NOTHING, Done, Given, MoE, load_layer
from reference.recurrent import State
from reference.solvers import evaluations, solve

Slot = KV | State | None


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
        self._logit_scale = 1.0
        if file.arch == "granitehybrid":
            self._embd_scale = file.get("embedding_scale", 0.0) or 1.0
            self._logit_scale = 1 / (file.get("logit_scale", 0.0) or 1.0)
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
        self._loop: LoopSpec | None = None
        self.set_loop(loop)

    def set_loop(self, loop: LoopSpec | None, keep_cache: bool = False) -> None:
        """Loop like this from now on (None: not at all) and clear the cache.

        keep_cache: do not clear it; tokens keep what was stored when they were evaluated. Raises UsageError for a
        window that does not fit, for a policy its recurrent layers rule out, and for keep_cache with kv='each'.
        """
        if loop is not None:
            loop.check(self.n_layer)
        passes = 1 if loop is None else evaluations(loop)
        active = loop if passes > 1 else None
        if active is not None and any(layer.recurrent for layer in self._layers[slice(*active.window)]):
            active.check_recurrent()
        if keep_cache and "each" in (a.kv for a in (self._loop, active) if a is not None):
            raise UsageError(
                "the cache cannot be kept into or out of a loop with kv each.",
                "its passes have slots of their own: clear the cache.",
            )
        self._passes, self._loop = passes, active
        if not keep_cache:
            self.reset()

    def reset(self) -> None:
        """Clear the cache, and forget how close routers, entropies and residuals have come to a tie."""
        for router in self._routers:
            router.margin = math.inf
        self.threshold_margin = math.inf
        """Smallest distance of a residual from halt, or an entropy from its threshold, relative to it."""
        self._n_past = 0
        self._n_decoded = 0
        self._slots: list[list[Slot]] = [[None] * self._n_slots(il) for il in range(self.n_layer)]

    def _n_slots(self, il: int) -> int:
        loop = self._loop
        return self._passes if loop and loop.kv == "each" and loop.window[0] <= il < loop.window[1] else 1

    def kv(self, il: int, slot: int = 0) -> KV:
        """What layer `il` stores: K (n_past, n_head_kv, head size) and V; slot: the evaluation, with kv='each'."""
        stored = self._stored(il, slot)
        if not isinstance(stored, KV):
            raise UsageError(f"layer {il} is recurrent and stores no K and V.", "ask for its state.")
        return stored

    def state(self, il: int, slot: int = 0) -> State:
        """What recurrent layer `il` stores; slot: the evaluation, with kv='each'."""
        stored = self._stored(il, slot)
        if not isinstance(stored, State):
            raise UsageError(f"layer {il} is not recurrent: it has no state.", "ask for its K and V.")
        return stored

    def _stored(self, il: int, slot: int) -> KV | State:
        stored = self._slots[il][slot]
        if stored is None:
            raise GgufloopError("the cache is empty.", "evaluate some tokens first.")
        return stored

    @property
    def router_margin(self) -> float:
        """Smallest margin by which an expert was chosen over another since `reset`; infinite without MoE layers."""
        return min((router.margin for router in self._routers), default=math.inf)

    def eval(self, tokens: Sequence[int]) -> Tensor:
        """Logits (n_tokens, n_vocab) of the tokens as one batch after those evaluated before."""
        before = [list(slots) for slots in self._slots]
        loop, doubt = self._policy(len(tokens))
        logits = self._evaluate(tokens, loop)
        if doubt is not None and self._below(doubt, entropy(logits[-1])):
            self._slots = before
            logits = self._evaluate(tokens, self._loop)
        self._n_past += len(tokens)
        return logits

    def _evaluate(self, tokens: Sequence[int], loop: LoopSpec | None) -> Tensor:
        pos = torch.arange(self._n_past, self._n_past + len(tokens))
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
        logits = linear(rms_norm(x, self._norm, self._eps), self._output, self._output_bias) * self._logit_scale
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    def _policy(self, n_tokens: int) -> tuple[LoopSpec | None, float | None]:
        """How this step is evaluated, and the entropy in nats above which it is then evaluated again, looped.

        One token after others is decode, all else a prompt, which loops.
        """
        loop = self._loop
        if n_tokens != 1 or self._n_past == 0:
            self._n_decoded = 0
            return loop, None
        self._n_decoded += 1
        policy, _, value = ("full" if loop is None else loop.decode).partition(":")
        if policy == "entropy":
            return None, float(value)
        loops = self._n_decoded <= int(value) if policy == "first" else policy == "full"
        return loop if loops else None, None

    def _below(self, low: float, high: float) -> bool:
        self.threshold_margin = min(self.threshold_margin, abs(low - high) / max(low, high))
        return low < high

    def _store(self, il: int, slot: int, own: KV | State) -> None:
        past = self._slots[il][slot]
        if isinstance(past, KV):
            assert isinstance(own, KV)
            self._slots[il][slot] = past.then(own)
        else:  # there is nothing yet, or a state, which the later one replaces
            self._slots[il][slot] = own

    def _run_plain(self, il: int, x: Tensor, pos: Tensor) -> Tensor:
        done = self._layers[il].run(x, pos, self._slots[il][0])
        for slot in range(len(self._slots[il])):  # a plain token has one pass, and that is what every pass sees of it
            self._store(il, slot, done.own)
        return done.x

    def _run_unit(self, loop: LoopSpec, unit: range, x0: Tensor, pos: Tensor) -> Tensor:
        passes: list[list[Done]] = []

        def g(x: Tensor) -> Tensor:
            dones = []
            for i, il in enumerate(unit):
                past = self._slots[il][len(passes) if loop.kv == "each" else 0]
                given = _given(loop, passes[0][i]) if passes else NOTHING
                dones.append(self._layers[il].run(x, pos, past, given))
                x = dones[-1].x
            passes.append(dones)
            return x

        def small(y: Tensor, next_y: Tensor) -> bool:
            assert loop.halt is not None
            return self._below(float(((next_y - y).norm(dim=-1) / y.norm(dim=-1)).mean()), loop.halt)

        out: Tensor = solve(loop, g, x0, small)
        if loop.kv == "last":
            g(out)
            passes = passes[-1:]
        for i, il in enumerate(unit):
            for slot in range(len(self._slots[il])):
                self._store(il, slot, passes[slot][i].own)
        return out


def _given(loop: LoopSpec, first: Done) -> Given:
    """What every pass after the first, which is `first`, is given of it."""
    own = first.own if loop.kv == "frozen" and isinstance(first.own, KV) else None
    return Given(own, first.routed if loop.routing == "frozen" else None, loop.attention, loop.sinks)


def entropy(logits: Tensor) -> float:
    """Of the distribution that logits (n_vocab,) stand for, in nats."""
    log_p = log_softmax(logits, -1)
    return float(-(log_p.exp() * log_p).sum())
