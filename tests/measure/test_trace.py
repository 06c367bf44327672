"""`trace`: its numbers against their definitions, its command's whole outputs, its plots, what it refuses."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import sys
import types
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli import Cli, Ran
from support.fake_trace import FakeTracer, State

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.flat import loop_cells
from ggufloop.loop import LoopSpec
from ggufloop.measure import trace as tracing
from ggufloop.measure.trace import ENTER, LAYER, LEAVE, Point, trace
from ggufloop.setting import settings

TOKENS = [72, 101, 108, 108, 111]


def model(loop: str | None) -> FakeTracer:
    llm = FakeTracer()
    llm.set_loop(LoopSpec.parse(loop) if loop else None)
    return llm


# the numbers


def norm(rows: np.ndarray) -> float:
    return math.sqrt(math.fsum(float(v) ** 2 for v in rows.ravel()))


def mean_and_half(values: list[float]) -> tuple[float, float]:
    n = len(values)
    mean = math.fsum(values) / n
    return mean, 1.96 * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def softmax(logits: np.ndarray) -> list[float]:
    weights = [math.exp(float(z)) for z in logits]
    return [w / math.fsum(weights) for w in weights]


def check_change(p: Point, rows: np.ndarray, before: np.ndarray) -> None:
    each = [norm(x - y) / norm(y) for x, y in zip(rows, before, strict=True)]
    cosines = [float(x @ y) / norm(x) / norm(y) for x, y in zip(rows, before, strict=True)]
    assert p.whole_residual == pytest.approx(norm(rows - before) / norm(before), rel=1e-5)
    for estimate, values in ((p.residual, each), (p.cosine, cosines)):
        assert estimate is not None
        assert (estimate.mean, estimate.half) == pytest.approx(mean_and_half(values), rel=1e-4)
        assert estimate.n == len(rows)


def check_lens(llm: FakeTracer, p: Point, rows: np.ndarray, final: np.ndarray) -> None:
    entropies, divergences = [], []
    for x, end in zip(rows, final, strict=True):
        of_state, of_end = softmax(x @ llm.head), softmax(end @ llm.head)
        entropies.append(-math.fsum(v * math.log(v) for v in of_state))
        divergences.append(math.fsum(q * math.log(q / v) for q, v in zip(of_end, of_state, strict=True)))
    for estimate, values in ((p.entropy, entropies), (p.kl, divergences)):
        assert estimate is not None
        assert (estimate.mean, estimate.half) == pytest.approx(mean_and_half(values), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("loop", [None, "2:5 k=1", "2:5 k=3", "2:5 k=3 mode=layer", "1:6 k=2 solver=naive"])
def test_every_number_is_its_definition(loop: str | None) -> None:
    llm = model(loop)
    result = trace(llm, TOKENS)
    states: dict[tuple[int, int], np.ndarray] = {}
    for state in llm.trace(TOKENS):
        states.setdefault((state.layer, state.evaluation), state.rows)
    final = states[6, 1]
    assert result.tokens == len(TOKENS)
    layers = [p for p in result.points if p.kind == LAYER]
    assert len({(p.layer, p.evaluation) for p in layers}) == len(layers)
    for p in layers:
        rows = states[p.layer, p.evaluation]
        check_lens(llm, p, rows, final)
        if p.evaluation > 1:
            check_change(p, rows, states[p.layer, p.evaluation - 1])
        else:
            assert (p.residual, p.whole_residual, p.cosine) == (None, None, None)
    last = result.points[-1]
    assert (last.layer, last.kl.mean if last.kl else None) == (6, 0.0)
    if loop in (None, "2:5 k=1"):
        assert result.loop is None
        assert result.steps == ()
        assert [(p.kind, p.layer, p.evaluation) for p in result.points] == [(LAYER, il, 1) for il in range(7)]


def test_the_order_is_the_order_of_execution() -> None:
    def order(loop: str) -> str:
        mark = {LAYER: "", ENTER: ">", LEAVE: "="}
        return " ".join(f"{mark[p.kind]}{p.layer}.{p.evaluation}" for p in trace(model(loop), TOKENS).points)

    assert order("2:4 k=2") == "0.1 1.1 2.1 3.1 >1.2 2.2 3.2 =3.2 4.1 5.1 6.1"
    assert order("2:4 k=2 mode=layer") == "0.1 1.1 2.1 >1.2 2.2 =2.2 3.1 >2.2 3.2 =3.2 4.1 5.1 6.1"


@pytest.mark.parametrize(
    "loop",
    ["2:5 k=4", "2:5 k=3 solver=naive", "2:5 k=3 beta=0.5", "2:5 k=6 passes=3", "2:5 k=2 solver=midpoint",
     "2:5 k=3 solver=heavy-ball", "2:5 k=2 solver=rk4", "2:5 k=3 kv=last", "2:5 k=3 mode=layer"],
)  # fmt: skip
def test_steps_are_between_the_states_that_entered_the_passes(loop: str) -> None:
    """Against the states the model says entered each pass, and the one that the layer behind the window was given."""
    llm = model(loop)
    spec = LoopSpec.parse(loop)
    result = trace(llm, TOKENS)
    states = llm.trace(TOKENS)
    n = spec.tableau().evaluations
    (a, b), block = spec.window, spec.mode == "block"
    behind = next(s.rows for s in states if s.layer == b)
    units = [(a, b)] if block else [(il, il + 1) for il in range(a, b)]
    x0 = next(s.rows for s in states if s.layer == a - 1)
    expected = []
    for first, last in units:
        outputs = [s for s in states if s.layer == last - 1 and (block or s.layer >= a)]
        entered = [x0]
        for j in range(2, n + 1):
            at = next(i for i, s in enumerate(states) if s is outputs[j - 1]) - (last - first)
            assert (states[at].layer, states[at].evaluation) == (first - 1, j)
            entered.append(states[at].rows)
        left = x0 + sum(
            weight * (out.rows.astype(np.float64) - y)
            for weight, out, y in zip(spec.tableau().B, outputs, entered, strict=False)
        )
        entered.append(np.asarray(left, dtype=np.float32))
        for j, (x, y) in enumerate(pairwise(entered), 1):
            by_token = [norm(after - before) / norm(before) for before, after in zip(x, y, strict=True)]
            expected.append((first, last, j, math.fsum(by_token) / len(by_token)))
        x0 = entered[-1]
    np.testing.assert_allclose(llm.layer(b, x0), behind, rtol=1e-4, atol=1e-5)
    assert [(s.first, s.last, s.evaluation) for s in result.steps] == [e[:3] for e in expected]
    np.testing.assert_allclose([s.size for s in result.steps], [e[3] for e in expected], rtol=1e-4)


def test_passes_that_a_halt_would_run() -> None:
    result = trace(model("2:5 k=4 damping=0.5"), TOKENS)
    sizes = [step.size for step in result.steps]
    low, high = min(sizes), max(sizes)
    assert result.passes(low / 2) == {(2, 5): 4}
    assert result.passes(high * 2) == {(2, 5): 1}
    tau = sorted(sizes)[1]  # the smallest step alone is below it
    assert result.passes(tau) == {(2, 5): 1 + sizes.index(low)}
    layers = trace(model("2:5 k=3 mode=layer"), TOKENS)
    tau = sorted(step.size for step in layers.steps)[4]
    below = {(s.first, s.last): s.evaluation for s in reversed(layers.steps) if s.size < tau}
    assert layers.passes(tau) == {(il, il + 1): below.get((il, il + 1), 3) for il in (2, 3, 4)}
    assert len(set(layers.passes(tau).values())) > 1, "a threshold that tells the layers apart"


def test_a_loop_that_halts_is_traced_in_full_and_halts_again_afterwards() -> None:
    llm = model("2:5 k=4 halt=0.5")
    result = trace(llm, TOKENS)
    assert result == trace(model("2:5 k=4"), TOKENS)
    assert result.loop == llm.runs[0][0] == LoopSpec((2, 5), 4)
    assert llm.loop == LoopSpec((2, 5), 4, halt=0.5)
    llm.matrices[:] = np.nan
    with pytest.raises(GgufloopError):
        trace(llm, TOKENS)
    assert llm.loop == LoopSpec((2, 5), 4, halt=0.5)


def test_one_token_has_no_interval() -> None:
    for p in trace(model("2:5 k=2"), TOKENS[:1]).points:
        assert p.entropy is not None
        assert p.entropy.half is None
        assert p.cosine is None or p.cosine.half is None


def test_few_logits_at_a_time_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = trace(model("2:5 k=2"), TOKENS)
    monkeypatch.setattr(tracing, "_LENS_CELLS", 700)  # two rows of 300
    llm = model("2:5 k=2")
    few = trace(llm, TOKENS)
    assert set(llm.lens_rows) == {2, 1}
    for p, q in zip(at_once.points, few.points, strict=True):
        assert p.entropy is not None
        assert q.entropy is not None
        assert p.entropy.mean == pytest.approx(q.entropy.mean, rel=1e-6)
    llm = model("2:5 k=2")
    assert trace(llm, TOKENS, lens=False).points[0].entropy is None
    assert llm.lens_rows == []


def test_several_residual_streams_are_one_state() -> None:
    class Streams(FakeTracer):
        def trace(self, tokens: Sequence[int]) -> list[State]:
            halves = [np.stack([s.rows[:, :3], s.rows[:, 3:]]) for s in super().trace(tokens)]
            return [s._replace(rows=rows) for s, rows in zip(super().trace(tokens), halves, strict=True)]

        def lens(self, rows: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
            assert rows.shape == (2, len(tokens), 3)
            return super().lens(np.concatenate(list(rows), axis=1), tokens)

    llm = Streams()
    llm.set_loop(LoopSpec.parse("2:5 k=3"))
    assert trace(llm, TOKENS) == trace(model("2:5 k=3"), TOKENS)


class Excluding(FakeTracer):
    """Its head excludes the last token of four everywhere, as some models do, and the first one after layer 0."""

    def trace(self, tokens: Sequence[int]) -> list[State]:
        return [State(il, 1, np.full((len(tokens), 1), il, dtype=np.float32)) for il in range(7)]

    def lens(self, rows: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        logits = np.zeros((len(rows), 4), dtype=np.float32)
        logits[:, 3] = -np.inf
        logits[rows[:, 0] == 0, 0] = -np.inf
        return logits


def test_what_the_head_excludes_counts_nothing_and_excluding_the_answer_is_infinitely_wrong() -> None:
    points = trace(Excluding(), [5]).points
    assert [p.entropy.mean for p in points if p.entropy] == pytest.approx([math.log(2), *[math.log(3)] * 6])
    assert [p.kl.mean for p in points if p.kl] == [math.inf, *[0.0] * 6]


@pytest.mark.parametrize(
    ("loop", "hint"),
    [(None, "the model or its file is broken."),
     ("2:5 k=2", "the loop diverges: give it less damping, fewer passes or another window.")],
)  # fmt: skip
def test_a_state_that_is_not_finite_is_named(loop: str | None, hint: str) -> None:
    llm = model(loop)
    llm.matrices[3, 2, 2] = np.inf
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(GgufloopError, match=r"^the state leaving layer 3 in pass 1 is not finite\.$") as e,
    ):
        trace(llm, TOKENS)
    assert e.value.hint == hint


def test_no_tokens() -> None:
    with pytest.raises(UsageError, match=r"^there are no tokens to trace\.$"):
        trace(model(None), [])


# the command


class Bench:
    """Runs `trace` on a FakeTracer in place of the engine; `model` is a real (tiny) file, `llm` the last one opened."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
        self.model = model
        self.llm: FakeTracer | None = None
        self.prepare: Callable[[FakeTracer], None] = lambda llm: None
        self._cli = cli
        active = types.SimpleNamespace(patch_id="0123456789ab")
        engine = types.SimpleNamespace(LoopedLlama=self._open, ACTIVE=active)
        monkeypatch.setitem(sys.modules, "ggufloop.engine", engine)

    def _open(self, path: Path, **kwargs: Any) -> FakeTracer:
        self.llm = FakeTracer(path, **kwargs)
        self.prepare(self.llm)
        return self.llm

    def __call__(self, *args: str) -> Ran:
        return self._cli("trace", *(self.model if arg == "MODEL" else arg for arg in args))


