"""Where a model's layers are computed: this machine's GPUs, other machines over RPC, and how they share the work.

    placement = Placement.take(kwargs, ACTIVE.directory)       # rpc_servers, device, split_mode, tensor_split, ...
    class LoopedLlama(Placed, llama_cpp.Llama): ...            # loads its model onto self._placement

llama_cpp.Llama has split_mode, tensor_split and main_gpu, but no RPC and no choice of devices. Both go through the
list of devices in llama.cpp's model parameters, so that a server belongs to one model and not to the process. The
rules are checked here, because llama.cpp ignores, misreads or asserts on most of what breaks them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggufloop.backend import rpc
from ggufloop.backend.ggml import Device, Ggml
from ggufloop.errors import UsageError, nearest
from ggufloop.models.gguf import Array, read_header

SPLIT_MODES = ("none", "layer", "row", "tensor")
"""In the order of llama.cpp's enum."""

# Architectures llama.cpp does not refuse to split by tensors and cannot: found by trying, the plain model included.
_ALIBI = ("bloom", "jais", "mpt", "refact")  # each device would count its own heads only
_ENDS = ("arwkv7", "graniteswitch", "nanbeige", "plm", "rwkv6", "rwkv6qwen2", "rwkv7")
_ENDS_RPC = ("qwen35", "qwen35moe", "qwen3next")

MAX_DEVICES = 16
"""llama_max_devices() of every build."""


@dataclass(frozen=True)
class Placement:
    """The devices of one model.

    rpc_servers: host:port of each. device: names the caller chose. devices: what takes layers, in order; None for
    llama.cpp's own choice.
    """

    rpc_servers: tuple[str, ...] = ()
    device: tuple[str, ...] | None = None
    split_mode: str = "layer"
    devices: tuple[Device, ...] | None = None
    handles: Any = field(default=None, repr=False, compare=False)  # of the devices, as C wants them

    @classmethod
    def take(cls, settings: dict[str, Any], directory: Path, model: Path) -> Placement:
        """Take `rpc_servers` and `device` out of the settings of a model, and bring the others to llama_cpp's form.

        rpc_servers: host:port,host:port or a list of them. device: names such as CUDA0 or RPC0, likewise; "none"
        offloads nothing. split_mode: a word or llama.cpp's number. tensor_split: 3,1 or a list. directory: of the
        library. With servers or devices named, all layers are offloaded unless n_gpu_layers says otherwise.
        Connects to the servers. Raises UsageError, GgufloopError, BackendError.
        """
        addresses = parse_servers(settings.pop("rpc_servers", None))
        names = _words(settings.pop("device", None))
        mode = parse_split_mode(settings.get("split_mode", "layer"))
        split = parse_tensor_split(settings.get("tensor_split"))
        main = settings.get("main_gpu", 0)
        settings |= {"split_mode": SPLIT_MODES.index(mode), "tensor_split": split or None}
        given = bool(addresses) or names is not None
        if not given and mode == "layer" and not split and main == 0:
            return cls()

        ggml = Ggml(directory)
        remote = rpc.connect(ggml, addresses) if addresses else []
        found = [*remote, *_local(ggml.devices())]
        chosen = found if names is None else [] if names == ["none"] else _named(names, found)
        over_rpc = any(d in remote for d in chosen)
        _check(chosen, mode, split, main, over_rpc)
        if mode == "tensor":
            _check_tensor_split(model, settings, over_rpc)
        if not given:
            return cls(split_mode=mode)
        settings.setdefault("n_gpu_layers", -1)
        named = None if names is None else tuple(names)
        handles = (ctypes.c_void_p * (len(chosen) + 1))(*(d.handle for d in chosen))  # ends with a null pointer
        placement = cls(tuple(map(str, addresses)), named, mode, tuple(chosen), handles)
        used = chosen if mode != "none" else [chosen[main]] if main >= 0 and chosen else []
        rpc.hold(placement, [a for a in addresses if str(a) in {d.description for d in used}])
        return placement

    def hint(self, reason: str) -> str:
        """What to try if llama.cpp does not load the model and gives this reason."""
        if self.split_mode == "tensor":
            return "llama.cpp cannot split the tensors of every architecture: try split mode layer, or -v for its log."
        if "alloc" in reason or "memory" in reason:
            return "a smaller context (-c) or a smaller quantisation needs less memory; -v shows llama.cpp's own log."
        if any(word in reason for word in ("unknown", "unsupported")):
            return "it may need a newer llama.cpp than `ggufloop version` names; -v shows llama.cpp's own log."
        return "convert it again, or get it from another source; -v shows llama.cpp's own log."

    def release(self) -> None:
        """The model is gone, and with it its connections."""
        rpc.release(self)

    def state(self) -> dict[str, Any]:
        """The keywords that make this placement again."""
        return {"rpc_servers": self.rpc_servers or None, "device": self.device}


