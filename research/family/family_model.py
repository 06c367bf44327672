"""Small llama models in torch: shapes, forward pass, a trunk at constant rate with a decayed copy per budget, export.

    shape = Shape(n_layer=2)
    trunk = Trainer.fresh(shape, seed=1, plan=plan)
    trunk.advance(stream, steps=100)                        # constant rate after a warm-up
    copy = trunk.decaying(until=125); copy.advance(stream)  # down to 0: the model of a budget of 125 steps
    export(path, shape, copy.weights, merges)

A model trained with one schedule is at its best only at the schedule's end, so intermediate states of one run would
make small budgets look worse than they are. Here one run per shape keeps its rate, and each budget branches off at 80 %
and decays over the last 20 % (Haegele et al., arXiv 2405.18392), which costs a quarter more than one run, not eight.

Step s of every shape and branch trains on the same windows of the stream, each once. Weights carry their GGUF
names. Saved states continue bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from family_text import BYTES, END, tiny
from gguf import GGUFWriter, TokenType
from torch.nn import functional as F

from ggufloop.files import atomic_path

EPS = 1e-6
ROPE_BASE = 1e4

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A llama of `n_layer` layers with tied embeddings. Widths are multiples of 256, the block of the K types."""

    n_layer: int
    n_vocab: int = 512
    n_embd: int = 256
    n_head: int = 4
    n_head_kv: int = 1
    n_ff: int = 256

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.n_embd // self.n_head

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight, outputs first, by GGUF name."""
        d, kv = self.n_embd, self.n_head_kv * self.head
        found: dict[str, tuple[int, ...]] = {"token_embd": (self.n_vocab, d)}
        for il in range(self.n_layer):
            found |= {
                f"blk.{il}.{name}": shape
                for name, shape in {
                    "attn_norm": (d,),
                    "attn_q": (d, d),
                    "attn_k": (kv, d),
                    "attn_v": (kv, d),
                    "attn_output": (d, d),
                    "ffn_norm": (d,),
                    "ffn_gate": (self.n_ff, d),
                    "ffn_up": (self.n_ff, d),
                    "ffn_down": (d, self.n_ff),
                }.items()
            }
        found["output_norm"] = (d,)
        return {f"{name}.weight": shape for name, shape in found.items()}

    def n_params(self, embedding: bool = True) -> int:
        """Number of weights, or without the embedding matrix, which is the output matrix too."""
        return sum(int(np.prod(s)) for n, s in self.tensors().items() if embedding or n != "token_embd.weight")


@dataclass(frozen=True)
class Plan:
    """How every shape is trained: `n_batch` windows of n_ctx tokens a step, AdamW, gradients clipped to norm 1."""

    n_ctx: int = 256
    n_batch: int = 4
    rate: float = 1e-3
    warmup: int = 10
    decay: float = 0.2
    weight_decay: float = 0.1

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.n_ctx * self.n_batch

    def branch(self, steps: int) -> int:
        """The step at which the copy for a budget of `steps` leaves the trunk."""
        return steps - round(self.decay * steps)


def initial(shape: Shape, seed: int) -> Weights:
    """Random weights; what writes into the residual stream starts at 0, so that every layer starts as the identity."""
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in shape.tensors().items():
        if len(size) == 1:
            weights[name] = torch.ones(size)
            continue
        std = 0.02 if name == "token_embd.weight" else 0.6 * size[1] ** -0.5
        weights[name] = std * torch.randn(size, generator=rng)
        if name.endswith(("attn_output.weight", "ffn_down.weight")):
            weights[name].zero_()
    return {name: value.requires_grad_() for name, value in weights.items()}


def logits(shape: Shape, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Float32 (batch, n_ctx, n_vocab) for ids (batch, n_ctx), each window from position 0."""
    n_batch, n_ctx = ids.shape
    frequency = ROPE_BASE ** (-torch.arange(0, shape.head, 2, dtype=torch.float64) / shape.head)
    angle = torch.outer(torch.arange(n_ctx, dtype=torch.float64), frequency)
    cos, sin = angle.cos().float(), angle.sin().float()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (shape.n_embd,), weights[f"{name}.weight"], EPS)

    def heads(x: torch.Tensor, rotate: bool) -> torch.Tensor:
        x = x.view(n_batch, n_ctx, -1, shape.head).transpose(1, 2)
        if not rotate:
            return x
        even, odd = x[..., 0::2], x[..., 1::2]  # llama.cpp turns neighbours, not halves, in this architecture
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    x = F.embedding(ids, weights["token_embd.weight"])
    for il in range(shape.n_layer):
        matrix = {n: weights[f"blk.{il}.{n}.weight"] for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
        h = norm(x, f"blk.{il}.attn_norm")
        q, k = heads(F.linear(h, matrix["attn_q"]), True), heads(F.linear(h, matrix["attn_k"]), True)
        v = heads(F.linear(h, matrix["attn_v"]), False)
        repeats = shape.n_head // shape.n_head_kv
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).reshape(n_batch, n_ctx, shape.n_embd), matrix["attn_output"])
        h = norm(x, f"blk.{il}.ffn_norm")
        gate, up = F.linear(h, weights[f"blk.{il}.ffn_gate.weight"]), F.linear(h, weights[f"blk.{il}.ffn_up.weight"])
        x = x + F.linear(F.silu(gate) * up, weights[f"blk.{il}.ffn_down.weight"])
    return F.linear(norm(x, "output_norm"), weights["token_embd.weight"])


