"""A study for people: the table, what it comes to in sentences, and one HTML file that needs nothing else.

    shown(study).render("md")              # estimates with their intervals, for eyes
    numbers(study).render("csv")           # every number in a column of its own, for programs
    html(study, {"ppl-size": svg, ...}, command)

The HTML asks no other file or server for anything; its figures are drawn in the text's colour, so that they follow a
light or a dark screen.
"""

from __future__ import annotations

import html as escaping
import math
import re
from collections.abc import Mapping

from ggufloop.errors import UsageError
from ggufloop.loop import PLAIN
from ggufloop.measure.dependence import FEW
from ggufloop.measure.stats import Estimate
from ggufloop.measure.verdict import HELPS, HURTS, LEAST, SAME, UNSURE
from ggufloop.scaling import noise
from ggufloop.study import across, analysis, pareto
from ggufloop.study.analysis import Row, rows
from ggufloop.study.file import Study
from ggufloop.table import Cell, Column, Table

DIRECTION = (
    "KLD is llama-perplexity's, of a model from the reference under the same loop: "
    "the sum over the vocabulary of p_ref (ln p_ref - ln p_model)."
)


def shown(study: Study) -> Table:
    """The table for eyes, one row per cell; intervals are 95 %, over chunks."""
    found = rows(study)
    tasks = list(dict.fromkeys(task for row in found for task in row.answers))
    columns = [
        Column("type"), Column("MiB", ".1f"), Column("bits", ".2f"), Column("SNR dB", ".1f"), Column("loop"),
        Column("chunks"), Column("PPL"), Column("gain by looping"), Column("KLD"), Column("A_K"),
        Column("same top %", ".1f"), *[Column(part) for task in tasks for part in (task, f"{task} gain")],
        Column("t/s", ".1f"), Column("verdict"),
    ]  # fmt: skip
    return Table(tuple(columns), [_shown(row, tasks) for row in found])


def _shown(row: Row, tasks: list[str]) -> list[Cell]:
    answers: list[Cell] = []
    for task in tasks:
        accuracy, flips = row.answers.get(task), row.flips.get(task)
        answers += ["" if accuracy is None else f"{accuracy.mean:.3f}",
                    "" if flips is None else _interval(flips.difference, "+.3f")]  # fmt: skip
    verdict = row.verdict
    return [
        row.file.type,
        row.file.nbytes / 2**20,
        row.file.bits_per_weight,
        row.file.window_snr if math.isfinite(row.file.window_snr) else None,
        row.loop,
        row.chunks,
        f"{row.ppl:.2f} +/- {row.error:.2f}",
        "" if verdict is None else _interval(verdict.gain, "+.4f"),
        "" if row.kld is None else _interval(row.kld, ".4f"),
        "" if row.amplification is None else _interval(row.amplification, ".2f"),
        100 * row.same_top,
        *answers,
        row.speed,
        "" if verdict is None else verdict.phrase,
    ]


def _interval(e: Estimate, form: str) -> str:
    return f"{e.mean:{form}} [{e.low:{form}}, {e.high:{form}}]"


_OF_TASK = ("n", "accuracy", "gain", "gain low", "gain high", "McNemar p")


def numbers(*studies: Study) -> Table:
    """The table for programs, one row per cell, of several models one after the other."""
    found = [(study, row) for study in studies for row in rows(study)]
    plain: dict[tuple[int, str], float | None] = {(id(study), row.file.type): None for study, row in found}
    plain |= {(id(study), row.file.type): row.ppl for study, row in found if row.loop == PLAIN}
    best = {id(study): {p.file.type: p.best for p in pareto.points(study)} for study in studies}
    tasks = list(dict.fromkeys(task for _, row in found for task in row.answers))
    three = ("", " low", " high")
    names = ["model", "text", "type", "bytes", "bits per weight", "SNR dB", "window SNR dB", "loop", "chunks", "n",
             "PPL", "PPL error", "plain PPL", "gain", "low", "high", "p", *[f"KLD{end}" for end in three],
             *[f"A_K{end}" for end in three], "same top",
             *[f"{task} {what}" for task in tasks for what in _OF_TASK],
             "tokens per second", "verdict", "worth", "front"]  # fmt: skip
    return Table(
        tuple(Column(name) for name in names),
        [
            [
                *_numbers(study, row, tasks, plain[id(study), row.file.type]),
                best[id(study)].get(row.file.type) if row.loop == PLAIN else None,
            ]
            for study, row in found
        ],
    )


