"""The update rules of a loop, one function each, on hidden states.

    out = solve(spec, g, x0)                # g is called once per evaluation, in order
    out = solve(spec, g, x0, stop=small)    # a loop with halt: no further evaluation once small(y, next y)

Deliberately not the tableaux of solvers.py: nothing here knows that the rules are linear. `g` may be any function and x
anything that adds and scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ggufloop.loop import LoopSpec

G = Callable[[Any], Any]
Stop = Callable[[Any, Any], bool]


def euler(g: G, x0: Any, k: int, h: float) -> Any:
    """k damped sub-steps x <- x + h (g(x) - x)."""
    x = x0
    for _ in range(k):
        x = x + h * (g(x) - x)
    return x


def anchored(g: G, x0: Any, k: int, h: float, beta: float) -> Any:
    """beta g(x0) + (1 - beta) y, where y are k damped sub-steps; g(x0) is the first of their evaluations."""
    first = g(x0)
    y = x0 + h * (first - x0)
    return beta * first + (1 - beta) * euler(g, y, k - 1, h)


def naive(g: G, x0: Any, k: int) -> Any:
    """g applied k times."""
    x = x0
    for _ in range(k):
        x = g(x)
    return x


def halting(g: G, x0: Any, k: int, h: float, stop: Stop) -> Any:
    """Damped sub-steps (h = 1: naive) until one of them, from y to its next, is small enough to stop; k at most."""
    x = x0
    for left in reversed(range(k)):
        x, before = x + h * (g(x) - x), x
        if left and stop(before, x):
            break
    return x


def midpoint(g: G, x0: Any, k: int, h: float) -> Any:
    """Each step goes by the slope found half a step ahead."""
    x = x0
    for _ in range(k):
        half = x + (g(x) - x) * (h / 2)
        x = x + (g(half) - half) * h
    return x


def heun(g: G, x0: Any, k: int, h: float) -> Any:
    """Each step goes by the mean of the slopes at its start and its Euler end."""
    x = x0
    for _ in range(k):
        start = g(x) - x
        end = x + start * h
        x = x + (start + (g(end) - end)) * (h / 2)
    return x


def rk4(g: G, x0: Any, k: int, h: float) -> Any:
    """The classical fourth-order step."""
    x = x0
    for _ in range(k):
        s1 = g(x) - x
        y2 = x + s1 * (h / 2)
        s2 = g(y2) - y2
        y3 = x + s2 * (h / 2)
        s3 = g(y3) - y3
        y4 = x + s3 * h
        s4 = g(y4) - y4
        x = x + (s1 + s2 * 2 + s3 * 2 + s4) * (h / 6)
    return x


def input_anchor(g: G, x0: Any, k: int, alpha: float) -> Any:
    """x <- alpha g(x) + (1 - alpha) x0."""
    x = x0
    for _ in range(k):
        x = alpha * g(x) + (1 - alpha) * x0
    return x


def heavy_ball(g: G, x0: Any, k: int, alpha: float, mu: float) -> Any:
    """x <- x + alpha f(x) + mu (x - x_prev), at rest before the first step."""
    x = before = x0
    for _ in range(k):
        x, before = x + alpha * (g(x) - x) + mu * (x - before), x
    return x


def elementary_weights(k: int, beta: float) -> tuple[float, float, float]:
    """(sum B c, sum B c^2, sum B A c) of k anchored Euler steps, summed as they stand."""
    b = [(1 - beta) / k] * k
    b[0] += beta
    c = [i / k for i in range(k)]
    bc = sum(bi * ci for bi, ci in zip(b, c, strict=True))
    bcc = sum(bi * ci**2 for bi, ci in zip(b, c, strict=True))
    bac = sum(b[i] / k * c[j] for i in range(k) for j in range(i))
    return bc, bcc, bac


def reduced(g: G, x0: Any, k: int, beta: float, passes: int) -> Any:
    """k anchored Euler steps in 2 or 3 evaluations with the same elementary weights."""
    bc, bcc, bac = elementary_weights(k, beta)
    s1 = g(x0) - x0
    if passes == 2:
        c = bcc / bc
        y = x0 + c * s1
        return x0 + (1 - bc / c) * s1 + (bc / c) * (g(y) - y)
    c2, c3 = 1 / 3, 2 / 3
    b2, b3 = (float(b) for b in np.linalg.solve([[c2, c3], [c2**2, c3**2]], [bc, bcc]))
    a32 = bac / (b3 * c2)
    y2 = x0 + c2 * s1
    s2 = g(y2) - y2
    y3 = x0 + (c3 - a32) * s1 + a32 * s2
    s3 = g(y3) - y3
    return x0 + (1 - b2 - b3) * s1 + b2 * s2 + b3 * s3


def average(g: G, x0: Any, k: int) -> Any:
    """The mean of g applied once, twice, ... k times."""
    x, total = x0, 0 * x0
    for _ in range(k):
        x = g(x)
        total = total + x
    return total / k


def solve(spec: LoopSpec, g: G, x0: Any, stop: Stop | None = None) -> Any:
    """What the loop makes of x0, evaluating g as often as the plan says, or less with halt and `stop`."""
    k, beta = spec.k, spec.beta
    h = 1 / k if spec.damping is None else spec.damping
    if beta == 1:  # only the first evaluation counts: the unmodified model
        return g(x0)
    if spec.passes is not None and spec.passes < k:
        return reduced(g, x0, k, beta, spec.passes)
    if spec.halt is not None and stop is not None:
        return halting(g, x0, k, 1 if spec.solver == "naive" else h, stop)
    rules: dict[str, Callable[[], Any]] = {
        "euler": lambda: anchored(g, x0, k, h, beta),
        "naive": lambda: naive(g, x0, k),
        "repeat": lambda: naive(g, x0, k),
        "average": lambda: average(g, x0, k),
        "midpoint": lambda: midpoint(g, x0, k, h),
        "heun": lambda: heun(g, x0, k, h),
        "rk4": lambda: rk4(g, x0, k, h),
        "input-anchor": lambda: input_anchor(g, x0, k, h),
        "heavy-ball": lambda: heavy_ball(g, x0, k, h, 0.5 if spec.mu is None else spec.mu),
    }
    return rules[spec.solver]()


def evaluations(spec: LoopSpec) -> int:
    """How often `solve` evaluates g at most, found by counting."""
    count = 0

    def g(x: float) -> float:
        nonlocal count
        count += 1
        return x

    solve(spec, g, 0.0)
    return count
