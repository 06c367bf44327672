"""Prints the tables of docs/results-quantisation.md from studies that `ggufloop compare` wrote.

    python scripts/results_quantisation.py studies/*/study.jsonl
    python scripts/results_quantisation.py --figures docs studies/*/study.jsonl    # and draws the figures there, small

A file that has the same weights as an earlier one is left out: it would count as a second measurement of nothing new.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ggufloop.figures import study as study_plots
from ggufloop.figures import style
from ggufloop.loop import PLAIN
from ggufloop.measure.stats import Estimate
from ggufloop.measure.verdict import HELPS, HURTS
from ggufloop.study import analysis, file, report
from ggufloop.study.file import Study


def interval(e: Estimate | None, form: str) -> str:
    return "" if e is None else f"{e.mean:{form}} [{e.low:{form}}, {e.high:{form}}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ladder(s: Study, types: list[str]) -> str:
    """The plain files."""
    rows = []
    for t in types:
        f, cell, is_reference = s.file(t), s.cell(t), t == s.types[0]
        rows.append([
            t, f"{f.nbytes / 2**20:.0f}", f"{f.bits_per_weight:.2f}",
            *("" if math.isinf(snr) else f"{snr:.1f}" for snr in (f.window_snr, f.snr)),
            "{:.3f} +/- {:.2f}".format(*cell.ppl),
            "" if is_reference else interval(-analysis.lost(s, t), "+.4f"),
            "" if is_reference else interval(analysis.kld(s, t), ".4f"),
            "" if is_reference else f"{100 * cell.mean('same_top'):.1f}",
        ])  # fmt: skip
    head = [
        "type",
        "MiB",
        "bits",
        "SNR of window, dB",
        "of all, dB",
        "PPL",
        f"gain over {s.types[0]}",
        "KLD",
        "same top %",
    ]
    return table(head, rows)


def loops_of(s: Study) -> list[tuple[str, str]]:
    """Loops with what to call them in a table."""
    named = [(loop, f"{kind} K={k}") for kind, found in study_plots.families(s).items() for k, loop in found]
    return [(loop, name) for loop, name in named if loop in {row.loop for row in analysis.rows(s)}]


def amplification(s: Study, types: list[str]) -> str:
    loops = loops_of(s)
    rows = [[t, *(interval(analysis.amplification(s, t, loop), ".2f") for loop, _ in loops)] for t in types[1:]]
    return table(["A_K", *(name for _, name in loops)], rows)


def gains(s: Study, types: list[str]) -> str:
    """In bold what Holm's correction leaves."""
    loops, rows = loops_of(s), []
    for t in types:
        said = analysis.verdicts(s, t)
        cells = []
        for loop, _ in loops:
            text = interval(said[loop].gain, "+.4f")
            cells.append(f"**{text}**" if said[loop].word in (HELPS, HURTS) else text)
        rows.append([t, *cells])
    return table(["gain by looping", *(name for _, name in loops)], rows)


def interactions(s: Study, types: list[str]) -> str:
    """Uncorrected; in bold where the interval leaves out 0."""
    rows = []
    for t in types[1:]:
        found = [analysis.interaction(s, t, loop) for loop, _ in loops_of(s)]
        rows.append([t, *(f"**{interval(e, '+.3f')}**" if e.low * e.high > 0 else interval(e, "+.3f") for e in found)])
    return table([f"gain beyond {types[0]}'s", *(name for _, name in loops_of(s))], rows)


def costs(s: Study, types: list[str]) -> str:
    """Median seconds of a looped chunk over those of the same chunk plain, the reference's and all files' together."""
    import numpy as np

    parts = []
    for loop, name in loops_of(s):
        pairs = [s.paired((t, loop), (t, PLAIN)) for t in types]
        ratios = np.concatenate([a.values("seconds") / b.values("seconds") for a, b in pairs])
        parts.append(f"{name} {np.median(ratios):.2f}")
    return "Median time over plain, all files, in this run: " + ", ".join(parts) + ".\n"


def draw(s: Study, folder: Path) -> None:
    """The two figures over SNR, named by the model up to its quantisation."""
    model = s.header.model.removesuffix(".gguf").lower()
    for name, figure in study_plots.figures(s).items():
        if name not in (study_plots.SIZE, study_plots.KLD):
            with style.style():
                figure.savefig(folder / f"{name}-{model}.png", dpi=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, metavar="study.jsonl")
    parser.add_argument("--figures", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    for path in arguments.studies:
        s = file.read(path)
        measured = {row.file.type for row in analysis.rows(s) if row.loop == PLAIN}
        types = [t for t in s.types if t in measured and s.same_weights(t) is None]
        print(f"## {s.header.model}\n")
        print("\n".join(f"* {line}" for line in report.summary(s) if line != report.DIRECTION), "\n", sep="")
        print(ladder(s, types))
        if loops_of(s):
            print(amplification(s, types))
            print(gains(s, types))
            print(interactions(s, types))
            print(costs(s, types))
        if arguments.figures is not None:
            draw(s, arguments.figures)


if __name__ == "__main__":
    main()
