"""`ggufloop version`: one line per component, without loading or building anything."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from ggufloop.backend.doctor import Versions, versions
from ggufloop.backend.library import BINDING
from ggufloop.errors import UsageError, nearest

FORMS = ("text", "json")


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


def check_form(form: str) -> None:
    """Raise UsageError unless `form` is one of FORMS."""
    if form not in FORMS:
        raise UsageError(f"output form {form!r} is not known.", nearest(form, FORMS))


@click.command("version")
@click.option("-o", "--output", "form", default="text", show_default=True, metavar="text|json", help="How to print it.")
def command(form: str) -> None:
    """Print the version of each component."""
    check_form(form)
    known = versions()
    if form == "json":
        click.echo(json.dumps({"schema_version": 1, **asdict(known)}, indent=1))
        return
    for name, value in version_rows(known):
        click.echo(f"{name} {value}")
