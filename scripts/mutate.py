#!/usr/bin/env python3
"""Damages thousands of files with a seed and gives them to the commands: none may crash, hang or say nothing.

    python scripts/mutate.py --count 3000                   # GGUF files and records, a table of how commands ended
    python scripts/mutate.py --only gguf --seed 7           # cases whose name begins so
    python scripts/mutate.py --case "gguf llama" --at 7.12 --keep bad.gguf     # one file again, and all it says

File i of seed s is drawn from "s.i" alone, so what is printed of a failure finds it again. Besides failing in
a line of ours, a command may not take more than twice the memory that it takes for the sound file. `run` is called
with --no-try; where that ends the process, the same without it has to say so in a line (column "tried"). Exit code 0
if nothing ended badly.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutations import FILE, FOLDER, Case, forked

KINDS = tuple(
    name for name in ("gguf", "records") if (Path(__file__).resolve().parent / "mutations" / f"{name}.py").exists()
)
TIMEOUT = 30.0
_SLACK = 32 << 20  # bytes by which the memory of two runs of the same may differ
TRIED = "tried"
"""What ended the process was a line of ours once the file was tried first."""


@dataclass(frozen=True)
class Result:
    """How a command ended on a damaged file. at: SEED.NUMBER of the file."""

    case: str
    at: str
    command: str
    ended: forked.Ended


def collect(only: Sequence[str], folder: Path, real: Path | None = None) -> list[Case]:
    """The cases whose name begins with one of `only`, all if it is empty."""
    found: list[Case] = []
    for kind in KINDS:
        if only and not any(word.split()[0] == kind for word in only):
            continue
        place = folder / kind
        place.mkdir()
        module = importlib.import_module(f"mutations.{kind}")
        found += module.cases(place, real) if kind == "gguf" else module.cases(place)
    return [case for case in found if not only or any(case.name.startswith(word) for word in only)]


def damaged(case: Case, at: str) -> bytes:
    """File `at` of a case."""
    return case.mutate(case.data, random.Random(f"{case.name} {at}"))


def _commands(case: Case, data: bytes, most: dict[str, int] | None) -> Iterator[tuple[str, forked.Ended]]:
    """How each command of a case ends on these bytes."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        folder = Path(name)
        path = folder / case.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        for command, words in case.commands.items():
            place = folder / command
            place.mkdir()
            given = [word.replace(FILE, str(path)).replace(FOLDER, str(place)) for word in words]
            limit = None if most is None else most[command]
            ended = forked.run(given, TIMEOUT, limit)
            if ended.outcome in forked.BAD and "--no-try" in given:
                again = forked.run([word for word in given if word != "--no-try"], TIMEOUT, limit)
                if again.outcome == forked.LINE:
                    ended = forked.Ended(TRIED, again.words, again.peak)
            yield command, ended


_sound: dict[str, dict[str, int]] = {}


def _limits(case: Case) -> dict[str, int]:
    """Twice the memory that each command takes for the sound file, which has to work."""
    if case.name not in _sound:
        limits = {}
        for command, ended in _commands(case, case.data, None):
            if ended.outcome != forked.WORKED:
                raise RuntimeError(f"{command} of {case.name} does not work: {ended.outcome}: {ended.words}")
            limits[command] = 2 * ended.peak + _SLACK
        _sound[case.name] = limits
    return _sound[case.name]


_cases: list[Case] = []  # of a worker, which is a fork


def _work(job: tuple[int, str]) -> list[Result]:
    case, at = _cases[job[0]], job[1]
    limits = _limits(case)
    return [Result(case.name, at, command, ended) for command, ended in _commands(case, damaged(case, at), limits)]


def run(cases: list[Case], count: int, seed: int, jobs: int) -> Iterator[Result]:
    """Damage `count` files and run the commands on them; `forked.prepare` was called."""
    _cases[:] = cases
    drawn = random.Random(seed)
    weights = [case.share for case in cases]
    todo = [(drawn.choices(range(len(cases)), weights)[0], f"{seed}.{i}") for i in range(count)]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for results in pool.imap_unordered(_work, todo):
            yield from results


def table(results: Sequence[Result]) -> str:
    """Counts by command."""
    columns = [forked.WORKED, forked.LINE, TRIED, *forked.BAD]
    counts = Counter((r.command, r.ended.outcome) for r in results)
    commands = list(dict.fromkeys(r.command for r in results))
    rows = [["command", "files", *columns]]
    for command in commands:
        of = [counts[command, column] for column in columns]
        rows.append([command, str(sum(of)), *map(str, of)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _once(case: Case, at: str, keep: Path | None) -> int:
    data = damaged(case, at)
    if keep is not None:
        keep.write_bytes(data)
    worst = 0
    for command, ended in _commands(case, data, _limits(case)):
        print(f"{command:<12}{ended.outcome:<12}{ended.peak >> 20:>6} MiB  {ended.words}")
        worst |= ended.outcome in forked.BAD
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=3000, help="files to damage")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="cases whose name begins so")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--real", type=Path, metavar="FILE", help="damage the first layers of this model's file too")
    parser.add_argument("--case", metavar="NAME", help="with --at: this case alone")
    parser.add_argument("--at", metavar="SEED.NUMBER", help="one file again")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="with --at: write the damaged file there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        forked.prepare()
        try:
            cases = collect([given.case] if given.case else given.only, Path(folder), given.real)
        except RuntimeError as e:
            parser.exit(1, f"error: {e}\n")
        if not cases:
            parser.error(f"no case begins with {' or '.join(given.only)}: the kinds are {', '.join(KINDS)}.")
        if given.at is not None:
            exact = next((case for case in cases if case.name == given.case), None)
            if exact is None:
                parser.error("--at needs --case NAME.")
            return _once(exact, given.at, given.keep)
        results: list[Result] = []
        with contextlib.suppress(KeyboardInterrupt):  # what was done so far is told
            for result in run(cases, given.count, given.seed, given.jobs):
                results.append(result)
                if result.ended.outcome in (TRIED, *forked.BAD):
                    e = result.ended
                    print(
                        f'{e.outcome}: {result.command} --case "{result.case}" --at {result.at}: {e.words}', flush=True
                    )
    print(table(results))
    return int(any(r.ended.outcome in forked.BAD for r in results))


if __name__ == "__main__":
    sys.exit(main())