@pytest.fixture
def bench(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Bench:
    return Bench(tiny_model("llama"), monkeypatch, cli)


def test_the_table(bench: Bench) -> None:
    result = bench("MODEL", "-p", "Hi!", "--window", "2:4", "--K", "2")
    assert result == (0, TABLE, "")
    assert max(len(line) for line in result.out.splitlines()) <= 100
    assert bench.llm is not None
    assert bench.llm.runs == [(LoopSpec((2, 4), 2), [257, 72, 105, 33])]
    lens = result.out.partition("What each state")
    assert bench("MODEL", "-p", "Hi!", "--window", "2:4", "--K", "2", "--no-lens") == (
        0,
        lens[0].rstrip("\n") + "\n",
        "",
    )
    assert bench.llm.lens_rows == []


TABLE = """\
model   llama.gguf, 7 layers
loop    2:4 k=2
text    4 tokens; +/- is a 95 % interval (normal) of a mean over them

How far each pass moves the state of the window (--halt compares the step):

| layers | pass |   step |    +/- |  cosine |     +/- | all as one |
| ------ | ---: | -----: | -----: | ------: | ------: | ---------: |
| 2:4    |    1 | 0.4259 | 0.0812 | 0.96093 | 0.02325 |    0.42667 |
| 2:4    |    2 | 0.4821 | 0.0775 | 0.97623 | 0.01817 |    0.48214 |

Change of each layer's output to the pass before:

| layer | pass | residual |    +/- |  cosine |     +/- | all as one |
| ----: | ---: | -------: | -----: | ------: | ------: | ---------: |
|     2 |    2 |   0.4477 | 0.0489 | 0.98327 | 0.01276 |    0.44912 |
|     3 |    2 |   0.5028 | 0.0780 | 0.98579 | 0.01197 |    0.50186 |

What each state would predict (logit lens), in nats:

| state | layer | pass | entropy |   +/- | KL to the end |   +/- |
| ----- | ----: | ---: | ------: | ----: | ------------: | ----: |
| layer |     0 |    1 |   4.096 | 0.338 |         2.470 | 1.696 |
| layer |     1 |    1 |   3.886 | 0.302 |         2.019 | 1.344 |
| layer |     2 |    1 |   3.283 | 0.556 |         1.490 | 1.061 |
| layer |     3 |    1 |   2.342 | 0.878 |         1.769 | 1.090 |
| enter |     1 |    2 |   3.151 | 0.623 |         1.614 | 1.173 |
| layer |     2 |    2 |   2.280 | 0.683 |         1.680 | 1.017 |
| layer |     3 |    2 |   1.384 | 0.928 |         2.980 | 1.665 |
| leave |     3 |    2 |   2.035 | 0.933 |         2.042 | 1.167 |
| layer |     4 |    1 |   2.395 | 0.489 |         1.066 | 0.456 |
| layer |     5 |    1 |   2.951 | 0.885 |         0.265 | 0.143 |
| layer |     6 |    1 |   2.977 | 0.411 |         0.000 | 0.000 |
"""


def test_the_table_says_where_a_loop_would_halt(bench: Bench) -> None:
    args = ("MODEL", "-p", "Hi!", "--window", "2:4", "--no-lens")
    blocks = bench(*args, "--K", "2", "--halt", "0.45").out
    assert "| 2:4    |    2 | 0.4821 |" in blocks
    assert "\n--halt 0.45: 1 of 2 passes of layers 2:4 run.\n" in blocks
    layers = bench(*args, "--K", "3", "--mode", "layer", "--halt", "1e-9", "-o", "text").out
    assert "--halt 1e-09: 3 of 3 passes of layers 2:3 run.\n--halt 1e-09: 3 of 3 passes of layers 3:4 run.\n" in layers
    data = json.loads(bench(*args, "--K", "2", "--halt", "0.45", "-o", "json").out)
    assert (data["loop"], data["halt"]) == ("2:4 k=2", 0.45)
    assert data["halted_passes"] == [{"first": 2, "last": 4, "passes": 1}]


def test_the_plain_model_has_its_lens(bench: Bench) -> None:
    result = bench("MODEL", "-p", "Hi!")
    assert result.code == 0
    assert result.err == "note: nothing loops: this is the logit lens of the plain model.\n"
    assert result.out == PLAIN
    result = bench("MODEL", "-p", "Hi!", "--window", "2:4", "--K", "1")
    assert result.err == "note: 2:4 k=1 is one evaluation: this is the logit lens of the plain model.\n"
    assert result.out == PLAIN


PLAIN = """\
model   llama.gguf, 7 layers
loop    no loop
text    4 tokens; +/- is a 95 % interval (normal) of a mean over them

What each state would predict (logit lens), in nats:

| state | layer | pass | entropy |   +/- | KL to the end |   +/- |
| ----- | ----: | ---: | ------: | ----: | ------------: | ----: |
| layer |     0 |    1 |   4.096 | 0.338 |         2.400 | 1.658 |
| layer |     1 |    1 |   3.886 | 0.302 |         1.981 | 1.310 |
| layer |     2 |    1 |   3.283 | 0.556 |         1.543 | 1.040 |
| layer |     3 |    1 |   2.342 | 0.878 |         1.976 | 1.068 |
| layer |     4 |    1 |   2.672 | 0.423 |         0.990 | 0.367 |
| layer |     5 |    1 |   3.242 | 0.773 |         0.248 | 0.123 |
| layer |     6 |    1 |   3.203 | 0.315 |         0.000 | 0.000 |
"""


def test_forms_for_programs_have_one_row_per_state(bench: Bench) -> None:
    args = ("MODEL", "-p", "Hi!", "--window", "2:4", "--K", "2", "-o")
    records = [json.loads(line) for line in bench(*args, "jsonl").out.splitlines()]
    assert all(record.pop("model") == "llama.gguf" for record in records)
    loops = [{name: record.pop(name) for name in ("loop", *settings(LoopSpec))} for record in records]
    assert loops == [{"loop": "2:4 k=2", **loop_cells("2:4 k=2")}] * len(records)
    data = json.loads(bench(*args, "json").out)
    assert data.pop("states") == records
    steps = [(s["first"], s["last"], s["pass"], s["step"]) for s in data.pop("steps")]
    moved = [r["residual"] for r in records if r["state"] != "layer"]
    assert steps == [(2, 4, 1, moved[0]), (2, 4, 2, moved[1])]
    sha256 = hashlib.sha256(bench.model.read_bytes()).hexdigest()
    assert data == {
        "schema_version": 1, "model": "llama.gguf", "model_sha256": sha256,
        "patch_id": "0123456789ab", "loop": "2:4 k=2", "window": [2, 4], "evaluations": 2, "layers": 7, "n": 4,
        "interval": "mean +/- 1.96 standard errors over tokens", "halt": None, "halted_passes": None,
    }  # fmt: skip
    assert [(r["state"], r["layer"], r["pass"], r["n"]) for r in records][3:9] == [
        ("layer", 3, 1, 4), ("enter", 1, 2, 4), ("layer", 2, 2, 4), ("layer", 3, 2, 4), ("leave", 3, 2, 4),
        ("layer", 4, 1, 4),
    ]  # fmt: skip
    expected = trace(model("2:4 k=2"), [257, 72, 105, 33]).points
    for record, p in zip(records, expected, strict=True):
        assert record["whole_residual"] == p.whole_residual
        for name in ("residual", "cosine", "entropy", "kl"):
            estimate = getattr(p, name)
            values = (None, None) if estimate is None else (estimate.mean, estimate.half)
            assert (record[name], record[f"{name}_ci"]) == values
    rows = list(csv.DictReader(io.StringIO(bench(*args, "csv").out)))
    assert [{k: row[k] or None for k in records[0]} for row in rows] == [
        {k: None if v is None else str(v) for k, v in record.items()} for record in records
    ]
    assert {(row["loop"], row["window"], row["k"], row["solver"]) for row in rows} == {("2:4 k=2", "2:4", "2", "euler")}
    md = bench(*args, "md").out.splitlines()
    assert len(md) == 2 + len(records)
    assert [cell.strip() for cell in md[0].strip("|").split("|")] == list(records[0])
    data = json.loads(bench("MODEL", "-p", "Hi!", "-o", "json").out)
    assert (data["loop"], data["window"], data["evaluations"], data["steps"]) == (None, None, 1, [])


def test_where_the_text_comes_from(bench: Bench, tmp_path: Path) -> None:
    def traced(*args: str) -> list[int]:
        assert bench("MODEL", *args).code == 0
        assert bench.llm is not None
        return bench.llm.runs[-1][1]

    file = tmp_path / "text.txt"
    file.write_text("ab\n", encoding="utf-8-sig")
    assert traced("-f", str(file)) == [257, 97, 98]
    assert traced("-p", "a<s>") == [257, 97, 257]
    assert traced("-p", "Hi", "--chat") == [257, *b"[user]Hi\n[assistant]"]

    def writes_bos(llm: FakeTracer) -> None:
        llm.metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}"

    bench.prepare = writes_bos
    assert traced("-p", "Hi", "--chat") == [257, *b"Hi"]
    bench.prepare = lambda llm: llm.metadata.clear()
    assert bench("MODEL", "-p", "Hi", "--chat") == (
        2, "", "error: this model has no chat template.\n  leave out --chat: the text is then taken as it is.\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("", 2, "error: no prompt is given.\n  give one with -p, or a text file with -f."),
        ("-p x -f y", 2, "error: the prompt is given twice.\n  give -p or -f, not both."),
        ("-p EMPTY", 2, "error: the prompt is empty.\n  give a text of some sentences."),
        ("-f /no/file", 1, "error: cannot read /no/file: No such file or directory.\n  give -f a text file."),
        ("-p caf\udce9", 2, "error: the prompt is not UTF-8 text.\n  convert it, for example with iconv -t UTF-8."),
        (
            "-p x -o yaml",
            2,
            "error: output form 'yaml' is not known.\n  known: text, json, jsonl, csv, md.",
        ),
        (
            "-p x --no-lens",
            2,
            "error: without --window there is only the logit lens.\n  leave out --no-lens, or give a window.",
        ),
        (
            f"-p {'x' * 300} -c 256",
            1,
            "error: the prompt has 301 tokens, and the context holds 256.\n"
            "  give a larger context with -c, or a shorter prompt.",
        ),
        (
            f"-p {'x' * 300} -ub 128",
            1,
            "error: the prompt has 301 tokens; a trace is one batch, which holds 128.\n"
            "  give -b 2048 -ub 301, or a shorter prompt.",
        ),
        (
            "-p x --window 2:9",
            2,
            "error: window 2:9 is out of range: this model has 7 layers.\n  use 1:6 at most.",
        ),
        (
            "-p x --plot /no/folder/a.png",
            1,
            "error: cannot write /no/folder/a.png: No such file or directory.\n  name another file.",
        ),
        (
            "-p x --plot a.doc",
            2,
            "error: plot a.doc ends in '.doc', which is no format matplotlib can write.\n"
            "  known: png, svg, pdf, eps, jpg, jpeg, tif, tiff, webp.",
        ),
        (
            "-p x --plot trace",
            2,
            "error: plot trace has no suffix that says the format matplotlib can write.\n"
            "  known: png, svg, pdf, eps, jpg, jpeg, tif, tiff, webp.",
        ),
    ],
)
def test_what_cannot_be_traced_says_why(bench: Bench, args: str, code: int, message: str) -> None:
    words = ["" if word == "EMPTY" else word for word in args.split()]
    assert bench("MODEL", *words) == (code, "", message + "\n")
    assert bench.llm is None or bench.llm.runs == []


