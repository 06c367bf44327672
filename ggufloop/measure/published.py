"""Scores that others published, to be read beside ours: published.csv, each with its source.

    for score in published("SmolLM2-135M-Instruct.Q4_1.gguf", 30, "piqa"): print(score.line())

A model is known by how its file's name begins and its number of layers, whatever its quantisation: which one was
measured is said. Questions, shots and prompts may differ from ours, so these are no oracle. Per cent; gains in points.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ggufloop.models.hubfiles import split_name


@dataclass(frozen=True)
class Published:
    """One score of a model on a task, plain or looped or what the loop gained, with its 95 % interval where it has one.

    file: the quantisation that was measured, '' where it was not quantised; loop: '' where none is named.
    """

    model: str
    file: str
    layers: int
    task: str
    metric: str
    loop: str
    plain: float | None
    looped: float | None
    gain: float | None
    low: float | None
    high: float | None
    source: str

    def line(self) -> str:
        """'plain accuracy 57.1 %, looped 59.8 % (15:19 k=3), gain +2.64 points; Qwen3-4B-Instruct, SOURCE'."""
        loop = f" ({self.loop})" if self.loop else ""
        said = [f"plain {self.metric} {self.plain:.2f} %"] if self.plain is not None else []
        said += [f"looped {self.looped:.2f} %"] if self.looped is not None else []
        if self.gain is not None:
            interval = "" if self.low is None else f" [{self.low:+.2f}, {self.high:+.2f}]"
            said.append(f"gain {self.gain:+.2f}{interval} points of {self.metric}{loop}")
        of = " ".join(word for word in (self.model, self.file) if word)
        return f"{', '.join(said)}; {of}, {self.source}"


def _number(text: str) -> float | None:
    return float(text) if text else None


@cache
def table() -> tuple[Published, ...]:
    """All of them."""
    with Path(__file__).with_name("published.csv").open(encoding="utf-8", newline="") as file:
        return tuple(_score(row) for row in csv.DictReader(file))


def _score(row: dict[str, str]) -> Published:
    plain, looped, gain, low, high = (_number(row[name]) for name in ("plain", "looped", "gain", "low", "high"))
    return Published(row["model"], row["file"], int(row["layers"]), row["task"], row["metric"], row["loop"],
                     plain, looped, gain, low, high, row["source"])  # fmt: skip


def published(file: str, n_layer: int, task: str) -> list[Published]:
    """What is published of a task on the model a file is, or is a quantisation of."""
    name = split_name(file)[0].lower()
    return [p for p in table() if p.task == task and p.layers == n_layer and name.startswith(p.model.lower())]
