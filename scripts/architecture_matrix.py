"""Runs the architecture matrix and writes docs/architectures.md from what it measured.

    python scripts/architecture_matrix.py                 # all rows, a few minutes on two cores
    python scripts/architecture_matrix.py llama gpt-oss   # these rows, printed only
    python scripts/architecture_matrix.py --refused       # rows of refused architectures too: what could be allowed

Needs the patched and the stock library (`ggufloop build`, `ggufloop build --stock`). Exit code 1 if a row fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from oracles import matrix  # noqa: E402  # found once the path is set
from support import archs  # noqa: E402  # found once the path is set

from ggufloop.models.architectures import KNOWN, LOOPS, WINDOW_RULES, refusal  # noqa: E402  # found once the path is set

PAGE = ROOT / "docs" / "architectures.md"

_HEAD = """\
# Architectures

Which models can loop, by the `general.architecture` of their GGUF file. This page is written by
`python scripts/architecture_matrix.py` from a run of the architecture matrix, and a test runs it again.

Each row below is a tiny random F32 model of that architecture, made from its metadata with every tensor llama.cpp's
loader asks for, and looped in the window given (half-open). It is listed because, on the CPU,

* with the loop off its logits equal the stock library's, bit for bit;
* `naive` K=2 with `--kv each` gives the logits of the file with the window physically repeated, on the stock library,
  for a prompt and for generated tokens: *equal* means bit for bit;
* the damped loop with K=3 is finite under every kv policy, moves the logits (column *K=3*: the largest change of any
  logit under `--kv first`; logits have a standard deviation of about 2), and under `each` and `frozen` does not depend
  on how the text is cut into batches (within 2e-4, which is rounding);
* in one batch `first`, `last` and `each` agree bit for bit, and switching the loop off restores the plain model;
* what `first` and `frozen` leave of a looped prompt is what the plain model would have left, bit for bit;
* in layer mode, with `each`, a prompt and the tokens after it give what they give as one batch;
* where `ggufloop inspect` predicts the size of the K/V cache, llama.cpp allocates it to the byte, looped or not.

A window with recurrent layers has the policies `first` and `each` only, and a model without a cache sees one batch.
`--loop-attention` is refused where an indexer chooses the keys: deepseek32, dots3note, glm-dsa, minimax-m3.
"""


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _repeated(row: archs.Row, result: matrix.Result) -> str:
    if result.repeated is None:
        return f"none: {row.unrepeatable}"
    return "equal" if result.repeated == 0 else "within 2e-4"


def page(results: Mapping[str, matrix.Result]) -> str:
    """The text of docs/architectures.md. results: of every row whose architecture loops, by name."""
    loops = [archs.ROWS[name] for name in sorted(results)]
    lines = [_HEAD, f"## These loop: {len(LOOPS)} architectures\n"]
    lines += [_row(["model", "cache", "window", "repeated file", "K=3"]), _row(["---"] * 5)]
    for row in loops:
        a, b = row.window
        result = results[row.name]
        cells = [row.name, row.cache, f"{a}:{b} of {row.n_layer}", _repeated(row, result), f"{result.moved:.2g}"]
        lines.append(_row(cells))
    lines.append("\n## Windows\n\nA window starts at layer 1 or later and ends before the last layer. Besides:\n")
    lines += [_row(["architecture", "the window"]), _row(["---"] * 2)]
    for arch, rules in sorted(WINDOW_RULES.items()):
        lines.append(_row([arch, " ".join(rule.__doc__ or "" for rule, _, _ in rules).rstrip(".")]))
    lines.append(f"\n## These are refused: {len(KNOWN) - len(LOOPS)} architectures\n")
    lines += [_row(["architecture", "why"]), _row(["---"] * 2)]
    lines += [_row([arch, refusal(arch) or ""]) for arch in sorted(KNOWN - set(LOOPS))]
    return "\n".join(lines) + "\n"


def _print(result: matrix.Result) -> None:
    if result.error:
        told = f"FAILED {result.error}"
    else:
        repeated = "-" if result.repeated is None else f"{result.repeated:.2g}"
        told = f"repeated {repeated:8} cut {result.cut:<8.2g} K=3 {result.moved:.3g}"
    print(f"{result.name:22} {result.seconds:5.1f} s  {told}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "rows", nargs="*", help="names of rows in tests/support/archs.py; default: all that should loop"
    )
    parser.add_argument("--refused", action="store_true", help="run the rows of refused architectures as well")
    parser.add_argument("--keep", type=Path, help="folder to keep the models in")
    args = parser.parse_args()
    names = args.rows or [name for name, row in archs.ROWS.items() if args.refused or refusal(row.arch) is None]
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for result in matrix.run(names, folder):
            _print(result)
            results[result.name] = result
    bad = [r.name for r in results.values() if r.error and refusal(archs.ROWS[r.name].arch) is None]
    print(f"{len(results)} rows, {sum(not r.error for r in results.values())} green")
    if not bad and not args.rows:
        PAGE.write_text(page({n: r for n, r in results.items() if refusal(archs.ROWS[n].arch) is None}))
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
