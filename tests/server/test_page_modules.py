"""The page's modules, called alone in headless Chromium: which words differ, and what a loop is on that side."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser
from support.browser import Visit, launched

from ggufloop.loop import DECODES, KV_POLICIES, SOLVERS, LoopSpec, schema
from ggufloop.measure.stats import mean_interval, t_quantile
from ggufloop.models.registry import rule_of_thumb
from ggufloop.server import serve
from ggufloop.server.serve import Site
from ggufloop.setting import Word, row


class Files(SimpleHTTPRequestHandler):
    """The page's files, with nobody behind them."""

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from launched()


@contextmanager
def visited(browser: Browser, folder: Path) -> Iterator[Visit]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Visit(browser, f"http://127.0.0.1:{server.server_port}/", refusals=True, ready=False) as visit:
        yield visit
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def modules(browser: Browser) -> Iterator[Visit]:
    with Site(None) as site, visited(browser, site.folder) as visit:
        yield visit


def lcs(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        above, row = row, [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


# differing words


def test_marks_are_a_longest_common_subsequence(modules: Visit) -> None:
    """What is not marked is the same on both sides, and as long as can be; the texts themselves are unchanged."""
    draw = random.Random(1)
    words = ["a", "b", "c", "naive", "na\u00efve", "don't", "x_1", ",", "."]
    pairs = []
    for _ in range(150):
        left = [draw.choice(words) for _ in range(draw.randrange(25))]
        right = [w for w in left if draw.random() < 0.8] if draw.random() < 0.5 else []
        right += [draw.choice(words) for _ in range(draw.randrange(12))]
        pairs.append([left, right])
    for (left, right), got in zip(
        pairs, modules.run("diff.js", "a.map(([x, y]) => m.align(x, y))", pairs), strict=True
    ):
        kept = [
            [w for w, keep in zip(side, keeps, strict=True) if keep]
            for side, keeps in zip((left, right), got, strict=True)
        ]
        assert kept[0] == kept[1]
        assert len(kept[0]) == lcs(left, right)
    texts = [["  " + " ".join(left), "\n".join(right) + "\n"] for left, right in pairs]
    for (left, right), got in zip(
        texts, modules.run("diff.js", "a.map(([x, y]) => m.compare(x, y))", texts), strict=True
    ):
        assert "".join(run["text"] for run in got["left"]) == left
        assert "".join(run["text"] for run in got["right"]) == right
        assert got["same"] == (left.split() == right.split())


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("one two three", "one 2 three", [["two"], ["2"]]),
        ("a, b", "a; b", [[","], [";"]]),  # a sign is not part of its word
        ("don't stop", "do not stop", [["don't"], ["do not"]]),
        ("\u5929\u7a7a\u662f\u84dd", "\u5929\u7a7a\u662f\u7ea2", [["\u84dd"], ["\u7ea2"]]),  # no spaces to go by
        ("", "x", [[], ["x"]]),
        ("caf\u00e9 \U0001f600", "caf\u00e9 \U0001f601", [["\U0001f600"], ["\U0001f601"]]),
        ("same\n\ntext", "same text", [[], []]),
    ],
)  # fmt: skip
def test_what_counts_as_a_word(modules: Visit, left: str, right: str, expected: list[list[str]]) -> None:
    got = modules.run("diff.js", "m.compare(a[0], a[1])", [left, right])
    assert [[run["text"] for run in got[side] if run["differs"]] for side in ("left", "right")] == expected


def test_an_unfinished_answer_is_not_marked_beyond_what_is_written(modules: Visit) -> None:
    got = modules.run("diff.js", "m.compare('a x c', 'a b c d e', [true, false])")
    assert [run["text"] for run in got["right"] if run["differs"]] == ["b"]
    got = modules.run("diff.js", "m.compare('a b c wor', 'a b c word d', [true, true])")
    assert not [run for run in got["left"] + got["right"] if run["differs"]]


def test_texts_too_long_to_compare_are_said_to_be(modules: Visit) -> None:
    assert modules.run("diff.js", "m.compare(a + ' x', 'y ' + a, [false, false], 1000)", "w " * 40) is None


# Markdown


HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 2'>",
    "text <svg onload=window.hit=3> <b onmouseover=window.hit=4>x</b>",
    "[x](javascript:window.hit=5) [y](JaVaScRiPt&colon;window.hit=6) [z](data:text/html,x) [w](/v1/models)",
    "![x](https://other.example/x.png) ![y](javascript:window.hit=7)",
    '[a](https://other.example/ "\\" onclick=window.hit=8 x=\\"")',
    '<https://other.example/"onclick=window.hit=9>',
    '```x" onclick=window.hit=10 y="\ncode\n```',
    "| <img src=x onerror=window.hit=11> |\n| --- |\n| [x](vbscript:1) |",
    "<iframe srcdoc='<script>parent.hit=12</script>'></iframe>\n\n<form action=/x><input name=attributes></form>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hit=13></style></mglyph></table></mtext></math>",
    "a &lt;img src=x onerror=window.hit=14&gt; &#60;script>window.hit=15&#60;/script>",
    "[ref]\n\n[ref]: javascript:window.hit=16 '<img src=x onerror=window.hit=17>'",
    "<a href=https://other.example target=_self>x</a> <style>* { display: none }</style>",
    "1. " * 3000,
    "> " * 3000 + "<b>",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:30])
def test_hostile_answers_are_text(modules: Visit, text: str) -> None:
    """In the page, where they would run: no element that loads or runs, no link but to the web and elsewhere."""
    found = modules.run(
        "prose.js",
        """(() => {
            const box = document.createElement("div");
            document.body.append(box);
            const prose = m.createProse(box);
            prose.read(a);
            prose.show([{ text: a.slice(0, 3), differs: true }]);
            const all = [...box.querySelectorAll("*")];
            return [box.textContent, all.map((e) => e.localName), all.flatMap((e) => e.getAttributeNames()),
                [...box.querySelectorAll("a")].map((e) => [e.getAttribute("href"), e.target, e.rel])];
        })()""",
        text,
    )
    shown, tags, attributes, links = found
    assert not set(tags) & {"script", "img", "svg", "iframe", "form", "input", "style", "math", "object", "b"}
    made = {"type", "tabindex", "role", "aria-label", "hidden"}  # of the page's own buttons and frames
    assert set(attributes) - made <= {"class", "href", "target", "rel", "title"}
    for href, target, rel in links:
        assert href is None or (href.startswith("https://") and target == "_blank" and "noopener" in rel)
    if text.startswith(("<script", "1.", ">")):
        assert shown == text  # and what it is can be read
    modules.page.wait_for_timeout(5)
    assert modules.page.evaluate("window.hit") is None


def test_marks_lie_over_what_is_read(modules: Visit) -> None:
    """Differences are of words, wherever in the Markdown these stand."""
    texts = [
        ("a **b c** d", "a **b x** d", [["c"], ["x"]]),
        ("# Title\n\nText one", "# Title\n\n*Text* one", [[], []]),
        ("1. one\n2. two", "1. one\n2. three", [["two"], ["three"]]),
        ("x `f(1)` y\nz", "x `f(2)` y\nq", [["1", "z"], ["2", "q"]]),
        ("| a | b |\n|--|--|\n| 1 | 2 |", "| a | b |\n|--|--|\n| 1 | 3 |", [["2"], ["3"]]),
    ]
    got = modules.run(
        "prose.js",
        """(async () => {
            const { compare } = await import("/diff.js");
            return a.map((pair) => {
                const boxes = [0, 1].map(() => document.createElement("div"));
                const prose = boxes.map(m.createProse);
                const told = compare(...prose.map((p, i) => p.read(pair[i]).text));
                [told.left, told.right].forEach((runs, i) => prose[i].show(runs));
                return boxes.map((box) => [...box.querySelectorAll("mark")].map((mark) => mark.textContent));
            });
        })()""".replace("(async", "await (async"),
        [text[:2] for text in texts],
    )
    assert got == [marks for _, _, marks in texts]


