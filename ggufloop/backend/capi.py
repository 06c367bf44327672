"""The patch's C interface (patches/llama-loop.h) for ctypes, on a library that llama_cpp has loaded.

    lib = capi.declare(llama_cpp.llama_cpp._lib)
    code = lib.llama_loop_set(ctx, capi.params(spec))      # below 0: refused, and llama_loop_error() says why

A LoopSpec becomes a `llama_loop_params` here and nowhere else: the rows of its table that say so are its fields, in
their order, and words become the numbers of the C enums.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np

from ggufloop.errors import BackendError, GgufloopError
from ggufloop.loop import LoopSpec
from ggufloop.setting import settings

ABI = 5

OUT_OF_MEMORY, LOST = -6, -7
"""The refusals after which the context may be empty, and after the second it has no plan either."""


def plan_fields(loop: type[LoopSpec]) -> list[tuple[str, Any]]:
    """The fields of `struct llama_loop_params` that are settings."""
    rows = settings(loop).values()
    return [(row.name, c_double if row.kind is float else c_int32) for row in rows if row.in_plan]


class Params(ctypes.Structure):
    """`struct llama_loop_params`. `arrays` keeps alive what it points to."""

    arrays: tuple[Any, ...] = ()

    _fields_ = [
        ("first", c_int32),
        ("last", c_int32),
        ("n_eval", c_int32),
        ("A", POINTER(c_double)),
        ("B", POINTER(c_double)),
        *plan_fields(LoopSpec),
    ]


def params(loop: LoopSpec) -> Params:
    """What the graph is told of a loop."""
    tableau = loop.tableau()
    arrays = tuple(np.ascontiguousarray(m, dtype=np.float64) for m in (tableau.A, tableau.B))
    a, b = (m.ctypes.data_as(POINTER(c_double)) for m in arrays)
    rows = settings(LoopSpec).values()
    told = [row.in_struct(getattr(loop, row.name)) for row in rows if row.in_plan]
    plan = Params(*loop.window, tableau.evaluations, a, b, *told)
    plan.arrays = arrays
    return plan


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_loop_error": (c_char_p, []),
    "llama_loop_set": (c_int32, [c_void_p, POINTER(Params)]),
    "llama_loop_enable": (c_int32, [c_void_p, c_bool]),
    "llama_loop_is_recurrent": (c_bool, [c_void_p, c_int32]),
    "llama_loop_memory_size": (c_size_t, [c_void_p]),
    "llama_loop_skipped": (c_int64, [c_void_p]),
    "llama_loop_trace": (None, [c_void_p, c_bool]),
    "llama_loop_trace_count": (c_int32, [c_void_p]),
    "llama_loop_trace_get": (
        POINTER(c_float),
        [c_void_p, c_int32, POINTER(c_int32), POINTER(c_int32), POINTER(c_int64)],
    ),
    "llama_loop_lens": (None, [c_void_p, POINTER(c_float), c_size_t]),
    "llama_loop_resume": (c_int32, [c_void_p, POINTER(c_float), POINTER(c_float), c_size_t]),
}


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the functions of llama-loop.h on `lib`. Raises BackendError if it has none, or another version's."""
    if not hasattr(lib, "llama_loop_abi"):
        raise BackendError("the llama.cpp library in use has no loops.", "run: ggufloop build")
    lib.llama_loop_abi.restype = c_int32
    if lib.llama_loop_abi() != ABI:
        raise BackendError(
            f"the llama.cpp library in use has loop interface {lib.llama_loop_abi()}, this version needs {ABI}.",
            "run: ggufloop build",
        )
    for name, (restype, argtypes) in _FUNCTIONS.items():
        function = getattr(lib, name, None)
        if function is None:
            raise BackendError(f"the llama.cpp library in use has no {name}.", "run: ggufloop build")
        function.restype, function.argtypes = restype, argtypes
    return lib


def install(lib: ctypes.CDLL, ctx: Any, loop: LoopSpec | None) -> None:
    """Give a context the plan of `loop`, None for the plain model.

    Raises Refused; then the context is as it was, but for what `lost` and `plain` say.
    """
    checked(lib, lib.llama_loop_set(ctx, params(loop) if loop is not None and loop.is_loop else None))


def checked(lib: ctypes.CDLL, code: int) -> None:
    """Raise Refused for the status of a function that failed."""
    if code != 0:
        message, _, hint = lib.llama_loop_error().decode().partition("\n")
        raise Refused(message, hint, lost=code in (OUT_OF_MEMORY, LOST), plain=code == LOST)


class Refused(GgufloopError):
    """A plan, or a use of it, that is not taken. lost: the context may be empty now; plain: it has no plan any more."""

    def __init__(self, message: str, hint: str, lost: bool, plain: bool = False) -> None:
        super().__init__(message, hint)
        self.lost, self.plain = lost, plain
