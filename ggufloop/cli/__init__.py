"""The command line: `ggufloop COMMAND`, one file per command, named like the command; group.py finds and runs them.

Nothing but names belongs here: once `ggufloop list` was imported, `list` in this file is the module, not the builtin.
"""

from __future__ import annotations

from ggufloop.cli.group import cli, main

__all__ = ["cli", "main"]