def _numbers(study: Study, row: Row, tasks: list[str], plain: float | None) -> list[Cell]:
    answers: list[Cell] = []
    for task in tasks:
        accuracy, flips = row.answers.get(task), row.flips.get(task)
        answers += [None, None] if accuracy is None else [accuracy.n, accuracy.mean]
        answers += [*_three(None if flips is None else flips.difference), None if flips is None else flips.p]
    f, verdict = row.file, row.verdict
    return [
        study.header.model, study.header.text, f.type, f.nbytes, f.bits_per_weight, f.snr, f.window_snr, row.loop,
        row.chunks, row.n, row.ppl, row.error, plain, *_three(None if verdict is None else verdict.gain),
        None if verdict is None else verdict.p, *_three(row.kld), *_three(row.amplification), row.same_top, *answers,
        row.speed, None if verdict is None else verdict.word, None if verdict is None else analysis.WORTH,
    ]  # fmt: skip


def _three(e: Estimate | None) -> list[Cell]:
    return [None, None, None] if e is None else [e.mean, e.low, e.high]


def headline(study: Study) -> str:
    """What the study comes to, in a sentence: does looping help?"""
    said = [(t, loop, v) for t in study.types for loop, v in analysis.verdicts(study, t).items()]
    if not said:
        front = next(iter(pareto.summary([study])), "nothing can be said yet: no cell has two chunks.")
        return f"{front[0].upper()}{front[1:]}"
    n, words = len(said), [v.word for _, _, v in said]
    helping = [each for each in said if each[2].word == HELPS]
    if helping:
        type_, loop, best = max(helping, key=lambda each: each[2].gain.mean)
        most = ", most" if len(helping) > 1 else ":"
        return (f"Looping helps in {len(helping)} of {n} cells{most} {type_} under {loop}, by "
                f"{_interval(best.gain, '+.4f')} nats per token.")  # fmt: skip
    unsure, chunks = words.count(UNSURE), max(v.gain.n for _, _, v in said)
    if unsure == n:
        return f"Not enough data to tell whether looping helps: {chunks} chunks cannot in any of {n} cells."
    if unsure:
        return f"No loop was found to help; in {unsure} of {n} cells {chunks} chunks cannot tell."
    same = f"in {words.count(SAME)} it has no effect larger than {analysis.WORTH:g} nats per token"
    return f"No loop helps: of {n} cells looping hurts in {words.count(HURTS)}, {same}."


def summary(study: Study) -> list[str]:
    """What the study is of and comes to, a sentence each."""
    h, found = study.header, rows(study)
    if not found:
        return ["no cell has two chunks yet, and one says nothing about other texts: run it again to go on."]
    n = f"{found[0].chunks} chunks" if len({r.chunks for r in found}) == 1 else "chunks"
    source = study.file(study.types[0]).note
    out = [
        f"reference: {study.types[0]}, {source}"
        + (". What its quantisation lost before is in none of these numbers." if "dequantised" in source else "."),
        f"{n} of {h.n_ctx} tokens of {h.text}, their second halves scored; gains paired by chunk, intervals 95 %, "
        "those of gains for all loops of a file together.",
        *_few(found),
        *_verdicts(found),
        *_line(study),
        DIRECTION,
        f"t/s: prompt tokens per second of the median chunk in this run, -t {h.settings.get('threads', '?')}.",
    ]
    return [*out, *_notes(study, {row.file.type for row in found})]


def _notes(study: Study, types: set[str]) -> list[str]:
    """What is worth knowing of the files."""
    notes = []
    for f in study.files[1:]:
        if f.type not in types:
            continue
        same = study.same_weights(f.type)
        said = [f.note] * bool(f.note) + [f"the same weights as {same}, so no file of its own"] * bool(same)
        if f.snr >= analysis.MOST_SNR:
            said.append("its weights are the reference's, so its KLD is what kernels' rounding of activations does")
        if said:
            notes.append(f"{f.type}: {'; '.join(said)}.")
    return notes


def _few(found: list[Row]) -> list[str]:
    """Chunks that are too few for a verdict."""
    least = min(row.chunks for row in found)
    if least >= LEAST or all(row.verdict is None for row in found):
        return []
    return [f"{least} chunks cannot tell a loop from plain, whatever it does: measure {LEAST} at least, better "
            f"{FEW}."]  # fmt: skip


def _verdicts(found: list[Row]) -> list[str]:
    looped = [row for row in found if row.verdict is not None]
    if not looped:
        return []
    words = [row.verdict.word for row in looped if row.verdict is not None]
    counts = [f"{words.count(word)} {word}" for word in analysis.WORDS]
    counts[2] += f" {analysis.WORTH:g}"
    out = [f"looping, {len(looped)} cells, corrected by Holm over the loops of each file: {', '.join(counts)}."]
    ratios = [row.amplification for row in looped if row.amplification is not None]
    if ratios:
        above, below = sum(r.low > 1 for r in ratios), sum(r.high < 1 for r in ratios)
        out.append(f"A_K, {len(ratios)} cells: the interval is above 1 in {above}, below in {below}.")
    return out