def test_one_evaluation_without_a_lens_is_nothing(bench: Bench) -> None:
    result = bench("MODEL", "-p", "x", "--window", "2:4", "--K", "1", "--no-lens")
    assert (result.code, result.out) == (2, "")
    assert result.err.endswith(
        "error: a plain model has only the logit lens.\n  leave out --no-lens, or give --K 2 or more.\n"
    )


# plots


def test_plots(bench: Bench, tmp_path: Path) -> None:
    svg = tmp_path / "a.svg"
    args = ("MODEL", "-p", "Hi there", "--window", "2:5", "--K", "3")
    assert bench(*args, "--plot", str(svg)).code == 0
    text = svg.read_text(encoding="utf-8")
    for words in (
        "pass 1<",
        "pass 3<",
        "result<",
        "What each layer would predict (mean of 9 tokens",
        "relative residual",
    ):
        assert words in text, words
    bench(*args, "--no-lens", "--plot", str(svg))
    text = svg.read_text(encoding="utf-8")
    assert "logit-lens" not in text
    assert "relative residual" in text
    bench("MODEL", "-p", "Hi there", "--plot", str(svg))
    text = svg.read_text(encoding="utf-8")
    assert "logit-lens" in text
    assert "relative residual" not in text
    for suffix, start in ((".PNG", b"\x89PNG"), (".pdf", b"%PDF")):
        path = tmp_path / f"b{suffix}"
        assert bench(*args, "--mode", "layer", "--plot", str(path)).code == 0
        assert path.read_bytes().startswith(start)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.svg", "b.PNG", "b.pdf"]


