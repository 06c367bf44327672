"""ggml's registry of devices, which the binding does not offer: names, kinds and memory, by ctypes.

    ggml = Ggml(backend.locate().directory)
    [device.name for device in ggml.devices()]       # ["CUDA0", "CPU"]

A library is loaded once per process however often it is asked for, so this sees what llama_cpp sees. Functions of a
backend that may not be there (RPC) are asked for by name, as llama.cpp's own programs do.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufloop.errors import BackendError

_KINDS = ("CPU", "GPU", "IGPU", "ACCEL", "META")
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_ERROR = 4
_FILES = {"win32": ("{}.dll", "lib{}.dll"), "darwin": ("lib{}.dylib",)}


@dataclass(frozen=True)
class Device:
    """A device ggml can compute on. kind: CPU, GPU, IGPU or ACCEL; every RPC device is a GPU to ggml."""

    handle: int
    name: str  # CUDA0, RPC0, CPU
    description: str  # the GPU's name; of an RPC device host:port
    kind: str

    @property
    def takes_layers(self) -> bool:
        """Whether layers can be offloaded to it; CPU and accelerators compute what stays here."""
        return self.kind in ("GPU", "IGPU")


class Ggml:
    """The registry of the library in `directory`. Raises BackendError if it cannot be loaded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        base, ggml = _load(directory, "ggml-base"), _load(directory, "ggml")
        pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
        try:
            self._reg_count = _declare(ggml.ggml_backend_reg_count, size)
            self._load_all = _declare(ggml.ggml_backend_load_all, None)
            self._reg_by_name = _declare(ggml.ggml_backend_reg_by_name, pointer, text)
            self._dev_count = _declare(ggml.ggml_backend_dev_count, size)
            self._dev_get = _declare(ggml.ggml_backend_dev_get, pointer, size)
            self._reg_dev_count = _declare(base.ggml_backend_reg_dev_count, size, pointer)
            self._reg_dev_get = _declare(base.ggml_backend_reg_dev_get, pointer, pointer, size)
            self._proc = _declare(base.ggml_backend_reg_get_proc_address, pointer, pointer, text)
            self._name = _declare(base.ggml_backend_dev_name, text, pointer)
            self._description = _declare(base.ggml_backend_dev_description, text, pointer)
            self._type = _declare(base.ggml_backend_dev_type, ctypes.c_int, pointer)
            self._log_set = _declare(base.ggml_log_set, None, _LOG, pointer)
        except AttributeError as e:
            raise BackendError(f"the ggml library in {directory} lacks a function: {e}.", "run: ggufloop build") from e
        if not self._reg_count():  # a llama.cpp whose backends are files of their own
            self._load_all()

    def devices(self) -> list[Device]:
        """Every device of this machine, in ggml's order."""
        return [self._device(self._dev_get(i)) for i in range(self._dev_count())]

    def devices_of(self, registry: int) -> list[Device]:
        """The devices of one registry, such as an RPC server's."""
        return [self._device(self._reg_dev_get(registry, i)) for i in range(self._reg_dev_count(registry))]

    def function(self, backend: str, name: str) -> int | None:
        """Address of a backend's own function, None if the library has no such backend or function."""
        registry = self._reg_by_name(backend.encode())
        address: int | None = self._proc(registry, name.encode()) if registry else None
        return address

    def on_log(self, write: Callable[[str, bool], None]) -> None:
        """Call write(line, is_error) with what ggml logs, from whichever thread logs it."""

        def line(level: int, text: bytes, _user: int | None) -> None:
            write(text.decode(errors="replace").rstrip(), level == _ERROR)

        self._log = _LOG(line)  # C keeps no reference
        self._log_set(self._log, None)

    def _device(self, handle: int) -> Device:
        name, description = (f(handle).decode(errors="replace") for f in (self._name, self._description))
        return Device(handle, name, description.strip(), _KINDS[self._type(handle)])


def _declare(function: Any, result: Any, *arguments: Any) -> Any:
    function.restype, function.argtypes = result, list(arguments)
    return function


def _load(directory: Path, name: str) -> ctypes.CDLL:
    for pattern in _FILES.get(sys.platform, ("lib{}.so",)):
        path = directory / pattern.format(name)
        if path.is_file():
            try:
                return ctypes.CDLL(str(path))
            except OSError as e:
                raise BackendError(f"the library {path} does not load: {e}.", "run: ggufloop doctor") from e
    raise BackendError(f"there is no {name} library in {directory}.", "run: ggufloop build")
