"""How a loop converges on one text, and what every layer of the model would say: pure functions over an engine.

    result = trace(llm, llm.tokenize(b"The quick brown fox"))
    result.steps[0].size               # how far the first pass moved the state of the window; what halt=tau compares
    result.points                      # every state of the run, in order of execution

Three kinds of state: `layer` is what a layer put out, `enter` the state a later pass of the window starts from, and
`leave` the state that goes on to the layers behind it. With X (n tokens, n_embd) a state, x_t its row of token t, and
X' the state of the same place one pass earlier:

    residual         mean over tokens of ||x_t - x'_t|| / ||x'_t||, in which every token counts the same.
    whole residual   ||X - X'||_F / ||X'||_F. It is ruled by the few tokens whose states are hundreds of times longer
                     than the others' (the first one, in most models). A number of this batch, without an interval.
    cosine           mean over tokens of x_t . x'_t / (||x_t|| ||x'_t||).
    entropy          of the logit lens, the distribution p that the model's head (final norm, output matrix) makes of
                     the state: mean over tokens of -sum p log p, in nats.
    kl               mean over tokens of KL(q || p) = sum q (log q - log p), with q what the model ends with.

With y_j the state that enters pass j and y_{n+1} the one that leaves, the residual of an `enter` or `leave` state is
the step of pass j, which `--halt` compares with tau after it. The y_j are combined here from
the layers' outputs and the tableau, y_i = x0 + sum_j A_ij (g(y_j) - y_j), so block and layer mode are the same code.

Intervals are mean +- 1.96 standard errors over the tokens, taken as independent; one token has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.logits import log_softmax
from ggufloop.loop import LoopSpec
from ggufloop.records import State

Rows = NDArray[np.float32]
Values = NDArray[np.float64]

LAYER, ENTER, LEAVE = "layer", "enter", "leave"
_LENS_CELLS = 1 << 22  # most logits held at once for one state


class Traceable(Protocol):
    """What is used of `engine.LoopedLlama`."""

    @property
    def loop(self) -> LoopSpec | None: ...
    def set_loop(self, loop: LoopSpec | None) -> None: ...
    def n_layer(self) -> int: ...
    def n_vocab(self) -> int: ...
    def trace(self, tokens: Sequence[int]) -> Sequence[State]: ...
    def lens(self, rows: Rows, tokens: Sequence[int]) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class TokenMean:
    """A mean over n tokens; half is half the width of its 95 % interval, None for a single token."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Values) -> TokenMean:
        """The mean of one value per token."""
        n = len(values)
        half = 1.96 * float(values.std(ddof=1)) / n**0.5 if n > 1 else None
        return cls(float(values.mean()), half, n)


@dataclass(frozen=True)
class Point:
    """One state and what is measured on it.

    kind         LAYER, ENTER or LEAVE.
    layer        its depth: the layer it came out of; for ENTER the one before the window, for LEAVE the window's last.
    evaluation   the pass, from 1. ENTER: the pass that starts there; LEAVE: the last pass.
    residual     to the same place one pass earlier, as are whole_residual and cosine; None in the first pass.
    entropy, kl  of the logit lens; None if it was left out.
    """

    kind: str
    layer: int
    evaluation: int
    residual: TokenMean | None = None
    whole_residual: float | None = None
    cosine: TokenMean | None = None
    entropy: TokenMean | None = None
    kl: TokenMean | None = None


@dataclass(frozen=True)
class Move:
    """How far pass `evaluation` of layers first .. last - 1 moved the state they are iterated on, relatively."""

    first: int
    last: int
    evaluation: int
    size: float


@dataclass(frozen=True)
class Trace:
    """One run. loop: what looped, None if nothing did; tokens: how many; points: in order of execution."""

    loop: LoopSpec | None
    tokens: int
    points: tuple[Point, ...]

    @property
    def steps(self) -> tuple[Move, ...]:
        """What each pass of the window moved, in layer mode of each of its layers; empty without a loop."""
        if self.loop is None:
            return ()
        width = self.loop.layers if self.loop.mode == "block" else 1
        steps = []
        for p in self.points:
            if p.kind != LAYER and p.residual is not None:
                enters = p.kind == ENTER
                first = p.layer + 1 - (0 if enters else width)
                steps.append(Move(first, first + width, p.evaluation - enters, p.residual.mean))
        return tuple(steps)

    def passes(self, tau: float) -> dict[tuple[int, int], int]:
        """How many passes each unit (the window; in layer mode each of its layers) would run with halt=tau.

        In layer mode a layer that halts hands on another state, so what is said of the layers after it is a guess.
        """
        ran: dict[tuple[int, int], int] = {}
        halted = set()
        for step in self.steps:
            unit = step.first, step.last
            if unit not in halted:
                ran[unit] = step.evaluation
            if step.size < tau:
                halted.add(unit)
        return ran


@dataclass(frozen=True)
class _Placed:
    """A state with its place; before: the state of the same place one pass earlier."""

    kind: str
    layer: int
    evaluation: int
    rows: Rows
    before: Rows | None = None


def trace(model: Traceable, tokens: Sequence[int], lens: bool = True) -> Trace:
    """Run tokens, at least one, through the model as one batch under its loop, and measure every state.

    A loop that halts is traced in full: which passes it would leave out is what `Trace.passes` tells. lens: read every
    state with the model's head, one product with the output matrix per state. What the cache held is lost.
    Raises GgufloopError if a state is not finite, and what the model raises.
    """
    if not tokens:
        raise UsageError("there are no tokens to trace.", "give a text.")
    states, loop = _run(model, tokens)
    placed = _place(states, loop, model.n_layer())
    points = [_compared(p) for p in placed]
    if lens:
        readings = _read(model, [p.rows for p in placed], tokens)
        points = [
            replace(point, entropy=TokenMean.of(entropy), kl=TokenMean.of(kl))
            for point, (entropy, kl) in zip(points, readings, strict=True)
        ]
    return Trace(loop, len(tokens), tuple(points))


