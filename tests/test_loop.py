"""LoopSpec and its tableaux: they say what the update rules of the reference do, and bad values say what is wrong.

The oracle for every tableau is `reference.solvers`, the same rules as explicit loops on states.
"""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.solvers import elementary_weights, evaluations, solve
from reference.tableau import apply

from ggufloop.errors import UsageError
from ggufloop.loop import (
    KV_POLICIES,
    MAX_EVALUATIONS,
    MODES,
    ROUTINGS,
    SOLVERS,
    LoopSpec,
    parse_decode,
    parse_window,
)

settings.register_profile("busy", deadline=None)  # a loaded machine is not a failure
settings.load_profile("busy")

W = (14, 20)
PER_STEP = {"midpoint": 2, "heun": 2, "rk4": 4}


@st.composite
def specs(draw: st.DrawFn, most: int = MAX_EVALUATIONS) -> LoopSpec:
    """Any valid LoopSpec of at most `most` evaluations."""
    a = draw(st.integers(1, 200))
    solver = draw(st.sampled_from(SOLVERS))
    k = draw(st.integers(1, most // PER_STEP.get(solver, 1)))
    settings: dict[str, object] = {"solver": solver, "mode": draw(st.sampled_from(MODES))}
    settings["kv"] = "each" if solver == "repeat" else draw(st.sampled_from(KV_POLICIES))
    settings["decode"] = draw(
        st.one_of(
            st.sampled_from(["full", "bypass"]),
            st.integers(1, 99).map(lambda n: f"first:{n}"),
            st.floats(0, 99).map(lambda t: f"entropy:{t!r}"),
        )
    )
    settings["routing"] = draw(st.none() | st.sampled_from(ROUTINGS))
    settings["attention"] = draw(st.none() | st.integers(1, 2**31 - 1))
    if settings["attention"] is not None:
        settings["sinks"] = draw(st.integers(0, 2**31 - 1))
    if solver not in ("naive", "repeat", "average") and (k > 1 or solver in PER_STEP):
        settings["damping"] = draw(st.none() | st.floats(1e-3, 2))
    if solver == "euler":
        settings["beta"] = draw(st.just(0) | st.floats(0, 1))
        if settings.get("damping") is None:
            settings["passes"] = draw(st.none() | st.sampled_from([2, 3]) | st.integers(max(k, 2), MAX_EVALUATIONS))
    stops = solver == "naive" or (solver == "euler" and not settings["beta"] and settings.get("passes") is None)
    if stops and settings["kv"] != "each":
        settings["halt"] = draw(st.none() | st.floats(0, exclude_min=True, allow_infinity=False))
    if solver == "heavy-ball":
        settings["mu"] = draw(st.none() | st.floats(0, 1, exclude_max=True))
    return LoopSpec((a, a + draw(st.integers(1, 9))), k, **settings)


@given(specs())
def test_text_round_trip(spec: LoopSpec) -> None:
    assert LoopSpec.parse(str(spec)) == spec


@given(specs())
def test_tableau_is_explicit_and_counts_evaluations(spec: LoopSpec) -> None:
    t = spec.tableau()
    assert t.A.shape == (t.evaluations, t.evaluations)
    assert not np.triu(t.A).any()
    assert t.evaluations == evaluations(spec) <= MAX_EVALUATIONS
    assert spec.is_loop == (t.evaluations > 1)


@given(specs(most=12), st.integers(0, 2**32 - 1))
def test_tableau_is_the_update_rule(spec: LoopSpec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, b, x0 = rng.standard_normal((4, 4)), rng.standard_normal(4), rng.standard_normal(4)

    def g(x: np.ndarray) -> np.ndarray:
        return x + 0.5 * np.sin(w @ x + b)

    np.testing.assert_allclose(apply(spec.tableau(), g, x0), solve(spec, g, x0), rtol=1e-7, atol=1e-7)


@given(st.integers(3, MAX_EVALUATIONS), st.floats(0, 0.99), st.sampled_from([2, 3]))
def test_reduced_tableau_meets_the_order_conditions(k: int, beta: float, passes: int) -> None:
    spec = LoopSpec(W, k, beta=beta, passes=passes)
    t = spec.tableau()
    assert t.evaluations == min(passes, k)
    c = t.A.sum(axis=1)
    s = 1 - beta
    weights = [s * (k - 1) / (2 * k), s * (k - 1) * (2 * k - 1) / (6 * k**2), s * (k - 1) * (k - 2) / (6 * k**2)]
    np.testing.assert_allclose(elementary_weights(k, beta), weights, atol=1e-12)
    assert t.B.sum() == pytest.approx(1)
    assert [t.B @ c, t.B @ c**2] == pytest.approx(weights[:2])
    if passes == 3:
        assert t.B @ t.A @ c == pytest.approx(weights[2])


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize(("k", "passes"), [(1, 2), (2, 2), (2, 3), (3, 3), (6, 6)])
def test_enough_passes_reduce_nothing(k: int, passes: int, beta: float) -> None:
    reduced, full = LoopSpec(W, k, beta=beta, passes=passes).tableau(), LoopSpec(W, k, beta=beta).tableau()
    np.testing.assert_array_equal(reduced.A, full.A)
    np.testing.assert_array_equal(reduced.B, full.B)


def test_tableaux_of_the_specification() -> None:
    third = 1 / 3
    euler = LoopSpec(W, 3).tableau()
    np.testing.assert_allclose(euler.A, [[0, 0, 0], [third, 0, 0], [third, third, 0]])
    np.testing.assert_allclose(euler.B, [third] * 3)
    np.testing.assert_allclose(LoopSpec(W, 3, beta=0.5).tableau().B, [0.5 + 0.5 / 3, 0.5 / 3, 0.5 / 3])
    naive = LoopSpec(W, 2, solver="naive").tableau()
    assert (naive.A.tolist(), naive.B.tolist()) == ([[0, 0], [1, 0]], [1, 1])
    rk4 = LoopSpec(W, 1, solver="rk4").tableau()
    np.testing.assert_allclose(rk4.A, [[0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 1, 0]])
    np.testing.assert_allclose(rk4.B, np.array([1, 2, 2, 1]) / 6)


@pytest.mark.parametrize(
    ("text", "evaluations", "extra", "slots"),
    [
        ("14:20 k=1", 1, 0, 0),
        ("14:20 k=1 kv=last", 1, 0, 0),
        ("14:20 k=6 beta=1 kv=each", 1, 0, 0),
        ("14:20 k=3", 3, 12, 0),
        ("14:20 k=3 kv=last", 3, 18, 0),
        ("14:20 k=3 kv=each", 3, 12, 2),
        ("14:20 k=3 kv=frozen", 3, 12, 0),
        ("14:20 k=2 solver=repeat", 2, 6, 1),
        ("14:20 k=2 solver=rk4", 8, 42, 0),
        ("14:20 k=6 passes=3", 3, 12, 0),
    ],
)
def test_cost_and_memory(text: str, evaluations: int, extra: int, slots: int) -> None:
    spec = LoopSpec.parse(text)
    assert spec.tableau().evaluations == evaluations
    assert spec.is_loop == (evaluations > 1)
    assert spec.extra_layer_evaluations() == extra
    assert spec.relative_cost(30) == 1 + extra / 30
    assert spec.extra_kv_slots() == slots
    assert spec.extra_kv_bytes([0] * 14 + [100, 100, 300, 100, 100, 100] + [7] * 10) == slots * 800


@pytest.mark.parametrize(
    ("text", "less"),
    [("k=3", False), ("k=3 kv=last routing=frozen", False), ("k=3 kv=frozen", True), ("k=3 attention=8", True),
     ("k=3 halt=0.1", True), ("k=1 halt=0.1 attention=8 kv=frozen", False)],
)  # fmt: skip
def test_when_the_cost_is_a_bound(text: str, less: bool) -> None:
    assert LoopSpec.parse(f"14:20 {text}").costs_less == less


def test_settings_that_follow_from_others() -> None:
    assert LoopSpec("14:20", 3) == LoopSpec(W, 3, kv="first", damping=None)
    assert LoopSpec(W, 2, solver="repeat").kv == "each"
    assert [LoopSpec(W, 4, solver=s).h for s in ("euler", "naive", "input-anchor")] == [0.25, 1, 0.25]
    assert LoopSpec(W, 4, damping=0.5).horizon == 2
    assert LoopSpec(W, 4, solver="heavy-ball").horizon is None
    decodes = [LoopSpec(W, 2, decode=d) for d in ("full", "bypass", "first:7", "entropy:1.5", "entropy:.5e-1")]
    assert [spec.decode_loops() for spec in decodes] == [None, 0, 7, 0, 0]
    assert [spec.decode_entropy() for spec in decodes] == [None, None, None, 1.5, 0.05]
    assert [LoopSpec(W, 2, mode=mode).routing for mode in MODES] == ["free", "frozen"]
    assert str(LoopSpec(W, 2, mode="layer", routing="free")) == "14:20 k=2 mode=layer routing=free"
    assert (
        str(LoopSpec(W, 2, routing="free", attention=8, sinks=2, halt=0.5)) == "14:20 k=2 attention=8 sinks=2 halt=0.5"
    )
    for n_layer in (21, 30):
        LoopSpec(W, 3).check(n_layer)


_RANGE = "is not a whole number in the range"
_SOLVERS = "euler, naive, repeat, midpoint, heun, rk4, input-anchor, heavy-ball, average."
_WRITE = "write it like 14:20, layers 14 to 19."
_DECODE = "full, bypass, first:n (n >= 1), entropy:t (t >= 0)."
_K = "3 is a good start; 1 is the unmodified model."
_DAMPING = "leave it out for 1/K."
_BETA = "0 is no anchor, 0.5 a robust one."
_PASSES = "use 3: it is the most exact."
_HALT = "leave it out to run all passes."
_HALT_RULE = "needs solver euler without beta and passes, or naive."

BAD_SETTINGS = [
    ({"window": (20, 14)}, "window 20:14 is empty: its end must be greater than its start.",
     "windows are half-open, first:end. Did you mean 14:20?"),
    ({"window": (14, 14)}, "window 14:14 is empty: its end must be greater than its start.",
     "windows are half-open, first:end."),
    ({"window": (0, 4)}, "window 0:4 touches layer 0, which cannot be looped.", "start it at layer 1 or later."),
    ({"window": (14, 20.0)}, "window (14, 20.0) is not a pair of layer numbers.", _WRITE),
    ({"window": "14-19"}, "window 14-19 is not of the form first:end.",
     "windows are half-open: layers 14 to 19 are --window 14:20."),
    ({"k": 0}, f"K 0 {_RANGE} 1 to 64.", _K),
    ({"k": -1}, f"K -1 {_RANGE} 1 to 64.", _K),
    ({"k": 10**9}, f"K 1000000000 {_RANGE} 1 to 64.", _K),
    ({"k": 2.5}, f"K 2.5 {_RANGE} 1 to 64.", _K),
    ({"k": True}, f"K True {_RANGE} 1 to 64.", _K),
    ({"k": "3"}, f"K '3' {_RANGE} 1 to 64.", _K),
    ({"k": 17, "solver": "rk4"}, "K 17 with solver rk4 needs 68 evaluations, more than 64.", "use K 16 at most."),
    ({"mode": "blok"}, "mode 'blok' is not known.", "did you mean block? Known: block, layer."),
    ({"solver": "eulr"}, "solver 'eulr' is not known.", f"did you mean euler? Known: {_SOLVERS}"),
    ({"solver": "anderson"}, "solver 'anderson' is not known.", f"known: {_SOLVERS}"),
    ({"solver": "repeat", "kv": "first"}, "solver repeat cannot run with kv first.",
     "it means naive with kv=each; use naive."),
    ({"kv": "frist"}, "kv 'frist' is not known.", "did you mean first? Known: first, last, each, frozen."),
    ({"kv": ""}, "kv '' is not known.", "known: first, last, each, frozen."),
    ({"decode": "bypas"}, "decode 'bypas' is not known.", f"did you mean bypass? Known: {_DECODE}"),
    ({"decode": "first:0"}, "decode 'first:0' is not known.", f"known: {_DECODE}"),
    ({"decode": "entropy"}, "decode 'entropy' is not known.", f"known: {_DECODE}"),
    ({"decode": "entropy:-1"}, "decode 'entropy:-1' is not known.", f"known: {_DECODE}"),
    ({"decode": "entropy:1e999"}, "decode 'entropy:1e999' is not known.", f"known: {_DECODE}"),
    ({"decode": 3}, "decode 3 is not a word.", "give decode as text."),
    ({"damping": math.nan}, "damping nan is not a number in the range 0 to 2.", _DAMPING),
    ({"damping": math.inf}, "damping inf is not a number in the range 0 to 2.", _DAMPING),
    ({"damping": -0.5}, "damping -0.5 is not a number in the range 0 to 2.", _DAMPING),
    ({"damping": 2.5}, "damping 2.5 is not a number in the range 0 to 2.", _DAMPING),
    ({"damping": 0}, "damping 0 would leave the state as it is.", "give a damping above 0, or no loop."),
    ({"damping": 0.5, "solver": "naive"}, "solver naive has no damping.",
     "leave out --damping; euler has one."),
    ({"damping": 0.5, "k": 1}, "damping 0.5 needs K 2 or more.", "K 1 is the unmodified model."),
    ({"beta": math.nan}, "beta nan is not a number in the range 0 to 1.", _BETA),
    ({"beta": math.inf}, "beta inf is not a number in the range 0 to 1.", _BETA),
    ({"beta": -0.1}, "beta -0.1 is not a number in the range 0 to 1.", _BETA),
    ({"beta": 1.5}, "beta 1.5 is not a number in the range 0 to 1.", _BETA),
    ({"beta": 0.5, "solver": "heun"}, "beta 0.5 needs solver euler, not heun.", "leave out --beta or --solver."),
    ({"mu": 0.5}, "mu 0.5 needs solver heavy-ball and a value below 1.", "leave out --mu."),
    ({"mu": math.nan, "solver": "heavy-ball"}, "mu nan is not a number in the range 0 to 1.", "leave it out for 0.5."),
    ({"mu": 1, "solver": "heavy-ball"}, "mu 1 needs solver heavy-ball and a value below 1.", "leave out --mu."),
    ({"k": 6, "passes": 1}, f"passes 1 {_RANGE} 2 to 64.", _PASSES),
    ({"k": 6, "passes": 4}, "passes 4 is neither 2, 3 nor at least K 6.", _PASSES),
    ({"k": 6, "passes": 3, "solver": "heun"}, "passes needs solver euler and its own damping 1/K.",
     "leave out --solver and --damping."),
    ({"k": 6, "passes": 3, "damping": 0.5}, "passes needs solver euler and its own damping 1/K.",
     "leave out --solver and --damping."),
    ({"routing": "frosen"}, "routing 'frosen' is not known.", "did you mean frozen? Known: free, frozen."),
    ({"attention": 0}, f"attention 0 {_RANGE} 1 to 2147483647.", "leave it out to see all."),
    ({"attention": 2.0}, f"attention 2.0 {_RANGE} 1 to 2147483647.", "leave it out to see all."),
    ({"attention": 4, "sinks": -1}, f"sinks -1 {_RANGE} 0 to 2147483647.", "4 is usual, 0 keeps none."),
    ({"sinks": 4}, "sinks 4 needs attention.", "say how many last positions stay visible too."),
    ({"halt": -0.1}, "halt -0.1 is not a number in the range 0 to inf.", _HALT),
    ({"halt": math.inf}, "halt inf is not a number in the range 0 to inf.", _HALT),
    ({"halt": 0}, "halt 0 would never stop a loop.", "give a residual above 0, or leave it out."),
    ({"halt": 0.1, "kv": "each"}, "halt 0.1 cannot run with kv each.", "use kv first, last or frozen."),
    *(
        ({"halt": 0.1} | others, f"halt 0.1 {_HALT_RULE}", "leave out --solver, --beta and --passes.")
        for others in ({"beta": 0.5}, {"passes": 3}, {"solver": "heun"}, {"solver": "repeat"})
    ),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message", "hint"), BAD_SETTINGS, ids=[str(c[0]) for c in BAD_SETTINGS])
def test_bad_setting(settings: dict[str, object], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as e:
        LoopSpec(**({"window": W, "k": 3} | settings))
    assert (e.value.message, e.value.hint) == (message, hint)


_SETTINGS = "k, mode, solver, damping, beta, mu, passes, kv, decode, routing, attention, sinks, halt."


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "loop '' does not start with a window.", "write it like '14:20 k=3 kv=each'."),
        ("k=3", "loop 'k=3' does not start with a window.", "write it like '14:20 k=3 kv=each'."),
        ("14:20", "loop '14:20' has no k.", "write it like '14:20 k=3'."),
        ("14:20 k=x", "k 'x' is not a whole number.", "write it like k=3."),
        ("14:20 k=1e9", "k '1e9' is not a whole number.", "write it like k=3."),
        ("14:20 k=3 damping=much", "damping 'much' is not a number.", "write it like damping=0.5."),
        ("14:20 k=3 attention=all", "attention 'all' is not a whole number.", "write it like attention=3."),
        ("14:20 k=3 K=4", "loop setting k is given twice.", "give it once."),
        ("14:20 k=3 betta=1", "loop setting 'betta' is not known.", f"did you mean beta? Known: {_SETTINGS}"),
        ("14:20 k=3 each", "loop setting 'each' is not of the form name=value.", f"known: {_SETTINGS}"),
    ],
)
def test_bad_text(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as e:
        LoopSpec.parse(text)
    assert (e.value.message, e.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("19-14", "window 19-14 is not of the form first:end.",
         "windows are half-open: layers 14 to 19 are --window 14:20."),
        ("14", "window '14' is not of the form first:end.", _WRITE),
        ("-3:4", "window '-3:4' is not of the form first:end.", _WRITE),
        ("1:2:3", "window '1:2:3' is not of the form first:end.", _WRITE),
        ("middle", "window 'middle' is not of the form first:end.", _WRITE),
    ],
)  # fmt: skip
def test_bad_window_text(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as e:
        parse_window(text)
    assert (e.value.message, e.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("window", "n_layer", "message", "hint"),
    [
        ((14, 40), 30, "window 14:40 is out of range: this model has 30 layers.", "use 1:29 at most."),
        ((28, 30), 30, "window 28:30 touches layer 29, the last one, which cannot be looped.", "use 1:29 at most."),
        ((1, 2), 2, "a model of 2 layers has no window to loop.", "it needs at least 3 layers."),
    ],
)
def test_window_that_does_not_fit(window: tuple[int, int], n_layer: int, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as e:
        LoopSpec(window, 3).check(n_layer)
    assert (e.value.message, e.value.hint) == (message, hint)


_RECURRENT = "window 14:20 has recurrent layers, "


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("kv=last", "which store one state of all positions: kv last would need one of each.", "use kv first or each."),
        ("kv=frozen", "which store one state of all positions: kv frozen would need one of each.",
         "use kv first or each."),
        ("decode=entropy:2", "whose state a token cannot be taken out of again: decode entropy:2 would have to.",
         "use decode full or bypass."),
        ("kv=each decode=first:2",
         "and with kv each a state per pass: a token with one pass, as in decode first:2, would leave the other states "
         "behind.",
         "use decode full, or kv first."),
    ],
)  # fmt: skip
def test_loop_that_recurrent_layers_rule_out(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as e:
        LoopSpec.parse(f"14:20 k=3 {text}").check_recurrent()
    assert (e.value.message, e.value.hint) == (_RECURRENT + message, hint)


def test_loops_that_recurrent_layers_allow() -> None:
    for text in ("", "kv=each", "decode=bypass", "decode=first:2 mode=layer", "halt=0.1 attention=8 routing=frozen"):
        LoopSpec.parse(f"14:20 k=3 {text}").check_recurrent()


@given(st.text(max_size=12))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for parse in (LoopSpec.parse, parse_window, parse_decode):
        with contextlib.suppress(UsageError):
            parse(text)
