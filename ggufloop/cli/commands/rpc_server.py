"""`ggufloop rpc-server`: lend this machine's devices to `--rpc` of another; words on stderr, until Ctrl-C."""

from __future__ import annotations

import ipaddress
import os
import sys
import threading

import click

from ggufloop.backend import library, rpc
from ggufloop.backend.devices import served
from ggufloop.backend.ggml import Device, Ggml
from ggufloop.backend.settings import cores
from ggufloop.cli.help import Command
from ggufloop.errors import UsageError
from ggufloop.files import cache_dir, writing

_OPEN = (
    "WARNING: RPC has no password and no encryption. Whoever reaches {address} can use this machine's memory,\n"
    "  and llama.cpp calls its own server insecure. Let only machines you trust reach it."
)


def _address(host: str, port: int, trusted: bool) -> rpc.Address:
    """Where to listen. Raises UsageError for a host that is no IPv4 address, and for an open one unless trusted."""
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        raise UsageError(
            f"{host!r} is no IPv4 address.", "127.0.0.1 serves this machine, 0.0.0.0 all others."
        ) from None
    address = rpc.Address(host, port)
    if not address.is_local and not trusted:
        raise UsageError(
            f"{address} can be reached from other machines, and RPC asks nobody for a password.",
            "add --trusted-network if only machines you trust can reach it.",
        )
    return address


class _Words:
    """The lines of llama.cpp's server in our words.

    llama.cpp connects for every question it has before it loads a model, so only a client that stays is told of.
    """

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._stays: threading.Timer | None = None
        self._told = False

    def __call__(self, line: str, is_error: bool) -> None:
        if self._verbose or is_error:
            click.echo(line, err=True)
        elif line.startswith("Accepted client connection"):
            self._stays = threading.Timer(0.5, self._connected)
            self._stays.start()
        elif line.startswith("Client connection closed") and self._stays:
            self._stays.cancel()
            if self._told:
                click.echo("client gone", err=True)
            self._told = False

    def _connected(self) -> None:
        click.echo("client connected", err=True)
        self._told = True


def _ready(address: rpc.Address, devices: list[Device], threads: int) -> None:
    names = ", ".join(f"{d.name} ({d.description})" for d in devices)
    version = ".".join(map(str, rpc.PROTOCOL))
    click.echo(f"serving {names} at {address}: RPC {version}, threads {threads}. Ctrl-C ends it.", err=True)


@click.command("rpc-server", cls=Command)
@click.option("-H", "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
              help="IPv4 address to listen at; 0.0.0.0: all of this machine's.")  # fmt: skip
@click.option("-p", "--port", type=click.IntRange(1, 65535), default=rpc.DEFAULT_PORT, show_default=True, metavar="N",
              help="Port to listen at.")  # fmt: skip
@click.option("-t", "--threads", type=click.IntRange(min=1), metavar="N", help="Threads (default: all cores).")
@click.option("-d", "--device", "names", metavar="NAME,...",
              help="Devices to serve, such as CUDA0 (default: the GPUs, else the CPU).")  # fmt: skip
@click.option("-c", "--cache", "keep", is_flag=True, help="Keep large weights on disk, so that they are sent once.")
@click.option("--trusted-network", "trusted", is_flag=True,
              help="Listen where other machines reach it. RPC has no password: see docs/devices.md.")  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context, host: str, port: int, threads: int | None, names: str | None, keep: bool, trusted: bool
) -> None:
    """Lend this machine's devices to another that runs a model.

    \b
    here:   ggufloop rpc-server -H 192.168.1.7 --trusted-network
    there:  ggufloop run MODEL --rpc 192.168.1.7:50052 --window 12:16 -p "Why is the sky blue?"
    """
    address = _address(host, port, trusted)
    library.spin_briefly()
    ggml = Ggml(library.usable().directory)
    devices = served(ggml.devices(), names)
    cache = cache_dir() / "rpc" if keep else None
    if cache:
        with writing(cache):
            cache.mkdir(parents=True, exist_ok=True)
    if not address.is_local:
        click.secho(_OPEN.format(address=address), err=True, fg="yellow")
    count = threads or cores()
    try:
        rpc.serve(
            ggml, address, devices, count, cache,
            ready=lambda: _ready(address, devices, count), report=_Words(ctx.obj["verbose"]),
        )  # fmt: skip
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        sys.stderr.flush()
        os._exit(130)  # its thread is in C and cannot be ended
