"""What a loop is: `LoopSpec`, its solver as a tableau (A, B), its cost and its KV memory. No I/O, no llama_cpp.

    spec = LoopSpec.parse("14:20 k=3 beta=0.5 kv=each decode=bypass")
    spec.tableau().A                     # what the compute graph is given
    spec.relative_cost(n_layer=30)       # layer evaluations, looped over plain

A window g maps the state entering its first layer to the state leaving its last; f(x) = g(x) - x. Every solver
here is linear in the values of f, so one strictly lower-triangular matrix A and one vector B say it completely:
y_i = x0 + sum_j A_ij f(y_j), out = x0 + sum_j B_j f(y_j). The solvers below are written as the update rules of
arXiv 2605.23872 on coefficient vectors, and running them yields the tableau. The graph never learns their names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufloop.errors import UsageError, nearest

MAX_EVALUATIONS = 64
"""Most evaluations of the window one plan may hold (`LLAMA_LOOP_MAX_EVALS` of the patch)."""

MODES = ("block", "layer")
KV_POLICIES = ("first", "last", "each", "frozen")
ROUTINGS = ("free", "frozen")
DECODES = ("full", "bypass", "first:n (n >= 1)", "entropy:t (t >= 0)")

_DECIMAL = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
_SIGNED_DECIMAL = re.compile(rf"[+-]?{_DECIMAL.pattern}", re.ASCII | re.IGNORECASE)
_SIGNED_WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_LAYERS = re.compile(r"\s*(\d{1,9})\s*([:-])\s*(\d{1,9})\s*", re.ASCII)
_MOST_TEXT = 512
_MOST_POSITIONS = 2**31 - 1  # llama_pos is an int32

_FORMS = {
    int: (_SIGNED_WHOLE, "whole number", 3),
    float: (_SIGNED_DECIMAL, "number", 0.5),
    str: (re.compile(r".*"), "word", ""),
}
_LIKE = "write it like '14:20 k=3 kv=each'."

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


@dataclass(frozen=True)
class _Solver:
    """An update rule, how often one of its K steps evaluates g, and its damping where the user gives none."""

    rule: Callable[[F, Vector, int, float, float], Vector]
    evaluations_per_step: int = 1
    undamped: bool = False


_SOLVERS = {
    "euler": _Solver(_euler),
    "naive": _Solver(_euler, undamped=True),
    "repeat": _Solver(_euler, undamped=True),
    "midpoint": _Solver(_midpoint, 2),
    "heun": _Solver(_heun, 2),
    "rk4": _Solver(_rk4, 4),
    "input-anchor": _Solver(_input_anchor),
    "heavy-ball": _Solver(_heavy_ball),
}
SOLVERS = tuple(_SOLVERS)


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

    def apply(self, g: Callable[[Any], Any], x0: Any) -> Any:
        """Run the tableau on any g, literally; x0 and g(x) may be anything that adds and scales."""
        residuals: list[Any] = []
        for row in self.A:
            y = x0
            for a, r in zip(row, residuals, strict=False):
                y = y + float(a) * r
            residuals.append(g(y) - y)
        out = x0
        for b, r in zip(self.B, residuals, strict=True):
            out = out + float(b) * r
        return out


def _trace(solver: _Solver, k: int, h: float, mu: float, beta: float) -> Tableau:
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
    return Tableau(np.array(rows), out)


def _trim(t: Tableau) -> Tableau:
    """Drop evaluations at the end whose result nothing uses (beta = 1 leaves one: the unmodified model)."""
    n = t.evaluations
    while n > 1 and t.B[n - 1] == 0.0:
        n -= 1
    return Tableau(t.A[:n, :n], t.B[:n])


def _reduce(k: int, beta: float, passes: int) -> Tableau:
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


def _is_whole(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, (bool, np.bool_))


def _whole(value: Any, name: str, low: int, high: int, hint: str) -> int:
    if not _is_whole(value) or not low <= value <= high:
        raise UsageError(f"{name} {value!r} is not a whole number in the range {low} to {high}.", hint)
    return index(value)


def _real(value: object, name: str, low: float, high: float, hint: str) -> float:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= float(value) <= high:  # type: ignore[arg-type]  # ok says it is a number
        shown = f"{value:g}" if isinstance(value, float) else repr(value)
        raise UsageError(f"{name} {shown} is not a number in the range {low:g} to {high:g}.", hint)
    return float(value)  # type: ignore[arg-type]  # checked above


def _known(value: str, name: str, known: Iterable[str]) -> str:
    if value not in known:
        raise UsageError(f"{name} {value!r} is not known.", nearest(str(value), known))
    return value


def parse_window(text: str) -> tuple[int, int]:
    """'14:20' -> (14, 20), layers 14 to 19.

    Raises UsageError for anything else; '14-19' gets the half-open spelling as a hint.
    """
    like = "write it like 14:20, layers 14 to 19."
    if len(text) > 32:
        raise UsageError(f"window {text[:16]!r}... is not of the form first:end.", like)
    match = _LAYERS.fullmatch(text)
    if match is None:
        raise UsageError(f"window {text!r} is not of the form first:end.", like)
    first, last = int(match[1]), int(match[3])
    if match[2] == ":":
        return first, last
    a, b = sorted((first, last))
    raise UsageError(
        f"window {text} is not of the form first:end.",
        f"windows are half-open: layers {a} to {b} are --window {a}:{b + 1}.",
    )


def _check_window(window: object) -> tuple[int, int]:
    if isinstance(window, str):
        window = parse_window(window)
    if not (isinstance(window, (tuple, list)) and len(window) == 2 and all(_is_whole(i) for i in window)):
        raise UsageError(f"window {window!r} is not a pair of layer numbers.", "write it like 14:20, layers 14 to 19.")
    a, b = (index(i) for i in window)
    if a < 1:
        raise UsageError(f"window {a}:{b} touches layer 0, which cannot be looped.", "start it at layer 1 or later.")
    if b <= a:
        swapped = f" Did you mean {b}:{a}?" if b >= 1 and b < a else ""
        raise UsageError(
            f"window {a}:{b} is empty: its end must be greater than its start.",
            f"windows are half-open, first:end.{swapped}",
        )
    return a, b


def parse_decode(text: str) -> tuple[int | None, float | None]:
    """How many generated tokens loop after a prompt, and the entropy above which one does all the same.

    'full' -> (None, None), None meaning all of them; 'bypass' -> (0, None); 'first:n' -> (n, None);
    'entropy:t' -> (0, t). Raises UsageError.
    """
    if text in ("full", "bypass"):
        return None if text == "full" else 0, None
    head, _, value = text.partition(":")
    if head == "first" and _SIGNED_WHOLE.fullmatch(value) and value[0] not in "+-" and len(value) < 10 and int(value):
        return int(value), None
    if head == "entropy" and _DECIMAL.fullmatch(value) and math.isfinite(float(value)):
        return 0, float(value)
    raise UsageError(f"decode {text!r} is not known.", nearest(text, DECODES))


@dataclass(frozen=True)
class LoopSpec:
    """One loop, complete: which layers, how often, by which rule, what passes see and what the cache holds.

    window   (a, b), half-open: layers a .. b-1, with 1 <= a < b <= n_layer - 1. '14:20' is accepted.
    k        outer steps of the solver; with one evaluation per step, the number of passes.
    mode     'block': the window is iterated as one map; 'layer': each of its layers is finished before the next.
    solver   one of SOLVERS. 'repeat' is 'naive' with kv='each' (RYS, layer duplication).
    damping  h (alpha for input-anchor and heavy-ball), 0 < h <= 2. None: 1/k, and 1 for naive and repeat.
    beta     weight of g(x0) in the result, euler only, 0 to 1 (0.5 is the paper's robust default).
    mu       momentum of heavy-ball, 0 <= mu < 1; None: 0.5 there, 0 elsewhere.
    passes   2 or 3: run the K euler steps in so many evaluations (same B-series weights); None: no reduction.
    kv       what later tokens see in the window: one of KV_POLICIES. None: 'first' ('each' for repeat).
    decode   'full', 'bypass', 'first:n' or 'entropy:t': which generated tokens loop. The prompt always does. With
             'entropy:t' a token is evaluated plain, and again looped if its next-token distribution has an entropy
             above t nats.
    routing  'free': every pass routes its state to experts anew; 'frozen': the experts and weights a layer's first
             pass chose serve all its passes. None: 'free', and 'frozen' in layer mode. Nothing without experts.
    attention  w >= 1: passes after the first attend to the last w positions only, their own included. None: to all.
    sinks    with attention: the first positions, so many, stay visible as well.
    halt     tau > 0: once a pass moves the states of a batch's tokens by less than tau of their norms on average,
             mean ||y'_t - y_t|| / ||y_t||, no more passes run. Solver euler, unanchored and unreduced, or naive; not
             with kv='each'. None: all run.

    Raises UsageError naming the value and the rule.
    """

    window: tuple[int, int]
    k: int
    mode: str = "block"
    solver: str = "euler"
    damping: float | None = None
    beta: float = 0.0
    mu: float | None = None
    passes: int | None = None
    kv: str = None  # type: ignore[assignment]  # None only as an argument; __post_init__ resolves it
    decode: str = "full"
    routing: str = None  # type: ignore[assignment]  # as kv
    attention: int | None = None
    sinks: int = 0
    halt: float | None = None
    _tableau: Tableau = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("window", _check_window(self.window))
        _known(self.mode, "mode", MODES)
        solver = _SOLVERS[_known(self.solver, "solver", SOLVERS)]
        put("k", _whole(self.k, "K", 1, MAX_EVALUATIONS, "3 is a good start; 1 is the unmodified model."))
        evaluations = self.k * solver.evaluations_per_step
        if evaluations > MAX_EVALUATIONS:
            raise UsageError(
                f"K {self.k} with solver {self.solver} needs {evaluations} evaluations, more than {MAX_EVALUATIONS}.",
                f"use K {MAX_EVALUATIONS // solver.evaluations_per_step} at most.",
            )
        put("kv", _known(_kv(self.solver) if self.kv is None else self.kv, "kv", KV_POLICIES))
        if self.solver == "repeat" and self.kv != "each":
            raise UsageError(f"solver repeat cannot run with kv {self.kv}.", "it means naive with kv=each; use naive.")
        if self.damping is not None:
            put("damping", _real(self.damping, "damping", 0.0, 2.0, "leave it out for 1/K."))
            if self.damping == 0.0:
                raise UsageError("damping 0 would leave the state as it is.", "give a damping above 0, or no loop.")
            if solver.undamped:
                raise UsageError(
                    f"solver {self.solver} has no damping.", "use euler, of which it is the case damping 1."
                )
            if evaluations == 1 and self.damping != 1.0:
                raise UsageError(f"damping {self.damping:g} needs K 2 or more.", "K 1 is the unmodified model.")
        put("beta", _real(self.beta, "beta", 0.0, 1.0, "0 is no anchor, 0.5 a robust one."))
        if self.beta and self.solver != "euler":
            raise UsageError(
                f"beta {self.beta:g} needs solver euler, not {self.solver}.", "leave out --beta or --solver."
            )
        if self.mu is not None:
            put("mu", _real(self.mu, "mu", 0.0, 1.0, "leave it out for 0.5."))
            if self.solver != "heavy-ball" or self.mu == 1.0:
                raise UsageError(f"mu {self.mu:g} needs solver heavy-ball and a value below 1.", "leave out --mu.")
        if self.passes is not None:
            put("passes", _whole(self.passes, "passes", 2, MAX_EVALUATIONS, "use 3: it is the most exact."))
            if self.solver != "euler" or self.damping is not None:
                raise UsageError(
                    "passes needs solver euler and its own damping 1/K.", "leave out --solver and --damping."
                )
            if 3 < self.passes < self.k:
                raise UsageError(
                    f"passes {self.passes} is neither 2, 3 nor at least K {self.k}.", "use 3: it is the most exact."
                )
        parse_decode(_known_type(self.decode, "decode"))
        put("routing", _known(_routing(self.mode) if self.routing is None else self.routing, "routing", ROUTINGS))
        if self.attention is not None:
            put("attention", _whole(self.attention, "attention", 1, _MOST_POSITIONS, "leave it out to see all."))
        put("sinks", _whole(self.sinks, "sinks", 0, _MOST_POSITIONS, "4 is usual, 0 keeps none."))
        if self.sinks and self.attention is None:
            raise UsageError(f"sinks {self.sinks} needs attention.", "say how many last positions stay visible too.")
        if self.halt is not None:
            self._check_halt()
        put("_tableau", self._make_tableau(solver))

    def _check_halt(self) -> None:
        object.__setattr__(self, "halt", _real(self.halt, "halt", 0.0, math.inf, "leave it out to run all passes."))
        if self.halt == 0.0:
            raise UsageError("halt 0 would never stop a loop.", "give a residual above 0, or leave it out.")
        if self.solver not in ("euler", "naive") or self.beta or self.passes is not None:
            raise UsageError(
                f"halt {self.halt:g} needs solver euler without beta and passes, or naive.",
                "leave out --solver, --beta and --passes.",
            )
        if self.kv == "each":  # a pass that did not run would leave its slot without K/V
            raise UsageError(f"halt {self.halt:g} cannot run with kv each.", "use kv first, last or frozen.")

    def _make_tableau(self, solver: _Solver) -> Tableau:
        if self.passes is not None and self.passes < self.k and self.beta < 1:
            return _reduce(self.k, self.beta, self.passes)
        mu = (0.5 if self.mu is None else self.mu) if self.solver == "heavy-ball" else 0.0
        return _trim(_trace(solver, self.k, self.h, mu, self.beta))

    @property
    def h(self) -> float:
        """The weight of one evaluation in one step: the damping given, else 1/k, and 1 for naive and repeat."""
        if _SOLVERS[self.solver].undamped:
            return 1.0
        return 1 / self.k if self.damping is None else self.damping

    @property
    def horizon(self) -> float | None:
        """K h, the 'time' an integrating solver covers (1 by default); None for the others."""
        return None if self.solver in ("input-anchor", "heavy-ball") else self.k * self.h

    @property
    def is_loop(self) -> bool:
        """False for a plan of one evaluation, which is the unmodified model (K = 1, or beta = 1)."""
        return self._tableau.evaluations > 1

    @property
    def depends_on_cuts(self) -> bool:
        """Whether a text computes something else when it is cut into batches elsewhere."""
        return self.kv in ("first", "last") or self.halt is not None

    @property
    def layers(self) -> int:
        """Number of layers in the window."""
        return self.window[1] - self.window[0]

    def tableau(self) -> Tableau:
        """(A, B) with at most MAX_EVALUATIONS evaluations."""
        return self._tableau

    def decode_loops(self) -> int | None:
        """How many generated tokens after a prompt loop; None for all, 0 where `decode_entropy` decides."""
        return parse_decode(self.decode)[0]

    def decode_entropy(self) -> float | None:
        """The entropy in nats above which a generated token, evaluated plain, is evaluated again looped; or None."""
        return parse_decode(self.decode)[1]

    def check(self, n_layer: int) -> None:
        """Raise UsageError unless the window lies inside a model of `n_layer` layers, its first and last excluded."""
        a, b = self.window
        if n_layer < 3:
            raise UsageError(f"a model of {n_layer} layers has no window to loop.", "it needs at least 3 layers.")
        if b > n_layer:
            raise UsageError(
                f"window {a}:{b} is out of range: this model has {n_layer} layers.", f"use 1:{n_layer - 1} at most."
            )
        if b == n_layer:
            raise UsageError(
                f"window {a}:{b} touches layer {n_layer - 1}, the last one, which cannot be looped.",
                f"use 1:{n_layer - 1} at most.",
            )

    def check_recurrent(self) -> None:
        """Raise UsageError unless this loop is defined for a window in which layers are recurrent."""
        what = "{}:{} has recurrent layers".format(*self.window)
        if self.kv in ("last", "frozen"):
            raise UsageError(
                f"window {what}, which store one state of all positions: kv {self.kv} would need one of each.",
                "use kv first or each.",
            )
        if self.decode_entropy() is not None:
            raise UsageError(
                f"window {what}, whose state a token cannot be taken out of again: decode {self.decode} would have to.",
                "use decode full or bypass.",
            )
        if self.kv == "each" and self.decode != "full":
            raise UsageError(
                f"window {what}, and with kv each a state per pass: a token with one pass, as in decode {self.decode}, "
                "would leave the other states behind.",
                "use decode full, or kv first.",
            )

    def extra_layer_evaluations(self) -> int:
        """Layer evaluations per looped token beyond the plain model's; kv='last' adds the run that stores its K/V."""
        if not self.is_loop:
            return 0
        return (self._tableau.evaluations - 1 + (self.kv == "last")) * self.layers

    def relative_cost(self, n_layer: int) -> float:
        """Layer evaluations of a looped token over a plain one's: 1 + (evaluations - 1)(b - a) / n_layer.

        An upper bound (`costs_less`) for kv='frozen', whose later passes compute no K and V, for halt, which may
        leave passes out, and for attention, which shortens what later passes read; how much shorter depends on the
        context, and a backend that masks positions instead of leaving them out saves nothing.
        """
        return 1 + self.extra_layer_evaluations() / n_layer

    @property
    def costs_less(self) -> bool:
        """Whether `relative_cost` is an upper bound, some evaluations being shorter than a plain one or left out."""
        return self.is_loop and (self.kv == "frozen" or self.attention is not None or self.halt is not None)

    def extra_kv_slots(self) -> int:
        """Additional K/V slots each window layer needs: evaluations - 1 with kv='each', else none."""
        return self._tableau.evaluations - 1 if self.kv == "each" and self.is_loop else 0

    def extra_kv_bytes(self, layer_kv_bytes: Iterable[int]) -> int:
        """Bytes of K/V this loop adds, given the bytes the plain cache holds for each layer of the model.

        `layer_kv_bytes` already knows the kv types and sliding windows (see `inspect.plain_kv_bytes`).
        """
        a, b = self.window
        return self.extra_kv_slots() * sum(list(layer_kv_bytes)[a:b])

    @classmethod
    def parse(cls, text: str) -> LoopSpec:
        """'14:20 k=3 beta=0.5 kv=each' -> LoopSpec; the inverse of str(). Raises UsageError.

        llama-loop-text.cpp of the patch reads the same text, with the same words for what is wrong.
        """
        odd = next((i for i, c in enumerate(text) if not " " <= c <= "~" or c in "'\"\\"), None)
        if odd is not None:  # so that C++ can quote whatever is left as Python does
            raise UsageError(f"a loop has no such character as its number {odd + 1}.", _LIKE)
        if len(text) > _MOST_TEXT:
            raise UsageError(f"a loop of {len(text)} characters is too long.", _LIKE)
        words = text.split()
        if not words or "=" in words[0]:
            raise UsageError(f"loop {text!r} does not start with a window.", _LIKE)
        kinds: dict[str, type] = {
            "k": int, "mode": str, "solver": str, "damping": float, "beta": float,
            "mu": float, "passes": int, "kv": str, "decode": str,
            "routing": str, "attention": int, "sinks": int, "halt": float,
        }  # fmt: skip
        values: dict[str, Any] = {}
        for word in words[1:]:
            name, eq, value = word.partition("=")
            name = name.lower()
            if not eq:
                raise UsageError(f"loop setting {word!r} is not of the form name=value.", nearest(name, kinds))
            if name not in kinds:
                raise UsageError(f"loop setting {name!r} is not known.", nearest(name, kinds))
            if name in values:
                raise UsageError(f"loop setting {name} is given twice.", "give it once.")
            form, rule, example = _FORMS[kinds[name]]
            if not form.fullmatch(value):
                raise UsageError(f"{name} {value!r} is not a {rule}.", f"write it like {name}={example}.")
            values[name] = kinds[name](value)
        if "k" not in values:
            raise UsageError(f"loop {text!r} has no k.", "write it like '14:20 k=3'.")
        return cls(parse_window(words[0]), **values)

    def __str__(self) -> str:
        """The settings that differ from the defaults, in the form `parse` reads."""
        words = [f"{self.window[0]}:{self.window[1]}", f"k={self.k}"]
        derived = {"kv": _kv(self.solver), "routing": _routing(self.mode)}
        for f in fields(self)[2:]:
            if not f.init:
                continue
            value = getattr(self, f.name)
            if value != derived.get(f.name, f.default):
                words.append(f"{f.name}={value!r}" if isinstance(value, float) else f"{f.name}={value}")
        return " ".join(words)


def _kv(solver: str) -> str:
    """What kv is where nothing is said."""
    return "each" if solver == "repeat" else "first"


def _routing(mode: str) -> str:
    """What routing is where nothing is said."""
    return "frozen" if mode == "layer" else "free"


def _known_type(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} {value!r} is not a word.", f"give {name} as text.")
    return value
