"""Shards of one evaluation put together: what a run by itself would have found, without a model.

    found = merge_evals([Path("results/m/eval-1-of-2.jsonl"), Path("results/m/eval-2-of-2.jsonl")])

The journals hold every answer as lm-eval was told it, so lm-eval is told it again, and makes the same of it. Journals
of different models, libraries, settings, tasks, seeds or loops are refused, naming what differs; another device is
noted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ggufloop import reading
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.measure.eval_journal import KIND, SCHEMA_VERSION, Started, open_journal, read_journal
from ggufloop.measure.eval_run import EvalResult, concluded, note_devices
from ggufloop.measure.journal import Journal
from ggufloop.measure.slices import Answered, Answers, Shard, Sliced, docs_of, file_name, sizes_of, slices_of
from ggufloop.measure.tasks import ask
from ggufloop.progress import Progress, silent
from ggufloop.tasks.loading import Tasks, load_tasks


def headers_of(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The first line of each journal. Raises UsageError for a file named twice, GgufloopError for one that is none."""
    if not paths:
        raise UsageError("no journal is named.", "name those of all shards: ggufloop merge DIR/MODEL/*-of-4.jsonl")
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice.", "name each journal once.")
    found = []
    for path in paths:
        header = Journal.header(path)
        if header is None:
            raise GgufloopError(f"{path} is not there, or holds nothing yet.", "run its shard first.")
        found.append(header)
    return found


def check_same(paths: Sequence[Path], headers: Sequence[Mapping[str, Any]]) -> None:
    """Raise GgufloopError naming the field if two journals are not of one run. Which shard they are may differ."""
    for path, header in zip(paths[1:], headers[1:], strict=True):
        for name in [*headers[0], *(name for name in header if name not in headers[0])]:
            a, b = headers[0].get(name), header.get(name)
            if a != b and name != "shard":
                raise GgufloopError(
                    f"{paths[0]} and {path} are not of one run: {name} is {short(a)} and {short(b)}.",
                    "merge shards that were run with the same model, library and settings.",
                )


def shards_of(headers: Sequence[Mapping[str, Any]]) -> int:
    """Of how many shards they are. Raises GgufloopError if that differs."""
    words = {str(header.get("shard") or "1/1") for header in headers}
    counts = {Shard.parse(word).of for word in words}
    if len(counts) > 1:
        raise GgufloopError(f"the journals are not of one run: they are shards {', '.join(sorted(words))}.",
                            "merge shards of the same number.")  # fmt: skip
    return counts.pop()


def check_missing(missing: Mapping[str, int | str], what: str) -> None:
    """Raise GgufloopError if something is missing, by shard."""
    if missing:
        named = ", ".join(f"{lacking} {what} of shard {shard}" for shard, lacking in missing.items())
        raise GgufloopError(f"this is not all: {named} are missing.",
                            "name the journals of all shards; one that was stopped goes on with --shard and the same "
                            "--out.")  # fmt: skip


def short(value: Any) -> str:
    """A value of a journal, as a message quotes it."""
    text = json.dumps(reading.finite(value), ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"


def merge_evals(paths: Sequence[Path], out: Path | None = None, progress: Progress = silent) -> EvalResult:
    """What a run by itself would have found. out: write its journal there, as `run_eval` would have.

    Raises UsageError for a journal named twice, GgufloopError for journals of different runs or that lack something.
    """
    headers = headers_of(paths)
    for path, header in zip(paths, headers, strict=True):
        if (header.get("kind"), header.get("schema_version")) != (KIND, SCHEMA_VERSION):
            raise GgufloopError(f"{path} is no journal of an evaluation of this version.", "name another file.")
    check_same(paths, headers)
    header = headers[0] | {"shard": None}
    tasks = _tasks(header, progress)
    slices = slices_of(tasks, header["limit"], header["drawn"])
    known = {(each.task, each.start): each for each in slices}
    runs: list[Started] = []
    devices: list[str] = []
    answered: dict[tuple[str, str, int, str], Answered] = {}
    for path in paths:
        _, records = read_journal(path, known)
        begun = [record for record in records if isinstance(record, Started)]
        runs += begun[-1:]
        devices += [run.device for run in begun]
        for record in records:
            if isinstance(record, Answered):
                if record.key in answered and answered[record.key].answers != record.answers:
                    raise GgufloopError(f"{path} answers questions of {record.task} again, and differently.",
                                        "name each shard once, and no run by itself beside them.")  # fmt: skip
                answered[record.key] = record
    _check_loops(runs)
    _check_whole(headers, list(known), runs[0].loops, answered)
    note_devices(devices, progress)
    found = {}
    for loop in runs[0].loops:
        docs = None if header["drawn"] is None else docs_of(slices)
        sliced = Sliced(Answers(answered.values()), loop, sizes_of(tasks), docs, compare=not header["chat_template"])
        from ggufloop.measure.lm_eval_model import KeptLM

        found[loop] = ask(KeptLM(sliced), tasks, header["limit"], header["chat_template"], docs)
    if out is not None:
        target = out / Path(header["model"]).stem / file_name(KIND, None)
        with open_journal(target, header, slices) as kept:
            kept.begin(runs[0])
            for loop in runs[0].loops:
                for key in known:
                    for one in (a for a in answered.values() if (a.loop, a.task, a.start) == (loop, *key)):
                        if kept.answers.find(one.loop, one.task, one.start, one.kind) is None:
                            kept.answers.add(one)
    return concluded(header, found, runs[0].paired, tasks, progress)


def _tasks(header: Mapping[str, Any], progress: Progress) -> Tasks:
    """The tasks of a run, their questions from where it had them. Raises GgufloopError if they are others now."""
    try:
        names = reading.typed(header["names"], tuple[str, ...], "names")
        tasks = load_tasks(names, bool(header["served"]), header["num_fewshot"], progress, header.get("include_path"))
        sizes, versions = tasks.sizes(), tasks.versions()
        groups = sizes_of(tasks)
        for name, there in header["tasks"].items():
            n = sizes.get(name, 0)
            here = {"version": versions.get(name), "n": min(n, header["limit"] or n), "slice": groups.get(name)}
            if here != there:
                raise GgufloopError(f"{name} is {short(there)} in the journals and {short(here)} here.",
                                    "merge where the shards were run.")  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise GgufloopError(f"the first line of the journals is damaged: {e!r}.", "run the shards again.") from None
    return tasks


def _check_loops(runs: Sequence[Started]) -> None:
    if not runs:
        raise GgufloopError("no shard has begun yet.", "run them first.")
    for run in runs[1:]:
        if (run.loops, run.paired) != (runs[0].loops, runs[0].paired):
            raise GgufloopError(
                f"the journals are not of one run: loops are {', '.join(runs[0].loops)} and {', '.join(run.loops)}.",
                "run the same loops last in each shard.",
            )


def _check_whole(
    headers: Sequence[Mapping[str, Any]],
    slices: Sequence[tuple[str, int]],
    loops: Sequence[str],
    answered: Mapping[tuple[str, str, int, str], Answered],
) -> None:
    """Raise GgufloopError if slices are missing, saying of which shard."""
    have = {key[:3] for key in answered}
    of = shards_of(headers)
    missing = {}
    for i in range(of):
        mine = Shard(i + 1, of).share(slices)
        lacking = sum((loop, *each) not in have for loop in loops for each in mine)
        if lacking:
            missing[f"{i + 1}/{of}"] = f"{lacking} of {len(mine) * len(loops)}"
    check_missing(missing, "slices")