def _line(study: Study) -> list[str]:
    """The line through ln KLD of the plain files, and how it predicts each from the others."""
    snr, kld, bits = analysis.noise(study)
    try:
        line = noise.fit_kld(snr, kld, bits)
    except UsageError as e:
        return [f"no line through KLD over SNR: {e.message}"]
    u, eta = (f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in (line.u, line.eta))
    floor = analysis.floor(study)
    above = f"(KLD - {floor:.4f}, the kernels' rounding)" if floor else "KLD"
    said = (
        f"ln {above} = u + eta ln r with r = 10^(-SNR/10) of all weights, {line.n} plain files: u = {u}, eta = {eta}, "
        f"R2 {line.r2:.3f}"
    )
    try:
        held = noise.held_out(noise.fit_kld, snr, kld, bits)
    except UsageError:
        return [f"{said}."]
    inside = sum(p.predicted.low <= p.measured <= p.predicted.high for p in held)
    return [f"{said}; each file predicted from the others: {inside} of {len(held)} inside the interval."]


# HTML

_STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --paper: #ffffff; --faint: #d9dce2; --soft: #f4f6f9;
        --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #d7dbe0; --paper: #15181c; --faint: #3a4048; --soft: #1e2329; --good: #57c26f; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.1rem; margin: 0; opacity: .75; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.headline { font-size: 1.4rem; line-height: 1.35; font-weight: 600; margin: .3rem 0 1rem; max-width: 52rem;
            text-wrap: balance; }
ul { padding-left: 1.2rem; max-width: 60rem; }
.wide { overflow-x: auto; --shade: light-dark(#0003, #000a);
        background: linear-gradient(to right, var(--paper) 40%, transparent) left / 2.5rem 100% local no-repeat,
        linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100% local no-repeat,
        linear-gradient(to right, var(--shade), transparent) left / .9rem 100% scroll no-repeat,
        linear-gradient(to left, var(--shade), transparent) right / .9rem 100% scroll no-repeat; }
table { border-collapse: collapse; font-size: 13px; line-height: 1.35; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--faint); text-align: right; vertical-align: top;
         white-space: nowrap; font-variant-numeric: tabular-nums; }
th { vertical-align: bottom; white-space: normal; } th.word, td.word { text-align: left; }
td.verdict { white-space: normal; min-width: 7rem; } small { display: block; font-size: 11px; opacity: .75; }
tr.first td { border-top: 2px solid var(--faint); } tr:hover td { background: var(--soft); }
.helps { color: var(--good); font-weight: 600; } .hurts { color: var(--bad); }
figure { margin: 1.5rem 0; } svg { max-width: 100%; height: auto; color: var(--ink); }
code, pre { background: var(--soft); padding: .1rem .3rem; } pre { padding: .8rem; overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { margin-top: 1rem; } .headline { font-size: 1.15rem; }
                            dl { display: block; } dd { margin-bottom: .4rem; } }