@pytest.mark.parametrize("loop", ["2:5 k=12", "2:3 k=2 solver=naive", "2:5 k=2", "1:6 k=3 mode=layer"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_kind_of_trace_can_be_drawn(loop: str, tokens: int, tmp_path: Path) -> None:
    from ggufloop.figures.style import save
    from ggufloop.figures.trace import trace_figure

    figure = trace_figure(trace(model(loop), TOKENS[:tokens]), "title", tau=0.01)
    lens, change = figure.axes
    spec = LoopSpec.parse(loop)
    n = spec.tableau().evaluations
    assert len(lens.get_lines()) == 1 + n + 1 + 1, "before the window, its passes, behind it, its result"
    steps = n if spec.mode == "block" else 0
    drawn = 2 * (n - 1 + steps) + 2 + 1
    assert len(change.get_lines()) == drawn, "two measures from the second pass on, their legend, the threshold"
    assert change.get_yscale() == "log"
    save(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_without_matplotlib_one_line_says_what_to_install(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("MODEL", "-p", "Hi", "--plot", str(tmp_path / "a.png")) == (
        1, "", "error: plots need matplotlib, which is not installed.\n  run: pip install 'ggufloop[lab]'\n"
    )  # fmt: skip
    assert bench.llm is None
    assert bench("MODEL", "-p", "Hi").code == 0


def test_a_plot_is_written_whole_or_not_at_all(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "a.png"
    folder.mkdir()
    assert bench("MODEL", "-p", "Hi", "--plot", str(folder)).err == (
        f"error: cannot write {folder}: it is a folder.\n  name another file.\n"
    )
    old = tmp_path / "b.png"
    old.write_bytes(b"old")

    def breaks(llm: FakeTracer) -> None:
        llm.matrices[:] = np.nan

    bench.prepare = breaks
    assert bench("MODEL", "-p", "Hi", "--plot", str(old)).code == 1
    assert old.read_bytes() == b"old"
    bench.prepare = lambda llm: None
    assert bench("MODEL", "-p", "Hi", "--plot", str(old)).code == 0
    assert old.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]
