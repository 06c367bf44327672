"""What a loop is: `LoopSpec`, whose fields are the table of a loop's settings; its cost and its KV memory. No I/O.

    spec = LoopSpec.parse("14:20 k=3 beta=0.5 kv=each decode=bypass")
    spec.tableau().A                     # what the compute graph is given
    spec.relative_cost(n_layer=30)       # layer evaluations, looped over plain
    schema()                             # what a loop is as JSON

A new setting is a field here and the C++ that does it: text, flags, schema, C struct and the page's controls follow.
`setting.py` says what a row holds. What settings mean beside each other is in `_RULES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from operator import index
from typing import Any

from ggufloop import solvers
from ggufloop.errors import UsageError, nearest
from ggufloop.setting import Argument, Setting, Word, is_whole, row, settings
from ggufloop.solvers import Tableau

MAX_EVALUATIONS = 64
"""Most evaluations of the window one plan may hold (`LLAMA_LOOP_MAX_EVALS` of the patch)."""

DEFAULT_K = 3
"""What interfaces take where a loop is asked for without K. A LoopSpec and its text always say it."""

_LAYERS = re.compile(r"\s*(\d{1,9})\s*([:-])\s*(\d{1,9})\s*", re.ASCII)
_MOST_TEXT = 512
_MOST_POSITIONS = 2**31 - 1  # llama_pos is an int32
_LIKE = "write it like '14:20 k=3 kv=each'."


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
    if not (isinstance(window, (tuple, list)) and len(window) == 2 and all(is_whole(i) for i in window)):
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


@dataclass(frozen=True)
class LoopSpec:
    """One loop, complete: which layers, how often, by which rule, what passes see and what the cache holds.

    The fields are the settings; None, where it is no value, is a setting left out. Raises UsageError naming the value
    and the rule.
    """

    # (a, b), half-open: layers a .. b-1, with 1 <= a < b <= n_layer - 1. '14:20' is accepted.
    window: tuple[int, int] = row(
        tuple, MISSING, "Loop layers A to B-1 (half-open), or 'auto'", metavar="A:B", many=True,
    )  # fmt: skip
    # With one evaluation per step, the number of passes.
    k: int = row(
        int, MISSING, "Outer steps of the solver; 1 is the plain model", low=1, high=MAX_EVALUATIONS,
        hint="3 is a good start; 1 is the unmodified model.", usually=str(DEFAULT_K), start=DEFAULT_K, label="K",
        flag="--K", metavar="K", many=True, control=True,
    )  # fmt: skip
    mode: str = row(
        str, "block", "How the window is looped", many=True, in_plan=True,
        words={
            "block": Word("the window is iterated as one map"),
            "layer": Word("each layer of the window is finished before the next"),
        },
    )  # fmt: skip
    # 'repeat' is 'naive' with kv='each' (RYS, layer duplication).
    solver: str = row(
        str, "euler", "The rule of the steps", many=True, control=True,
        words={
            name: Word(solver.meaning, evaluations=solver.evaluations_per_step)
            for name, solver in solvers.SOLVERS.items()
        },
    )  # fmt: skip
    # h (alpha for input-anchor and heavy-ball), above 0; 1 for naive and repeat.
    damping: float | None = row(
        float, None, "Weight of one evaluation in one step", high=2, hint="leave it out for 1/K.", usually="1/K",
    )  # fmt: skip
    # Weight of g(x0) in the result, euler only; 0.5 is the paper's robust default.
    beta: float = row(
        float, 0.0, "Anchor: weight of the plain result, 0 to 1", high=1, hint="0 is no anchor, 0.5 a robust one.",
        metavar="X", many=True,
    )  # fmt: skip
    # Below 1; 0 for the other solvers.
    mu: float | None = row(
        float, None, "Momentum of heavy-ball", high=1, hint="leave it out for 0.5.", usually="0.5",
    )  # fmt: skip
    # The same B-series weights as the K steps have (`solvers.reduced`).
    passes: int | None = row(
        int, None, "Run the K euler steps in 2 or 3 evaluations", low=2, high=MAX_EVALUATIONS,
        hint="use 3: it is the most exact.",
    )  # fmt: skip
    kv: str = row(
        str, "first", "What the cache holds", unless=("solver", "repeat", "each"), metavar="POLICY", many=True,
        in_plan=True, control=True,
        words={
            "first": Word("the cache keeps the first pass"),
            "last": Word("the cache keeps the result, for one more pass"),
            "each": Word("every pass has a cache of its own, which the server must be started for"),
            "frozen": Word("later passes read the first one's keys and values"),
        },
    )  # fmt: skip
    # The prompt always loops. With 'entropy:t' a token is evaluated plain, and again looped if its next-token
    # distribution has an entropy above t nats.
    decode: str = row(
        str, "full", "Which generated tokens loop, with entropy:t those the plain model is unsure of", control=True,
        metavar="POLICY",
        words={
            "full": Word("prompt and answer loop"),
            "bypass": Word("the prompt loops, the answer is written plain"),
            "first": Word("the prompt loops, and the answer's first tokens", Argument(int, "n", "Tokens", 1, 16)),
            "entropy": Word("the prompt loops, and unsure tokens", Argument(float, "t", "Nats", 0, 1), served=False),
        },
    )  # fmt: skip
    # Nothing without experts.
    routing: str = row(
        str, "free", "Experts of later passes", unless=("mode", "layer", "frozen"), in_plan=True,
        words={
            "free": Word("every pass routes its state to experts anew"),
            "frozen": Word("the experts and weights a layer's first pass chose serve all its passes"),
        },
    )  # fmt: skip
    # Their own position included.
    attention: int | None = row(
        int, None, "Passes after the first attend to the last W positions only", low=1, high=_MOST_POSITIONS,
        hint="leave it out to see all.", flag="--loop-attention", metavar="W", in_plan=True,
    )  # fmt: skip
    sinks: int = row(
        int, 0, "With --loop-attention: and to the first S positions", high=_MOST_POSITIONS,
        hint="4 is usual, 0 keeps none.", flag="--loop-sinks", metavar="S", in_plan=True,
    )  # fmt: skip
    # tau > 0: what is compared is mean ||y'_t - y_t|| / ||y_t|| over a batch's tokens. Solver euler, unanchored and
    # unreduced, or naive; not with kv='each'.
    halt: float | None = row(
        float, None, "Run no further pass for a batch once one moves its tokens by less than this share",
        hint="leave it out to run all passes.", metavar="TAU", in_plan=True,
    )  # fmt: skip
    _tableau: Tableau = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, setting in settled(type(self)).items():
            value = getattr(self, name)
            if value is None:
                value = setting.usual(self)
            if name == "window":
                value = _check_window(value)
            elif value is not None or setting.required:
                value = setting.check(value)
            object.__setattr__(self, name, value)
            if name in _RULES:
                _RULES[name](self)
        object.__setattr__(self, "_tableau", self._make_tableau())

    def _make_tableau(self) -> Tableau:
        if self.passes is not None and self.passes < self.k and self.beta < 1:
            return solvers.reduced(self.k, self.beta, self.passes)
        mu = (0.5 if self.mu is None else self.mu) if self.solver == "heavy-ball" else 0.0
        return solvers.tableau(solvers.SOLVERS[self.solver], self.k, self.h, mu, self.beta)

    @property
    def h(self) -> float:
        """The weight of one evaluation in one step: the damping given, else 1/k, and 1 for naive and repeat."""
        if solvers.SOLVERS[self.solver].undamped:
            return 1.0
        return 1 / self.k if self.damping is None else self.damping

    @property
    def horizon(self) -> float | None:
        """K h, the 'time' an integrating solver covers (1 by default); None for the others."""
        return None if self.solver in ("input-anchor", "heavy-ball", "average") else self.k * self.h

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
        known = {name: setting for name, setting in settings(cls).items() if name != "window"}
        values: dict[str, Any] = {}
        for word in words[1:]:
            name, eq, value = word.partition("=")
            name = name.lower()
            if not eq:
                raise UsageError(f"loop setting {word!r} is not of the form name=value.", nearest(name, known))
            if name not in known:
                raise UsageError(f"loop setting {name!r} is not known.", nearest(name, known))
            if name in values:
                raise UsageError(f"loop setting {name} is given twice.", "give it once.")
            values[name] = known[name].read(value)
        if "k" not in values:
            raise UsageError(f"loop {text!r} has no k.", "write it like '14:20 k=3'.")
        return cls(parse_window(words[0]), **values)

    @property
    def flags(self) -> str:
        """As the command line takes it: '--window 12:16 --K 3 --solver heun'."""
        window, *words = str(self).split()
        pairs = [("window", window), *(word.split("=", 1) for word in words)]
        return " ".join(f"{settings(LoopSpec)[name].flag} {value}" for name, value in pairs)

    def __str__(self) -> str:
        """The settings that differ from the defaults, in the form `parse` reads."""
        words = ["{}:{}".format(*self.window)]
        for name, setting in settings(type(self)).items():
            value = getattr(self, name)
            if name != "window" and value != setting.usual(self):
                words.append(f"{name}={value!r}" if isinstance(value, float) else f"{name}={value}")
        return " ".join(words)


def _rule_of_k(loop: LoopSpec) -> None:
    per_step = solvers.SOLVERS[loop.solver].evaluations_per_step
    if loop.k * per_step > MAX_EVALUATIONS:
        raise UsageError(
            f"K {loop.k} with solver {loop.solver} needs {loop.k * per_step} evaluations, more than {MAX_EVALUATIONS}.",
            f"use K {MAX_EVALUATIONS // per_step} at most.",
        )


def _rule_of_kv(loop: LoopSpec) -> None:
    if loop.solver == "repeat" and loop.kv != "each":
        raise UsageError(f"solver repeat cannot run with kv {loop.kv}.", "it means naive with kv=each; use naive.")


def _rule_of_damping(loop: LoopSpec) -> None:
    if loop.damping is None:
        return
    solver = solvers.SOLVERS[loop.solver]
    if loop.damping == 0.0:
        raise UsageError("damping 0 would leave the state as it is.", "give a damping above 0, or no loop.")
    if solver.undamped:
        raise UsageError(f"solver {loop.solver} has no damping.", "leave out --damping; euler has one.")
    if loop.k * solver.evaluations_per_step == 1 and loop.damping != 1.0:
        raise UsageError(f"damping {loop.damping:g} needs K 2 or more.", "K 1 is the unmodified model.")


def _rule_of_beta(loop: LoopSpec) -> None:
    if loop.beta and loop.solver != "euler":
        raise UsageError(f"beta {loop.beta:g} needs solver euler, not {loop.solver}.", "leave out --beta or --solver.")


def _rule_of_mu(loop: LoopSpec) -> None:
    if loop.mu is not None and (loop.solver != "heavy-ball" or loop.mu == 1.0):
        raise UsageError(f"mu {loop.mu:g} needs solver heavy-ball and a value below 1.", "leave out --mu.")


def _rule_of_passes(loop: LoopSpec) -> None:
    if loop.passes is None:
        return
    if loop.solver != "euler" or loop.damping is not None:
        raise UsageError("passes needs solver euler and its own damping 1/K.", "leave out --solver and --damping.")
    if 3 < loop.passes < loop.k:
        raise UsageError(
            f"passes {loop.passes} is neither 2, 3 nor at least K {loop.k}.", "use 3: it is the most exact."
        )


def _rule_of_sinks(loop: LoopSpec) -> None:
    if loop.sinks and loop.attention is None:
        raise UsageError(f"sinks {loop.sinks} needs attention.", "say how many last positions stay visible too.")


def _rule_of_halt(loop: LoopSpec) -> None:
    if loop.halt is None:
        return
    if loop.halt == 0.0:
        raise UsageError("halt 0 would never stop a loop.", "give a residual above 0, or leave it out.")
    if loop.solver not in ("euler", "naive") or loop.beta or loop.passes is not None:
        raise UsageError(
            f"halt {loop.halt:g} needs solver euler without beta and passes, or naive.",
            "leave out --solver, --beta and --passes.",
        )
    if loop.kv == "each":  # a pass that did not run would leave its slot without K/V
        raise UsageError(f"halt {loop.halt:g} cannot run with kv each.", "use kv first, last or frozen.")


_RULES: dict[str, Callable[[LoopSpec], None]] = {
    "k": _rule_of_k, "kv": _rule_of_kv, "damping": _rule_of_damping, "beta": _rule_of_beta, "mu": _rule_of_mu,
    "passes": _rule_of_passes, "sinks": _rule_of_sinks, "halt": _rule_of_halt,
}  # fmt: skip
"""What a setting may be beside those settled before it; the patch's C++ refuses in the same order and words."""