"""

_COLUMNS = {
    "bits": "bits per weight, true size, all tensors",
    "SNR dB": "of the window's weights against the reference's",
    "gain by looping": "nats per token, looped over plain on the same chunks; above 0 looping helps",
    "A_K": "KLD of the looped file over KLD of the plain one: 1 leaves the noise of quantisation as it is, "
    "K^2 is what K undamped passes reach at most",
    "same top %": "tokens at which file and reference, under the same loop, find the same token likeliest",
}


def html(study: Study, figures: Mapping[str, str], command: str) -> str:
    """A whole page. figures: SVG by name, as matplotlib writes it; command: what makes this study again."""
    h = study.header
    facts = {
        "model": h.model, "sha256": h.source_sha256, "architecture": f"{h.architecture}, {h.n_layer} layers",
        "weights": f"{h.n_params / 1e6:.1f} million", "window": f"{h.window[0]}:{h.window[1]}",
        "text": f"{h.text}, sha256 {h.text_sha256[:16]}...", "chunk": f"{h.n_ctx} tokens",
        "settings": ", ".join(f"{k} {v}" for k, v in h.settings.items()),
        "ggufloop": f"{h.ggufloop}, patch {h.patch_id}",
    }  # fmt: skip
    parts = [
        f"<h1>Bits against loops: {_e(h.model)}, {_e(h.text)}</h1>",
        f'<p class="headline">{_e(headline(study))}</p>',
        "<ul>" + "".join(f"<li>{_e(line)}</li>" for line in summary(study)) + "</ul>",
        *[_figure(svg) for svg in figures.values()],
        *_sizes(study),
        *_across(study),
        "<h2>Every cell</h2>", _html_table(_arranged(shown(study))),
        "<dl>" + "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in _COLUMNS.items()) + "</dl>",
        "<h2>What was measured</h2>",
        "<dl>" + "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in facts.items()) + "</dl>",
        "<p>In the same folder: <code>table.csv</code>, every number in a column of its own; <code>study.jsonl</code>, "
        "every chunk; the figures as PNG.</p>",
        f"<p>Again, or more of it:</p><pre>{_e(command)}</pre>",
    ]  # fmt: skip
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(h.model)}: bits against loops</title><style>{_STYLE}</style></head><body>\n"
    )
    return head + "\n".join(parts) + "\n</body></html>\n"


def _sizes(study: Study) -> list[str]:
    said = pareto.summary([study])
    if not said:
        return []
    lines = "".join(f"<li>{_e(line)}</li>" for line in said)
    return ["<h2>KLD against bytes</h2>", _html_table(_arranged(pareto.table([study]))), f"<ul>{lines}</ul>"]


def _across(study: Study) -> list[str]:
    said = across.summary([study])
    if not said:
        return []
    lines = "".join(f"<li>{_e(line)}</li>" for line in said)
    return [
        "<h2>A loop, or the next larger file</h2>",
        _html_table(_arranged(across.table([study]))),
        f"<ul>{lines}</ul>",
    ]


def _e(text: str) -> str:
    return escaping.escape(str(text))


def _arranged(table: Table) -> Table:
    """The verdict beside its loop, what is the same of a whole file last; chunks and text only where they differ."""
    names = [c.name for c in table.columns]
    order = list(range(len(names)))
    if "loop" in names:
        first = ("type", "file", "loop", "verdict", "gain by looping", "KLD", "A_K")
        last = ("MiB", "bits", "SNR dB")
        order.sort(key=lambda i: first.index(names[i]) if names[i] in first else 9 + (names[i] in last))
    kept = [i for i in order if names[i] not in ("chunks", "text") or len({row[i] for row in table.rows}) > 1]
    return Table(tuple(table.columns[i] for i in kept), [[row[i] for i in kept] for row in table.rows])


_SPREAD = re.compile(r"(\S+) (\[.*\]|\+/- .*)")
"""An estimate as the table has it, and what is said of its error: the latter goes below, in a narrower column."""


_WORDS = ("text", "type", "file", "loop", "minus, plain", "verdict", "word", "front")


def _html_table(table: Table) -> str:
    words = {i for i, c in enumerate(table.columns) if c.name in _WORDS}
    of_file = {i for i, c in enumerate(table.columns) if c.name in ("type", "MiB", "bits", "SNR dB")}
    by = next(i for i, c in enumerate(table.columns) if c.name in ("type", "file"))
    head = "".join(f"<th{_class(i in words)}>{_e(c.name)}</th>" for i, c in enumerate(table.columns))
    lines, before = [], None
    for row in table.rows:
        cells = []
        for i, (column, value) in enumerate(zip(table.columns, row, strict=True)):
            if i in of_file and row[by] == before:  # said once
                value = ""
            text = "" if value is None else format(value, column.form) if isinstance(value, float) else str(value)
            word = next((w for w in (HELPS, HURTS) if text.startswith(w)), "")
            kind = f' class="word verdict {word}"' if column.name == "verdict" else _class(i in words)
            cells.append(f"<td{kind}>{_cell(text)}</td>")
        lines.append(f"<tr{' class=first' if row[by] != before else ''}>{''.join(cells)}</tr>")
        before = row[by]
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Table"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    parts = _SPREAD.fullmatch(text)
    return _e(text) if parts is None else f"{_e(parts[1])} <small>{_e(parts[2])}</small>"


def _class(is_word: bool) -> str:
    return ' class="word"' if is_word else ""


def _figure(svg: str) -> str:
    """An SVG of matplotlib's without its preamble, white ground and links, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, own in (("#30343b", "currentColor"), ("#000000", "currentColor"), ("#d9dce2", "var(--faint)")):
        svg = svg.replace(colour, own)
    svg = svg.replace("fill: #ffffff", "fill: none")
    svg = re.sub(r"<text(?![^>]*fill)([^>]*style=\")", r"<text\1fill: currentColor; ", svg)
    return f"<figure>{svg}</figure>"