def test_what_is_written_is_not_made_again(modules: Visit) -> None:
    """While a long answer grows only its last block is drawn: a selection in it stays, and it costs the same."""
    kept = modules.run(
        "prose.js",
        """(() => {
            const box = document.createElement("div");
            const prose = m.createProse(box);
            const show = (text, marks = null) => { prose.read(text); prose.show(marks); };
            show("First.\\n\\nSecond");
            const before = [...box.children];
            show("First.\\n\\nSecond one.\\n\\n```\\ncode");
            const same = [...box.children].map((child, i) => child === before[i]);
            show("First.\\n\\nSecond one.", [{ text: "First", differs: true }]);
            return [same, box.childElementCount, box.querySelector("mark").textContent, box.textContent];
        })()""",
    )
    assert kept == [[True, False, False], 2, "First", "First.Second one."]


# the loop's words


def settings(**changed: Any) -> dict[str, Any]:
    usual = {"window": [12, 16], "k": 3, "solver": "euler", "kv": "first", "decode": "full", "further": ""}
    return {**usual, "decodeValue": {"first": 16}, **changed}


@pytest.mark.parametrize(
    "changed",
    [
        *({"solver": solver} for solver in SOLVERS),
        *({"kv": kv} for kv in KV_POLICIES),
        {"decode": "bypass"},
        {"decode": "first"},
        {"decode": "first", "decodeValue": {"first": 3}},
        {"k": 1},
        {"k": 16, "solver": "rk4"},
        {"kv": "frozen", "further": "mode=layer attention=64 sinks=4"},
        {"further": "beta=0.5"},
    ],
    ids=str,
)
def test_the_page_and_the_library_mean_the_same_loop(modules: Visit, changed: dict[str, Any]) -> None:
    expression = (
        "(() => { const l = m.toLoop(a); return [l, m.spell(l), m.evaluations(l), m.fromText(m.spell(l))]; })()"
    )
    loop, text, evaluations, back = modules.run("loop.js", expression, settings(**changed))
    spec = LoopSpec(**loop)
    assert spec == LoopSpec.parse(text)
    assert text == str(spec)
    if "further" not in changed or "beta" not in changed["further"]:
        assert spec.extra_layer_evaluations() == (evaluations - 1) * spec.layers
    used = settings(**changed)
    if used["decode"] in used["decodeValue"]:
        assert back["decodeValue"] == {used["decode"]: used["decodeValue"][used["decode"]]}
    kv = "each" if used["solver"] == "repeat" else used["kv"]
    assert modules.run("loop.js", "m.toLoop({ ...a, kv: a.kv || 'first' })", back)["kv"] == kv
    same = ("window", "k", "solver", "decode", "further")
    assert {name: back[name] for name in same} == {name: used[name] for name in same}


def test_the_page_offers_what_the_library_has(modules: Visit) -> None:
    def options(name: str) -> list[str]:
        return modules.page.locator(f"#{name} option").all_text_contents()

    assert options("solver") == list(SOLVERS)
    assert options("kv") == list(KV_POLICIES)
    assert options("decode") == [
        name for name in (re.split(r"[: ]", policy)[0] for policy in DECODES) if name != "entropy"
    ]  # not served
    windows = modules.run("loop.js", "a.map(m.autoWindow)", list(range(3, 130)))
    assert windows == [list(rule_of_thumb(n)) for n in range(3, 130)]


@dataclass(frozen=True)
class Tinted(LoopSpec):
    """A loop with settings that nobody else has heard of."""

    tint: str = row(
        str, "red", "The colour of a pass", words={"red": Word("it is warm"), "blue": Word("it is cold")}, control=True
    )
    depth: int = row(int, 2, "How deep", low=1, high=5, control=True)
    glow: float | None = row(float, None, "How bright")


def test_a_row_more_of_the_table_is_a_control_more(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "schema", lambda: schema(Tinted))
    chosen = settings(tint="blue", depth=2, further="glow=0.5")
    with Site(None) as site, visited(browser, site.folder) as visit:
        page = visit.page
        assert page.locator("#tint option").all_text_contents() == ["red", "blue"]
        page.select_option("#tint", "blue")
        assert str(page.text_content("#meaning")).endswith("; blue: it is cold.")
        assert (page.input_value("#depth"), page.get_attribute("#depth", "max")) == ("2", "5")
        loop, text = visit.run("loop.js", "[m.toLoop(a), m.spell(m.toLoop(a))]", chosen)
        assert Tinted(**loop) == Tinted.parse(text)
        assert text == "12:16 k=3 tint=blue glow=0.5"
        told = visit.run(
            "loop.js", "(() => { try { m.toLoop(a); } catch (e) { return e.message; } })()", chosen | {"depth": 6}
        )
        assert told == "Depth is a whole number from 1 to 5."


