"""llama.cpp's RPC, from both ends: addresses, a handshake before llama.cpp tries its own, and serving a machine.

    check_server(Address.parse("192.168.1.7:50052"))       # GgufloopError if no usable server answers there
    serve(ggml, Address("127.0.0.1", 50052), devices, threads=4)        # until the process ends

llama.cpp ends the process when a server is missing, and waits for ever when it is busy, so the handshake is done here
first: one message that has been the first of every version. A server serves one client at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggufloop.backend.ggml import Device, Ggml
from ggufloop.errors import BackendError, GgufloopError, UsageError

PROTOCOL = (7, 0, 0)
"""The protocol of the pinned llama.cpp. The last number counts changes of the list of operations."""

DEFAULT_PORT = 50052
PATIENCE = 5.0
"""Seconds a server may take to accept, and as many to answer."""

_HELLO = struct.pack("<BQ24x", 14, 24)  # command, length, capabilities: none, which means plain TCP
_held: dict[int, tuple[Address, ...]] = {}
_CLOSED = "recv failed (bytes_recv=0,"
"""What the C side logs as an error whenever a client leaves."""


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address `host:port`. Raises UsageError."""
        host, colon, port = text.strip().partition(":")
        if not host or not colon or ":" in port or any(c.isspace() or c in "/@" for c in host):
            raise UsageError(f"{text!r} is no address of an RPC server.", "write host:port, such as 192.168.1.7:50052.")
        if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
            raise UsageError(f"port {port!r} in {text!r} is not a number from 1 to 65535.", "the usual one is 50052.")
        return cls(host, int(port))

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it; the host must be a number."""
        return ipaddress.IPv4Address(self.host).is_loopback

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def check_server(address: Address) -> None:
    """Raise GgufloopError unless a server of our protocol answers there, free to serve us."""
    start = f"start one there: ggufloop rpc-server -p {address.port}"
    try:
        found = _handshake(address)
    except socket.gaierror as e:
        raise GgufloopError(f"the host {address.host!r} is unknown: {e.strerror}.", "give its IPv4 address.") from e
    except _Silent:
        raise GgufloopError(
            f"{address} accepts a connection but does not answer within {PATIENCE:.0f} s.",
            "an RPC server serves one client at a time: end the other one, or start a server on another port.",
        ) from None
    except OSError as e:
        reason = "no answer" if isinstance(e, TimeoutError) else e.strerror or str(e)
        raise GgufloopError(f"there is no RPC server at {address}: {reason}.", start) from e
    if found is None:
        raise GgufloopError(f"what answers at {address} is no RPC server of llama.cpp.", start)
    if found != PROTOCOL:
        theirs, ours = (".".join(map(str, version)) for version in (found, PROTOCOL))
        raise GgufloopError(
            f"the RPC server at {address} speaks protocol {theirs}, this llama.cpp speaks {ours}.",
            f"both ends must be built from the same llama.cpp; {start}, of this version of ggufloop.",
        )


class _Silent(Exception):
    """Connected, and then nothing."""


def _handshake(address: Address) -> tuple[int, int, int] | None:
    """The protocol version of the server at `address`, None if it is no server. Raises OSError, _Silent."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:  # llama.cpp knows no IPv6
        s.settimeout(PATIENCE)
        s.connect((address.host, address.port))
        try:
            s.sendall(_HELLO)
            size = _receive(s, 8)
            if len(size) < 8 or not 3 <= int.from_bytes(size, "little") <= 256:
                return None
            version = _receive(s, 3)
        except TimeoutError:
            raise _Silent from None
        except OSError:  # closed at once
            return None
    return (version[0], version[1], version[2]) if len(version) == 3 else None


def _receive(s: socket.socket, n: int) -> bytes:
    """n bytes, or fewer if the other side closes."""
    data = b""
    while len(data) < n and (more := s.recv(n - len(data))):
        data += more
    return data


