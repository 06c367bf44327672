"""Help in sections: options by what they are about, commands by what they are for; a wrong command gets the nearest.

    @click.command(name="run", cls=Command)
    @click.group(name="shannon", cls=Group)

An option says its `section`, as those of a loop do, or it follows from its parameter's name.
"""

from __future__ import annotations

import click

from ggufloop.errors import nearest

OWN = "Options"
"""Of the command alone; they come first."""
ORDER = (OWN, "Model", "Loop", "Sampling", "Diffusion models", "Context", "Devices", "Parts", "Output")


_NAMES = {
    "Model": ("model", "model_path", "hf", "offline", "hf_file"),
    "Loop": ("window", "start", "width"),
    "Sampling": ("n", "temp", "top_k", "top_p", "min_p", "repeat_penalty"),
    "Diffusion models": ("diffusion_steps", "diffusion_block_length", "diffusion_visual"),
    "Context": ("n_ctx", "n_batch", "n_ubatch", "n_threads", "flash_attn", "type_k", "type_v", "repack", "no_try"),
    "Devices": ("n_gpu_layers", "rpc_servers", "split_mode", "tensor_split", "main_gpu", "device"),
    "Parts": ("shard", "workers", "only_plan", "tokens_per_second"),
    "Output": ("form", "out", "plot", "target", "log", "journal", "save", "verbose", "help"),
}
_SECTIONS = {name: section for section, names in _NAMES.items() for name in names}
"""The section of every parameter that several commands have."""


class Command(click.Command):
    """A command whose help is in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section after the other, the command's own first."""
        params = self.get_params(ctx)
        samples = any(param.name == "temp" for param in params)
        found: dict[str, list[tuple[str, str]]] = {name: [] for name in ORDER}
        for param in params:
            record = param.get_help_record(ctx)
            if record is not None and record[1]:
                seed = param.name == "seed" and samples  # elsewhere it is of something else
                section = "Sampling" if seed else _SECTIONS.get(str(param.name), OWN)
                found[getattr(param, "section", section)].append(record)
        for name, rows in found.items():
            if rows:
                with formatter.section(name):
                    formatter.write_dl(rows, col_max=34)


class Group(click.Group):
    """Commands, of which a wrong one is answered with the nearest."""

    command_class = Command
    aliases: dict[str, str] = {}  # noqa: RUF012  # click's own attributes are like this

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """click's, but for the message."""
        known = self.list_commands(ctx)
        if args and args[0] not in (*known, *self.aliases) and not args[0].startswith("-"):
            raise click.UsageError(f"No such command {args[0]!r}; {nearest(args[0], known)}", ctx)
        return super().resolve_command(ctx, args)
