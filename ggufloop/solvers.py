"""The solvers of a loop, each as a tableau (A, B): what the compute graph is given instead of their names. No I/O.

    tableau(SOLVERS["heun"], k=2, h=0.5).A     # row i: how the i-th evaluation's input is made of those before it

A window g maps the state entering its first layer to the state leaving its last; f(x) = g(x) - x. Every solver
here is linear in the values of f, so one strictly lower-triangular matrix A and one vector B say it completely:
y_i = x0 + sum_j A_ij f(y_j), out = x0 + sum_j B_j f(y_j). The solvers are written as the update rules of
arXiv 2605.23872 on coefficient vectors, and running them yields the tableau.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
F = Callable[[Vector], Vector]


def _euler(f: F, x: Vector, k: int, h: float, mu: float) -> Vector:
    for _ in range(k):
        x = x + h * f(x)
    return x


def _midpoint(f: F, x: Vector, k: int, h: float, mu: float) -> Vector:
    for _ in range(k):
        x = x + h * f(x + h / 2 * f(x))
    return x


def _heun(f: F, x: Vector, k: int, h: float, mu: float) -> Vector:
    for _ in range(k):
        f1 = f(x)
        f2 = f(x + h * f1)
        x = x + h / 2 * (f1 + f2)
    return x


def _rk4(f: F, x: Vector, k: int, h: float, mu: float) -> Vector:
    for _ in range(k):
        f1 = f(x)
        f2 = f(x + h / 2 * f1)
        f3 = f(x + h / 2 * f2)
        f4 = f(x + h * f3)
        x = x + h / 6 * (f1 + 2 * f2 + 2 * f3 + f4)
    return x


def _input_anchor(f: F, x: Vector, k: int, h: float, mu: float) -> Vector:
    x0 = x
    for _ in range(k):
        x = h * (x + f(x)) + (1 - h) * x0
    return x


def _heavy_ball(f: F, x: Vector, k: int, h: float, mu: float) -> Vector:
    x_prev = x
    for _ in range(k):
        x, x_prev = x + h * f(x) + mu * (x - x_prev), x
    return x


def _average(f: F, x: Vector, k: int, h: float, mu: float) -> Vector:
    """Inner Loop Inference (arXiv 2602.14759): the mean of g(x), g(g(x)), ..."""
    total = np.zeros_like(x)
    for _ in range(k):
        x = x + h * f(x)
        total = total + x
    return total / k


@dataclass(frozen=True)
class Solver:
    """An update rule: what it does, how often one of its K steps evaluates g, its damping where the user gives none."""

    meaning: str
    rule: Callable[[F, Vector, int, float, float], Vector]
    evaluations_per_step: int = 1
    undamped: bool = False


SOLVERS = {
    "euler": Solver("K small steps that add up to one pass", _euler),
    "naive": Solver("K full passes, undamped", _euler, undamped=True),
    "repeat": Solver("K full passes, as if the layers were there K times", _euler, undamped=True),
    "midpoint": Solver("K steps, each with two evaluations", _midpoint, 2),
    "heun": Solver("K steps, each with two evaluations", _heun, 2),
    "rk4": Solver("K steps, each with four evaluations", _rk4, 4),
    "input-anchor": Solver("K steps, each from the state the window was entered with", _input_anchor),
    "heavy-ball": Solver("K small steps with momentum", _heavy_ball),
    "average": Solver("the mean of 1, 2, ... K full passes (inner loop inference)", _average, undamped=True),
}


@dataclass(frozen=True)
class Tableau:
    """The pair (A, B) a compute graph runs; float64.

    A: (n, n), strictly lower triangular: y_i = x0 + sum_j A[i, j] f(y_j).
    B: (n,): out = x0 + sum_j B[j] f(y_j).
    """

    A: NDArray[np.float64]
    B: NDArray[np.float64]

    @property
    def evaluations(self) -> int:
        """How often the window is evaluated."""
        return len(self.B)


def tableau(solver: Solver, k: int, h: float, mu: float = 0.0, beta: float = 0.0) -> Tableau:
    """Run an update rule on vectors of coefficients of f(y_1), f(y_2), ...; x0 is the zero vector."""
    n = k * solver.evaluations_per_step
    rows: list[Vector] = []
    unit = np.eye(n)

    def f(y: Vector) -> Vector:
        rows.append(y)
        row: Vector = unit[len(rows) - 1]
        return row

    y = solver.rule(f, np.zeros(n), k, h, mu)
    out: Vector = (1 - beta) * y + beta * unit[0]  # the anchor of Algorithm 3: beta g(x0) + (1 - beta) y, both minus x0
    return _trim(Tableau(np.array(rows), out))


def _trim(t: Tableau) -> Tableau:
    """Drop evaluations at the end whose result nothing uses (beta = 1 leaves one: the unmodified model)."""
    n = t.evaluations
    while n > 1 and t.B[n - 1] == 0.0:
        n -= 1
    return Tableau(t.A[:n, :n], t.B[:n])


def reduced(k: int, beta: float, passes: int) -> Tableau:
    """K anchored Euler steps in two or three evaluations with the same elementary weights.

    Matches sum B, sum B c, sum B c^2 and (three stages) sum B A c of the K-step scheme, the only quantities a
    B-series depends on up to that order.
    """
    s = 1 - beta
    gamma = s * (k - 1) / (2 * k)
    delta = s * (k - 1) * (2 * k - 1) / (6 * k * k)
    eps = s * (k - 1) * (k - 2) / (6 * k * k)
    if passes == 2:
        c2 = (2 * k - 1) / (3 * k)  # delta / gamma
        b2 = gamma / c2
        return Tableau(np.array([[0.0, 0.0], [c2, 0.0]]), np.array([1 - b2, b2]))
    c2, c3 = 1 / 3, 2 / 3
    b3 = (delta - gamma * c2) / (c3 * (c3 - c2))
    b2 = (gamma - b3 * c3) / c2
    a32 = eps / (b3 * c2)
    return Tableau(
        np.array([[0.0, 0.0, 0.0], [c2, 0.0, 0.0], [c3 - a32, a32, 0.0]]),
        np.array([1 - b2 - b3, b2, b3]),
    )
