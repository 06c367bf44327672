"""The TOML file that describes a study: every option of `ggufloop compare` under its own name, lists as lists.

    models = ["smollm2-135m"]
    types = ["Q8_0", "Q4_0"]
    window = "12:16"
    K = [1, 2, 3]
    ctx-size = 256

An option on the command line counts instead of the one in the file. Paths are seen from the current folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ggufloop import reading
from ggufloop.errors import GgufloopError, UsageError, nearest

_OWN = ("study", "form", "help")


def names(command: click.Command) -> dict[str, click.Parameter]:
    """The parameters of a command by what the file calls them: the long flag without its dashes."""
    found = {}
    for parameter in command.params:
        if parameter.name in _OWN or not parameter.expose_value:  # -v is no setting of a study
            continue
        flags = [flag for flag in parameter.opts if flag.startswith("--")]
        found[flags[0][2:] if flags else str(parameter.name)] = parameter
    return found


def load(ctx: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """An eager callback: what the file says become the defaults of the command's options.

    Raises GgufloopError for a file that cannot be read, UsageError for a name no option has or a value it cannot have.
    """
    if path is None:
        return None
    try:
        data = reading.toml(reading.content(Path(path).expanduser(), "name a TOML file."))
    except FileNotFoundError as e:
        raise GgufloopError(f"cannot read {path}: {e.strerror}.", "name a TOML file.") from e
    except ValueError as e:
        raise GgufloopError(f"{path} is not TOML: {e}.", "write lines like: types = ['Q8_0', 'Q4_0'].") from e
    known = names(ctx.command)
    defaults: dict[str, Any] = {}
    for key, value in data.items():
        name = key.replace("_", "-")
        if name not in known:
            raise UsageError(f"{path}: {reading.shown(key)} is no option of compare.", nearest(name, known))
        defaults[str(known[name].name)] = _value(path, key, value, known[name])
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _value(path: str, key: str, value: Any, parameter: click.Parameter) -> Any:
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, (str, int, float)) for item in items):
        raise UsageError(f"{path}: {key} is not a word, a number, or a list of them.", "see ggufloop compare --help.")
    if isinstance(parameter, click.Option) and parameter.is_flag:
        if not isinstance(value, bool):
            raise UsageError(f"{path}: {key} is true or false, not {reading.shown(value)}.", f"write: {key} = true")
        return value
    if parameter.nargs == -1 or parameter.multiple:
        return tuple(str(item) for item in items)
    if isinstance(value, list):
        return ",".join(str(item) for item in items)
    return str(value)  # as on the command line: what checks it expects a word


def dump(command: click.Command, values: Mapping[str, Any]) -> str:
    """The file that would give these values; what is at its default is left out."""
    lines = [
        "# ggufloop compare --study FILE repeats this study, and goes on with it where types, K or chunks are added"
    ]
    for name, parameter in names(command).items():
        value = values[str(parameter.name)]
        if value is None or value == parameter.default:
            continue
        if isinstance(value, str) and ",..." in str(parameter.metavar):
            value = [int(word) if word.isdecimal() else word for word in value.split(",")]
        lines.append(f"{name} = {json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
