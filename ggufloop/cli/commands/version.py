"""`ggufloop version`: one line per component, without loading or building anything."""

from __future__ import annotations

from dataclasses import asdict

import click

from ggufloop.backend.doctor import Versions, versions
from ggufloop.backend.library import BINDING
from ggufloop.cli.help import Command
from ggufloop.cli.types import output_option, show


def version_rows(known: Versions) -> list[tuple[str, str]]:
    """Name and value of each component, as `version` and `doctor` show them."""
    patch = f" (patch {known.patch_id})" if known.patch_id else ""
    return [
        ("ggufloop", known.ggufloop),
        ("python", known.python),
        (BINDING, known.binding or "none"),
        ("llama.cpp", known.llama_cpp),
        ("library", f"{known.library}{patch}" if known.library else "none (run: ggufloop build)"),
    ]


@click.command("version", cls=Command)
@output_option("json")
def command(form: str) -> None:
    """Print the version of each component."""
    known = versions()
    lines = [f"{name} {value}\n" for name, value in version_rows(known)]
    show(form, lambda: "".join(lines), lambda: {"schema_version": 1, **asdict(known)})
