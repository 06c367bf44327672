"""JSON schemas of requests, bounded before they become grammars.

    grammar = compile_schema({"type": "object", ...})      # GBNF; raises UsageError

A schema is small and what it allows is not: `maxLength: 1000000000` is written out by the converter, and a pattern such
as `((a?){40}){40}` keeps the matcher busy for half a minute per token. So repetitions are counted, along each path
from the root, and refused where they multiply to more than any sensible schema needs.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ggufloop.errors import UsageError
from ggufloop.sequences import grammar_of

MOST_BYTES = 64 * 2**10
_MOST_REPETITIONS, _MOST_IN_PATTERN, _MOST_OF_PATTERN = 2000, 100, 500
_DEEPEST = 64
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_BRACES = re.compile(r"\{(\d+)(?:,(\d*))?\}")


def compile_schema(schema: dict[str, Any]) -> str:
    """The grammar of a schema. Raises UsageError for one that is too large, or that cannot be written as one."""
    _check(schema, 1, 1, 0)
    if len(json.dumps(schema)) > MOST_BYTES:
        raise UsageError(f"a JSON schema of more than {MOST_BYTES} bytes is not accepted.", "give a smaller one.")
    return grammar_of(schema)


def _check(schema: Any, repeated: int, in_patterns: int, depth: int) -> None:
    """repeated, in_patterns: how often what is looked at may occur, by what is around it."""
    if depth > _DEEPEST:
        raise UsageError(f"a JSON schema nested more than {_DEEPEST} deep is not accepted.", "give a flatter one.")
    if isinstance(schema, list):
        for item in schema:
            _check(item, repeated, in_patterns, depth + 1)
    if not isinstance(schema, dict):
        return
    counts = [schema[name] for name in _COUNTS if isinstance(schema.get(name), (int, float))]
    repeated *= max(1, *counts, 1)
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        if len(pattern) > _MOST_OF_PATTERN:
            raise UsageError(f"a pattern of more than {_MOST_OF_PATTERN} characters is not accepted.", "shorten it.")
        for low, high in _BRACES.findall(pattern):
            in_patterns *= max(1, int((high or low)[:9]))
    if repeated > _MOST_REPETITIONS or in_patterns > _MOST_IN_PATTERN:
        raise UsageError(
            f"a JSON schema that repeats something up to {max(repeated, in_patterns)} times is not accepted.",
            f"{_MOST_REPETITIONS} items or characters are the most, and {_MOST_IN_PATTERN} in a pattern.",
        )
    for value in schema.values():
        _check(value, repeated, in_patterns, depth + 1)