def _run(model: Traceable, tokens: Sequence[int]) -> tuple[Sequence[State], LoopSpec | None]:
    """The states of a run with every pass, and the loop, None if it is no loop."""
    given = model.loop
    loop = given if given is None else replace(given, halt=None)
    if loop == given:
        states = model.trace(tokens)
    else:
        model.set_loop(loop)
        try:
            states = model.trace(tokens)
        finally:
            model.set_loop(given)
    return states, loop if loop is not None and loop.is_loop else None


def _place(states: Sequence[State], loop: LoopSpec | None, n_layer: int) -> list[_Placed]:
    """All states of a run in order of execution, those between passes among them."""
    outputs: dict[tuple[int, int], Rows] = {}
    for state in states:  # the first of a place: in layer mode an input may bear the name of an output before it
        if not np.isfinite(state.rows).all():
            raise GgufloopError(
                f"the state leaving layer {state.layer} in pass {state.evaluation} is not finite.",
                "the loop diverges: give it less damping, fewer passes or another window."
                if loop is not None
                else "the model or its file is broken.",
            )
        outputs.setdefault((state.layer, state.evaluation), state.rows)
    a, b = (n_layer, n_layer) if loop is None else loop.window
    placed = [_Placed(LAYER, il, 1, outputs[il, 1]) for il in range(a)]
    if loop is not None:
        width = b - a if loop.mode == "block" else 1
        for first in range(a, b, width):
            placed += _unit(outputs, loop, first, first + width, placed[-1].rows)
    return placed + [_Placed(LAYER, il, 1, outputs[il, 1]) for il in range(b, n_layer)]


def _unit(outputs: dict[tuple[int, int], Rows], loop: LoopSpec, first: int, last: int, x0: Rows) -> list[_Placed]:
    """The passes of layers first .. last - 1, which are iterated together; x0 enters the first one."""
    t = loop.tableau()
    n = t.evaluations
    placed: list[_Placed] = []
    residuals: list[Values] = []
    y = x0
    for j in range(1, n + 2):
        if j > 1:
            weights = t.A[j - 1] if j <= n else t.B
            before = y
            y = _combine(x0, weights, residuals)
            kind, layer, evaluation = (ENTER, first - 1, j) if j <= n else (LEAVE, last - 1, n)
            placed.append(_Placed(kind, layer, evaluation, y, before))
        if j <= n:
            placed += [
                _Placed(LAYER, il, j, outputs[il, j], outputs[il, j - 1] if j > 1 else None)
                for il in range(first, last)
            ]
            residuals.append(outputs[last - 1, j].astype(np.float64) - y)
    return placed


def _combine(x0: Rows, weights: Values, residuals: Sequence[Values]) -> Rows:
    total = x0.astype(np.float64)
    for weight, residual in zip(weights, residuals, strict=False):
        total += weight * residual
    return total.astype(np.float32)


def _divided(a: Any, b: Any) -> Any:
    """a / b, where nothing over nothing is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((a == 0) & (b == 0), 0.0, a / b)


def _by_token(rows: Rows) -> Values:
    """(..., n_tokens, n_embd) as float64 (n_tokens, all of a token's numbers)."""
    return np.moveaxis(rows, -2, 0).reshape(rows.shape[-2], -1).astype(np.float64)


def _compared(p: _Placed) -> Point:
    """The point of a state, with its distances to the pass before it."""
    point = Point(p.kind, p.layer, p.evaluation)
    if p.before is None:
        return point
    x, old = _by_token(p.rows), _by_token(p.before)
    length, old_length = np.linalg.norm(x, axis=1), np.linalg.norm(old, axis=1)
    return replace(
        point,
        residual=TokenMean.of(_divided(np.linalg.norm(x - old, axis=1), old_length)),
        whole_residual=float(_divided(np.linalg.norm(x - old), np.linalg.norm(old))),
        cosine=TokenMean.of(_divided((x * old).sum(axis=1), length * old_length)),
    )


def _weighted(p: Values, values: Values) -> Values:
    """Sum of p * values over the last axis, where p = 0 counts nothing even if the value is infinite."""
    with np.errstate(invalid="ignore"):
        return np.where(p > 0, p * values, 0.0).sum(axis=-1)  # type: ignore[no-any-return]  # numpy says Any of a sum


def _read(model: Traceable, states: Sequence[Rows], tokens: Sequence[int]) -> list[tuple[Values, Values]]:
    """Entropy of the lens of every state and KL(final || lens), one value per token; the last state is the final one.

    A few tokens at a time: the logits of all of them at once may not fit the memory.
    """
    n = len(tokens)
    size = max(1, _LENS_CELLS // model.n_vocab())
    readings = [(np.empty(n), np.empty(n)) for _ in states]
    for start in range(0, n, size):
        cut = slice(start, start + size)
        some = list(tokens[cut])
        final = log_softmax(model.lens(states[-1][..., cut, :], some))
        q = np.exp(final)
        for rows, (entropy, kl) in zip(states, readings, strict=True):
            lens = final if rows is states[-1] else log_softmax(model.lens(rows[..., cut, :], some))
            entropy[cut] = -_weighted(np.exp(lens), lens)
            with np.errstate(invalid="ignore"):
                kl[cut] = _weighted(q, final - lens)
    return readings