MODES, SOLVERS, KV_POLICIES, ROUTINGS, DECODES = (
    tuple(settings(LoopSpec)[name].known()) for name in ("mode", "solver", "kv", "routing", "decode")
)


def settled(loop: type[LoopSpec] = LoopSpec) -> dict[str, Setting]:
    """The table in the order in which settings are checked: mode and solver say what numbers may be."""
    table = settings(loop)
    return {name: table[name] for name in ("window", "mode", "solver", "k", "kv")} | table


def schema(loop: type[LoopSpec] = LoopSpec) -> dict[str, Any]:
    """A loop as JSON, in a request to the server, as a JSON schema; the page makes its controls of it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "loop",
        "type": "object",
        "properties": {name: setting.schema() for name, setting in settings(loop).items()},
        "required": ["window", "k"],
        "additionalProperties": False,
    }


def parse_decode(text: str) -> tuple[int | None, float | None]:
    """How many generated tokens loop after a prompt, and the entropy above which one does all the same.

    'full' -> (None, None), None meaning all of them; 'bypass' -> (0, None); 'first:n' -> (n, None);
    'entropy:t' -> (0, t). Raises UsageError.
    """
    word, _, value = str(settings(LoopSpec)["decode"].check(text)).partition(":")
    if word == "entropy":
        return 0, float(value)
    return (int(value) if word == "first" else None if word == "full" else 0), None


def as_loop(loop: LoopSpec | str | Mapping[str, Any] | None) -> LoopSpec | None:
    """A loop from a LoopSpec, its text or a table of its settings; without K it is DEFAULT_K. None is the plain model.

    Raises UsageError as `LoopSpec` and `LoopSpec.parse` do, and for a setting that is not known.
    """
    if loop is None or isinstance(loop, LoopSpec):
        return loop
    if isinstance(loop, str):
        words = loop.split()
        if words and not any(word.lower().startswith("k=") for word in words):
            loop = " ".join([words[0], f"k={DEFAULT_K}", *words[1:]])
        return LoopSpec.parse(loop)
    if not isinstance(loop, Mapping):
        raise UsageError(f"{loop!r} is no loop.", _LIKE)
    odd = next((name for name in loop if name not in settings(LoopSpec)), None)
    if odd is not None:
        raise UsageError(f"loop setting {odd!r} is not known.", nearest(str(odd), settings(LoopSpec)))
    if "window" not in loop:
        raise UsageError("a loop has a window, and this has none.", "write it like {'window': '14:20', 'k': 3}.")
    return LoopSpec(**{"k": DEFAULT_K, **loop})


PLAIN = "plain"
"""What the model without a loop is called wherever loops are named."""


def loop_text(loop: LoopSpec | None) -> str:
    """What journals and tables call a loop."""
    return PLAIN if loop is None else str(loop)


def loop_of(text: str) -> LoopSpec | None:
    """The inverse of `loop_text`. Raises UsageError as `LoopSpec.parse` does."""
    return None if text == PLAIN else LoopSpec.parse(text)
