"""Where lm-eval's task files here get their questions from: `custom_dataset: !function data.brackets`.

lm-eval loads this file by its path and hands over the task's metadata, which nothing here depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from ggufloop.tasks.questions import questions


def _of(task: str) -> Callable[..., dict[str, Dataset]]:
    def splits(**metadata: Any) -> dict[str, Dataset]:
        return {"test": Dataset.from_list(questions(task))}

    return splits


mmlu_dev, wordnet_definitions, arithmetic_guess, brackets = map(
    _of, ("mmlu_dev", "wordnet_definitions", "arithmetic_guess", "brackets")
)