# results


def test_estimates_and_what_every_row_says_make_no_columns(modules: Visit) -> None:
    head = ["model", "gain", "gain_low", "gain_high", "n"]
    rows = [["m", 0.5, 0.25, 1, 3], ["m", None, None, None, 4]]
    got = modules.run("tables.js", "m.folded(a[0], a[1], 4)", [head, rows])
    assert got == {
        "columns": ["gain", "n"], "rows": [["0.5 [0.25, 1]", 3], [None, 4]], "alike": [["model", "m", 0]],
    }  # fmt: skip
    names = "type,loop,window,k,solver,kv,beta,n,gain,low,high,verdict"
    lines = [names, "A,plain,,,,,,8,,,,", "B,1:2 k=2,1:2,2,euler,first,0,8,0.5,0.25,1,helps"]
    cells = "[...m.csvView(a)[0].querySelectorAll('tr')].map((r) => [...r.children].map((c) => c.textContent))"
    assert modules.run("tables.js", cells, "\n".join(lines)) == [
        ["type", "loop", "verdict", "n", "gain"], ["A", "plain", "", "8", ""],
        ["B", "1:2 k=2", "helps", "8", "0.5 [0.25, 1]"],
    ]  # fmt: skip


def test_a_sweeps_journal_is_summed_up(modules: Visit) -> None:
    """Means and intervals are those of the paired differences, each item once, however it was cut into slices."""
    draw = np.random.default_rng(3)
    plain = draw.normal(-3, 0.5, 40)
    looped = plain + draw.normal(0.02, 0.1, 40)
    slices = [
        {"measure": "t", "loop": "plain", "items": list(range(25)), "scores": list(plain[:25]), "seconds": 2.0},
        {"measure": "t", "loop": "12:16 k=3", "items": [30, 3, 4], "scores": list(looped[[30, 3, 4]]), "seconds": 1.0},
        {"measure": "t", "loop": "plain", "items": list(range(25, 40)), "scores": list(plain[25:]), "seconds": 1.0},
        {"measure": "t", "loop": "12:16 k=3", "items": [3, 10], "scores": list(looped[[3, 10]]), "seconds": 0.5},
        {"measure": "u", "loop": "12:16 k=3", "items": [0], "scores": [1.0], "seconds": 0.5},
        {"measure": "t", "loop": "10:14 k=3", "items": [7], "scores": [plain[7] + 0.5]},
    ]
    others = [{"schema_version": 1}, {"measure": "t", "loop": "x", "items": [1], "scores": []}, {"items": [1, 2]}, 3]
    got = modules.run("journals.js", "m.splitJournal(a)", others + slices)
    assert got == {"slices": slices, "said": [], "others": others}
    told = [{"said": "t", "words": word, "unit": "nats", "loops": []} for word in ("first", "then")]
    assert modules.run("journals.js", "m.splitJournal(a).said", [*told, *slices]) == told[1:]  # the last one holds
    first, second, third, fourth = modules.run("journals.js", "m.sumUp(a)", slices)
    assert (first["loop"], first["n"], first["gain"], first["seconds"]) == ("plain", 40, None, 3.0)
    assert first["score"] == pytest.approx(plain.mean())
    items = [30, 3, 4, 10]
    gain = mean_interval(looped[items] - plain[items])
    assert (second["loop"], second["n"]) == ("12:16 k=3", 4)
    assert [second[name] for name in ("score", "gain", "low", "high")] == pytest.approx(
        [looped[items].mean(), gain.mean, gain.low, gain.high], rel=1e-5
    )
    assert (third["measure"], third["gain"], third["low"]) == ("u", None, None)  # nothing to compare with
    quantiles = modules.run("journals.js", "a.map(m.t95)", list(range(1, 60)))
    assert quantiles == pytest.approx([t_quantile(0.975, df) for df in range(1, 60)], rel=1e-3)
    assert (fourth["gain"], fourth["low"]) == (pytest.approx(0.5), None)  # one item has no interval
