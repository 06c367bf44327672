"""Where lm-eval's task files here get their questions from: `custom_dataset: !function data.brackets`.

lm-eval loads this file by its path and hands over the task's metadata, which nothing here depends on.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from ggufloop.tasks.questions import questions


def _split(task: str) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(questions(task))}


def mmlu_dev(**metadata: Any) -> dict[str, Dataset]:
    """The questions of mmlu_dev."""
    return _split("mmlu_dev")


def wordnet_definitions(**metadata: Any) -> dict[str, Dataset]:
    """The questions of wordnet_definitions."""
    return _split("wordnet_definitions")


def arithmetic_guess(**metadata: Any) -> dict[str, Dataset]:
    """The questions of arithmetic_guess."""
    return _split("arithmetic_guess")


def brackets(**metadata: Any) -> dict[str, Dataset]:
    """The questions of brackets."""
    return _split("brackets")
