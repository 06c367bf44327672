"""Shards of a study put together: the study that one `compare` would have measured.

    study = merge_studies(sorted(folder.glob("study-*-of-4.jsonl")), folder)
    study = take_over(folder / "study.jsonl", study)                  # what shards beside it have measured so far

A shard has its chunks and questions of every cell, so a cell's numbers are paired as ever; here they come together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.measure.merge import check_missing, check_same, headers_of, shards_of
from ggufloop.measure.slices import file_name
from ggufloop.study import file as studies
from ggufloop.study.file import Study, TaskResult


def merge_studies(paths: Sequence[Path], folder: Path) -> Study:
    """The study of all shards, kept in the folder as study.jsonl, or added to the one there.

    Raises UsageError for a journal named twice, GgufloopError for shards of different studies or that lack something.
    """
    headers = headers_of(paths)
    check_same(paths, headers)
    of = shards_of(headers)
    parts = [studies.read(path) for path in paths]
    if any(not part.header.shard for part in parts):
        raise UsageError("a whole study is among them.", "name the journals of shards: study-1-of-4.jsonl and so on.")
    _check_whole(parts, of)
    target = folder / file_name("study", None)
    study = studies.create(target, dataclasses.replace(parts[0].header, shard=""))
    for part in parts:
        for file in part.files:
            study = studies.add_file(target, study, file)
    for key in _keys(parts):
        cells = [part.cells[key] for part in parts if key in part.cells]
        for chunk in sorted((chunk for cell in cells for chunk in cell.chunks), key=lambda chunk: chunk.index):
            if study.lacks(*key, [chunk.index]):
                studies.add_chunk(target, *key, chunk)
        for task in dict.fromkeys(task for cell in cells for task in cell.tasks):
            whole = _together([cell.tasks[task] for cell in cells if task in cell.tasks])
            if study.lacks_task(*key, task, whole.limit):
                studies.add_task(target, *key, task, whole)
    return studies.read(target)


_MACHINE = ("threads", "gpu_layers", "split_mode", "tensor_split", "main_gpu", "device", "rpc_servers")
"""Settings that may differ between machines that share a study: a chunk is measured by one of them."""


def take_over(target: Path, study: Study) -> Study:
    """Add to the study kept in a file what shards beside it have measured of it; shards of another are left alone.

    Raises GgufloopError for a damaged one, and for one whose files of the ladder are others.
    """
    for path in sorted(target.parent.glob("study-*-of-*.jsonl")):
        part = studies.read(path)
        if _shared(part.header) != _shared(study.header):
            continue
        for file in part.files:
            study = studies.add_file(target, study, file)
        for key, cell in part.cells.items():
            for chunk in cell.chunks:
                if study.lacks(*key, [chunk.index]):
                    studies.add_chunk(target, *key, chunk)
        study = studies.read(target)
    return study


def _shared(header: studies.StudyHeader) -> studies.StudyHeader:
    settings = {name: value for name, value in header.settings.items() if name not in _MACHINE}
    return dataclasses.replace(header, shard="", settings=settings)


def _keys(parts: Iterable[Study]) -> list[tuple[str, str]]:
    """All (type, loop), in the order in which they were measured."""
    return list(dict.fromkeys(key for part in parts for key in part.cells))


def _together(results: Sequence[TaskResult]) -> TaskResult:
    """A task's questions in the order in which a run by itself asks them."""
    order = {name: i for i, name in enumerate(results[0].order)}
    rows = [row for result in results for row in zip(result.docs, result.right, result.gold, strict=True)]
    rows.sort(key=lambda row: (order.get(row[0][0], len(order)), row[0][1]))
    docs, right, gold = (tuple(column) for column in zip(*rows, strict=True))
    return TaskResult(docs, right, gold, results[0].limit)


def _check_whole(parts: Sequence[Study], of: int) -> None:
    """Raise GgufloopError if a shard is not there, or has fewer cells, chunks or tasks than the others."""
    there = {part.header.shard: part for part in parts}
    missing: dict[str, int | str] = {f"{i + 1}/{of}": "all" for i in range(of) if f"{i + 1}/{of}" not in there}
    check_missing(missing, "measurements")
    keys = _keys(parts)
    most = max((len(cell.chunks) for part in parts for cell in part.cells.values()), default=0)
    tasks = {task for part in parts for cell in part.cells.values() for task in cell.tasks}
    chunks = {chunk.index for part in parts for cell in part.cells.values() for chunk in cell.chunks}
    for name, part in there.items():
        mine = {i for i in range(max(chunks, default=-1) + 1) if i % of == int(name.split("/")[0]) - 1}
        lacking = 0
        for key in keys:
            cell = part.cells.get(key)
            have = {chunk.index for chunk in cell.chunks} if cell is not None else set()
            lacking += len(mine - have) + len(tasks - set(cell.tasks if cell is not None else ()))
        if lacking:
            missing[name] = lacking
    check_missing(missing, "measurements")
    if not most and not tasks:
        raise GgufloopError("no shard has measured anything yet.", "run them first.")