def nll(shape: Shape, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of ids[:, 1:], one number per token; ids: (batch, n_ctx)."""
    rows = logits(shape, weights, ids[:, :-1])
    return F.cross_entropy(rows.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


class Trainer:
    """Weights and optimiser of one shape at one step, on the trunk or on the way down to the end of a budget."""

    def __init__(self, shape: Shape, plan: Plan, weights: Weights, until: int | None) -> None:
        self.shape, self.plan, self.weights, self.until = shape, plan, weights, until
        self.step = 0
        matrices = [w for w in weights.values() if w.ndim > 1]
        vectors = [w for w in weights.values() if w.ndim == 1]
        groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95), fused=True)

    @classmethod
    def fresh(cls, shape: Shape, plan: Plan, seed: int) -> Trainer:
        """The trunk at step 0."""
        return cls(shape, plan, initial(shape, seed), None)

    @classmethod
    def load(cls, path: Path) -> Trainer:
        """Continue a saved state."""
        return cls._of(torch.load(path, weights_only=True))

    @classmethod
    def _of(cls, state: dict[str, Any]) -> Trainer:
        weights = {name: value.clone().requires_grad_() for name, value in state["weights"].items()}
        trainer = cls(Shape(**state["shape"]), Plan(**state["plan"]), weights, state["until"])
        trainer.optimiser.load_state_dict(state["optimiser"])
        trainer.step = state["step"]
        return trainer

    def _state(self) -> dict[str, Any]:
        return {
            "shape": asdict(self.shape),
            "plan": asdict(self.plan),
            "weights": {name: value.detach() for name, value in self.weights.items()},
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "until": self.until,
        }

    def save(self, path: Path) -> None:
        """Write the state; a crash leaves the one before."""
        with atomic_path(path) as partial:
            torch.save(self._state(), partial)

    def decaying(self, until: int) -> Trainer:
        """A copy whose rate goes down to 0 at step `until`; it shares nothing with the trunk."""
        state = self._state()
        state["optimiser"] = {
            "state": {
                i: {key: value.clone() for key, value in moments.items()}
                for i, moments in state["optimiser"]["state"].items()
            },
            "param_groups": state["optimiser"]["param_groups"],
        }
        return self._of(state | {"until": until})

    def rate(self) -> float:
        """The learning rate of the next step."""
        rate = self.plan.rate * min(1.0, (self.step + 1) / self.plan.warmup)
        if self.until is None:
            return rate
        start = self.plan.branch(self.until)
        return rate * (self.until - self.step) / (self.until - start + 1)

    def advance(self, stream: np.ndarray, steps: int, done: Callable[[Trainer, float], None]) -> None:
        """Train up to step number `steps`; done(self, loss) after each, the loss in nats per token before it."""
        plan = self.plan
        while self.step < steps:
            part = stream[self.step * plan.step_tokens : (self.step + 1) * plan.step_tokens]
            windows = torch.from_numpy(part.astype(np.int64)).view(plan.n_batch, plan.n_ctx)
            loss = nll(self.shape, self.weights, windows).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate()
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.step += 1
            done(self, loss.item())


def export(path: Path, shape: Shape, weights: Mapping[str, torch.Tensor], merges: Sequence[tuple[str, str]]) -> None:
    """Write an F32 GGUF file with the tokenizer; a crash leaves nothing under this name."""
    tokens = [*BYTES, *(a + b for a, b in merges), END]
    if len(tokens) != shape.n_vocab:
        raise ValueError(f"{len(tokens)} tokens do not fill a vocabulary of {shape.n_vocab}.")
    with atomic_path(path) as partial:
        writer = GGUFWriter(partial, "llama")
        for key, value in {
            "vocab_size": shape.n_vocab,
            "block_count": shape.n_layer,
            "context_length": 1024,
            "embedding_length": shape.n_embd,
            "feed_forward_length": shape.n_ff,
            "attention.head_count": shape.n_head,
            "attention.head_count_kv": shape.n_head_kv,
            "attention.layer_norm_rms_epsilon": EPS,
            "rope.dimension_count": shape.head,
            "rope.freq_base": ROPE_BASE,
        }.items():
            tiny.add(writer, f"llama.{key}", value)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([TokenType.NORMAL] * (len(tokens) - 1) + [TokenType.CONTROL])
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_eos_token_id(len(tokens) - 1)
        writer.add_add_bos_token(False)
        for name, value in weights.items():
            writer.add_tensor(name, value.detach().numpy())
        tiny.finish(writer, partial)