def connect(ggml: Ggml, addresses: Sequence[Address]) -> list[Device]:
    """The devices of the servers, known to ggml by name but used by nobody yet. Raises GgufloopError, BackendError.

    ggml keeps a server for the life of the process; asking again gives the same devices.
    """
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(_function(ggml, "add_server"))
    held = {address for addresses_of_one in _held.values() for address in addresses_of_one}
    for address in addresses:  # all of them, before llama.cpp holds a connection to one
        if address not in held:  # models of one process share a connection, and the server answers nobody else
            check_server(address)
    devices = []
    for address in addresses:
        registry = add(str(address).encode())
        found = ggml.devices_of(registry) if registry else []
        if not found:
            raise GgufloopError(f"the RPC server at {address} offers no device.", "look at its output.")
        devices += found
    return devices


def _function(ggml: Ggml, name: str) -> int:
    pointer = ggml.function("RPC", f"ggml_backend_rpc_{name}")
    if pointer is None:
        raise BackendError(f"the llama.cpp library in {ggml.directory} has no RPC.", "run: ggufloop build")
    return pointer


def hold(owner: object, addresses: Sequence[Address]) -> None:
    """Note that a model of this process is connected to the servers, until `release`."""
    _held[id(owner)] = tuple(addresses)


def release(owner: object) -> None:
    """The model of this owner is gone; without effect if it was already."""
    _held.pop(id(owner), None)


def serve(
    ggml: Ggml,
    address: Address,
    devices: Sequence[Device],
    threads: int,
    cache: Path | None = None,
    ready: Callable[[], None] = lambda: None,
    report: Callable[[str, bool], None] = lambda line, is_error: None,
) -> None:
    """Serve `devices` to one client after another, for ever; leave with an exception such as KeyboardInterrupt.

    ready is called once the server answers, report with each line the C side writes and whether it is an error.
    Raises BackendError without RPC, GgufloopError if the address cannot be served or the server ends. The C side
    cannot be stopped: the process has to end after this, by os._exit, without waiting for its thread.
    """
    pointer = _function(ggml, "start_server")
    _check_free(address)
    start = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
    )(pointer)
    handles = (ctypes.c_void_p * len(devices))(*(device.handle for device in devices))
    folder = os.fsencode(cache) if cache else None
    _forward_stdout(lambda line: report(line, False))
    ggml.on_log(lambda line, is_error: report(line, is_error and not line.startswith(_CLOSED)))
    arguments = (str(address).encode(), folder, threads, len(devices), handles)
    thread = threading.Thread(target=start, args=arguments, daemon=True)
    thread.start()
    local = Address("127.0.0.1", address.port) if address.host == "0.0.0.0" else address
    while thread.is_alive():
        with contextlib.suppress(OSError, _Silent):
            if _handshake(local):
                ready()
                break
        time.sleep(0.05)
    while thread.is_alive():
        thread.join(1)  # Windows notices Ctrl-C only between waits
    raise GgufloopError(f"the RPC server at {address} ended by itself.", "its last lines say why; start it again.")


def _check_free(address: Address) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        if sys.platform != "win32":  # where it would let two servers share a port
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((address.host, address.port))
        except OSError as e:
            remedy = {
                errno.EADDRINUSE: "another program listens there; give another port with -p.",
                errno.EADDRNOTAVAIL: "give the address of one of this machine's interfaces, or 0.0.0.0 for all.",
                errno.EACCES: "give a port above 1023 with -p.",
            }.get(e.errno or 0, "give another address or port.")
            raise GgufloopError(f"cannot listen at {address}: {e.strerror or e}.", remedy) from e


def _forward_stdout(report: Callable[[str], None]) -> None:
    """Hand what C prints to `report`, line by line: standard output is not for words."""
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(write)

    def lines() -> None:
        with os.fdopen(read, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                report(line.rstrip())

    threading.Thread(target=lines, daemon=True).start()
