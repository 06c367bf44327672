"""What a result says, in a sentence, so that a list of results can say it first.

    headline(path, size, modified)          # "12:16 k=3 helps: +0.01012 [...]"; "" for a file without a verdict

Of a sweep it is what `ggufloop sweep` printed last, from its journal; of a study its report's first sentence; of an
answer the first two of its paragraph. A file is read again once it has changed.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from ggufloop.errors import GgufloopError

ANSWER = "answer.md"
_END = re.compile(r"(?<=\.) (?=[A-Z`])")  # of a sentence


@lru_cache(maxsize=2000)
def headline(path: Path, size: int, modified: float) -> str:
    """The verdict in a file of this size and time; "" if it has none, or cannot be read."""
    if path.suffix != ".jsonl" and path.name != ANSWER:
        return ""
    try:
        if path.name == ANSWER:
            return _of_answer(path.read_text(encoding="utf-8", errors="replace"))
        with path.open("rb") as file:
            head = _record(file.readline())
            if "measures" in head:
                said = [_record(line) for line in file if b'"said"' in line]
                return _of_sweep([record for record in said if isinstance(record.get("words"), str)])
        return _of_study(path) if "source_sha256" in head and not head.get("shard") else ""
    except (OSError, GgufloopError):
        return ""


def _record(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_answer(text: str) -> str:
    """A title, an empty line, the paragraph: `answer_report.markdown`."""
    parts = text.split("\n\n")
    is_answer = len(parts) > 1 and parts[0].startswith("# ")
    return " ".join(_END.split(parts[1])[:2]).replace("`", "") if is_answer else ""


def _of_sweep(said: list[dict[str, Any]]) -> str:
    """The last words on each measure."""
    words = {str(record.get("said")): record["words"] for record in said}
    told = " ".join(f"{name}: {text}" if len(words) > 1 else text for name, text in words.items())
    return told[:1].upper() + told[1:]


def _of_study(path: Path) -> str:
    from ggufloop.study import report  # numpy, only for those who have a study
    from ggufloop.study.file import read

    return report.headline(read(path))