class Placed:
    """For llama_cpp.Llama to inherit from: its model is loaded onto the devices of `_placement`."""

    _placement: Placement

    @property
    def devices(self) -> tuple[Device, ...]:
        """What takes layers, if servers or devices were named; empty otherwise."""
        return self._placement.devices or ()

    @property
    def model_params(self) -> Any:
        """llama.cpp's parameters of the model."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        """llama_cpp calls this just before it loads the model, which is when the devices have to be in there."""
        if self._placement.handles is not None:
            params.devices = ctypes.cast(self._placement.handles, ctypes.c_void_p)
        self._prepare(params)
        self._model_params = params

    def _prepare(self, params: Any) -> None:
        """What else the parameters of a model want, before it is loaded."""


def parse_servers(value: str | Sequence[str] | None) -> list[rpc.Address]:
    """Addresses from `host:port,host:port` or a list of such. Raises UsageError."""
    addresses = [rpc.Address.parse(text) for text in _words(value) or []]
    twice = next((a for i, a in enumerate(addresses) if a in addresses[:i]), None)
    if twice:
        raise UsageError(f"the RPC server {twice} is given twice.", "give each server once.")
    return addresses


def parse_split_mode(value: str | int) -> str:
    """A split mode by its name or llama.cpp's number. Raises UsageError."""
    if isinstance(value, int) and 0 <= value < len(SPLIT_MODES):
        return SPLIT_MODES[value]
    if value not in SPLIT_MODES:
        raise UsageError(f"split mode {value!r} is unknown.", nearest(str(value), SPLIT_MODES))
    return str(value)


def parse_tensor_split(value: str | Sequence[float] | None) -> list[float]:
    """Shares from `3,1` or a list; empty for none, trailing zeros dropped. Raises UsageError."""
    shares = []
    for part in value.replace("/", ",").split(",") if isinstance(value, str) else value or []:
        try:
            share = float(part)
        except (TypeError, ValueError):
            share = math.nan
        if not (math.isfinite(share) and share >= 0):
            raise UsageError(
                f"{part!r} is no share of a tensor split.", "give a number of 0 or more for each device, such as 3,1."
            )
        shares.append(share)
    while shares and shares[-1] == 0:
        shares.pop()
    return shares


def served(devices: Sequence[Device], names: str | Sequence[str] | None) -> list[Device]:
    """What a server offers of this machine: the devices named, else its GPUs, else the CPU. Raises UsageError."""
    wanted = _words(names)
    if wanted is not None:
        return _named(wanted, devices)
    return [d for d in devices if d.takes_layers] or [d for d in devices if d.kind == "CPU"]


def _words(value: str | Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else list(value)


def _local(devices: Sequence[Device]) -> list[Device]:
    """What llama.cpp would offload to by itself: GPUs, or integrated ones where there is no other."""
    gpus = [d for d in devices if d.kind == "GPU"]
    return gpus or [d for d in devices if d.kind == "IGPU"]


def _named(names: Sequence[str], found: Sequence[Device]) -> list[Device]:
    known = {d.name: d for d in found}
    for i, name in enumerate(names):
        if name not in known:
            raise UsageError(f"device {name!r} is unknown.", nearest(name, known) if known else "there is none.")
        if name in names[:i]:
            raise UsageError(f"device {name} is given twice.", "give each device once.")
    return [known[name] for name in names]


def _check(devices: Sequence[Device], mode: str, split: Sequence[float], main: int, over_rpc: bool) -> None:
    """Raise UsageError for what these devices cannot do."""
    has = ", ".join(d.name for d in devices) or "only the CPU"
    more = "leave it out, or name other machines with --rpc (rpc_servers)."
    if len(devices) > MAX_DEVICES:
        raise UsageError(f"{len(devices)} devices are more than {MAX_DEVICES}.", "choose some with -dev (device).")
    if mode in ("row", "tensor") and not devices:
        raise UsageError(f"split mode {mode} needs a GPU or another machine, and there is only the CPU.", more)
    if mode == "row" and over_rpc:
        raise UsageError("split mode row does not work over RPC.", "use layer or tensor.")
    if mode == "none" and split:
        raise UsageError("split mode none uses one device: nothing to share.", "leave out -ts (tensor_split).")
    if len(split) > len(devices):
        raise UsageError(
            f"tensor split {','.join(f'{x:g}' for x in split)} has {len(split)} shares for "
            f"{len(devices)} device{'' if len(devices) == 1 else 's'}: {has}.",
            "give one share for each device." if devices else more,
        )
    if not -1 <= main < max(1, len(devices)):
        raise UsageError(f"main GPU {main} does not exist: {has}.", "the first device is 0.")
    if main == -1 and mode != "none":
        raise UsageError(f"main GPU -1, the CPU, needs split mode none, not {mode}.", "give -sm none (split_mode).")


def _check_tensor_split(model: Path, settings: dict[str, Any], over_rpc: bool) -> None:
    """Raise UsageError where llama.cpp would end the process, or compute something else without a word."""
    if not settings.get("flash_attn", False):
        raise UsageError("split mode tensor needs flash attention.", "switch it on: -fa on (flash_attn=True).")
    header = read_header(model)
    arch = header.text("general.architecture") or "unknown"
    heads = header.metadata.get(f"{arch}.attention.head_count_kv")
    bias = header.metadata.get(f"{arch}.attention.max_alibi_bias", 0)
    if heads == 1 or (isinstance(heads, Array) and 1 in (heads.values or ())):
        why = "it has a single K/V head"
    elif arch in _ALIBI or bias != 0 or (arch == "baichuan" and header.number("baichuan.block_count") == 40):
        why = "the bias of its attention depends on how many heads there are"
    elif arch in _ENDS or (over_rpc and arch in _ENDS_RPC):
        why = "llama.cpp would end the process"
    else:
        return
    raise UsageError(f"the tensors of this {arch} model cannot be split: {why}.", "use split mode layer.")
