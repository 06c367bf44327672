"""Check a JSON value against the part of JSON Schema that this server's documents use.

    check(value, schema)        # raises Invalid, with the path of what is wrong: 'messages[0].role'

The schemas are those served at /openapi.json, so what is documented is what is checked.
"""

from __future__ import annotations

import json
import math
from typing import Any

from ggufloop.errors import UsageError


class Invalid(UsageError):
    """A value that its schema does not allow; `param` says where it is."""

    def __init__(self, param: str, rule: str) -> None:
        super().__init__(f"{param or 'the request'} {rule}.", "see /openapi.json.")
        self.param = param


_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def parse(body: bytes) -> Any:
    """The JSON value of a request's body. Raises Invalid for anything that is not JSON in UTF-8."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError:
        raise Invalid("", "is not UTF-8 text") from None
    except RecursionError:
        raise Invalid("", "is nested too deeply") from None
    except ValueError as e:
        raise Invalid("", f"is not JSON: {str(e)[:200]}") from None


def check(value: Any, schema: dict[str, Any], path: str = "") -> None:
    """Raise Invalid unless the value is what the schema says."""
    if "anyOf" in schema:
        _any_of(value, schema["anyOf"], path)
        return
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        raise Invalid(path, f"is not {_words(kinds)}")
    if "enum" in schema and value not in schema["enum"]:
        raise Invalid(path, f"is not one of {', '.join(map(json.dumps, schema['enum']))}")
    if isinstance(value, str):
        _length(value, schema, path, "Length", "characters")
        _text(value, path)
    elif isinstance(value, list):
        _length(value, schema, path, "Items", "entries")
        if "items" in schema:
            for i, item in enumerate(value):
                check(item, schema["items"], f"{path}[{i}]")
    elif isinstance(value, dict):
        _object(value, schema, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        _number(value, schema, path)


def _any_of(value: Any, schemas: list[dict[str, Any]], path: str) -> None:
    """The error of the only schema of the value's type, else of none."""
    errors = []
    for schema in schemas:
        try:
            check(value, schema, path)
            return
        except Invalid as e:
            kinds = schema.get("type", [])
            if any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
                errors.append(e)
    if len(errors) == 1:
        raise errors[0]
    raise Invalid(path, "is not of a form that is allowed here")


def _object(value: dict[str, Any], schema: dict[str, Any], path: str) -> None:
    known = schema.get("properties", {})
    for name in schema.get("required", []):
        if name not in value:
            raise Invalid(f"{path}.{name}" if path else name, "is missing")
    for name, item in value.items():
        _text(name, path)
        where = f"{path}.{name[:40]}" if path else name[:40]
        if name in known:
            check(item, known[name], where)
        elif schema.get("additionalProperties") is False:
            raise Invalid(where, "is not a field that is known here")
        elif isinstance(schema.get("additionalProperties"), dict):
            check(item, schema["additionalProperties"], where)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()  # as JSON Schema has it
    return isinstance(value, _TYPES[kind])


def _number(value: float, schema: dict[str, Any], path: str) -> None:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if not low <= value <= high or (isinstance(value, float) and not math.isfinite(value)):
        raise Invalid(path, f"is not in the range {low} to {high}")


def _length(value: str | list[Any], schema: dict[str, Any], path: str, what: str, unit: str) -> None:
    low, high = schema.get(f"min{what}", 0), schema.get(f"max{what}", math.inf)
    if not low <= len(value) <= high:
        raise Invalid(path, f"has {len(value)} {unit}; {low} to {high} are allowed")


def _text(value: str, path: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise Invalid(path, "is not Unicode text") from None


def _words(kinds: list[str]) -> str:
    return " or ".join(f"{'an' if kind[0] in 'aio' else 'a'} {kind}" for kind in kinds if kind != "null")
