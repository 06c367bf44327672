"""`ggufloop doctor`: the installation as a table of facts, then each problem with its remedy."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from ggufloop.backend.doctor import Report, diagnose
from ggufloop.cli.commands.version import version_rows
from ggufloop.cli.help import Command
from ggufloop.cli.types import output_option
from ggufloop.cli.width import tell
from ggufloop.errors import BackendError


def _rows(report: Report) -> list[tuple[str, str]]:
    rows = version_rows(report.versions)
    if report.directory:
        rows.append(("folder", str(report.directory)))
    if report.abi is not None:
        rows.append(("loop interface", str(report.abi)))
    for device in report.devices:
        memory = f", {device.memory / 2**30:.1f} GiB" if device.memory else ""
        rows.append((f"device {device.name}", device.description + memory))
    if report.computes and not report.computes.failures:
        rows.append(("computes", str(report.computes)))
    if report.variant:
        rows.append(("compiled for", f"{report.variant} and newer (it came with the installation)"))
    if report.gave_up:
        rows.append(("built without", report.gave_up))
    rows.append(("stock library", str(report.stock) if report.stock else "none (optional: ggufloop build --stock)"))
    sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in report.cache_bytes.items())
    rows.append(("cache", f"{report.cache} ({sizes or 'empty'}; {report.cache_libraries} libraries)"))
    return rows


def _json(report: Report) -> dict[str, Any]:
    data = asdict(report)
    return {"schema_version": 1, **data.pop("versions"), **data}


@click.command("doctor", cls=Command)
@output_option("json")
@click.pass_context
def command(ctx: click.Context, form: str) -> None:
    """Check the installation and say what is wrong.

    The library computes small models of every weight type on every device, which takes some seconds.
    Leaves with 0 if a looped model can run, with 3 if not.
    """
    report = diagnose()
    if form == "json":
        click.echo(json.dumps(_json(report), indent=1, default=str))
    else:
        rows = _rows(report)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            tell(f"{name:<{width}}  {value}\n")
        for problem in report.problems:
            click.echo(f"problem: {problem.message}\n  {problem.remedy}")
        if not report.problems:
            click.echo("everything is fine")
    ctx.exit(BackendError.exit_code if report.problems else 0)
