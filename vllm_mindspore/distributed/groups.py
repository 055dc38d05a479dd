"""Groups of ranks (csrc/collectives.h): how a process uses them and leaves them; joining.py joins them.

A graph names its groups: "tp" is the tensor-parallel group of the process that runs it, "dp", "ep" and "pp" likewise.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
from typing import Any

import torch

from vllm_mindspore.ops import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLUSH_SECONDS = 2.0


class GroupError(RuntimeError):
    """A rank of a group died, stalled, failed, or does not belong to it."""


def step_timeout() -> float:
    """Seconds that a rank may keep the others waiting in a step: `VLLM_MS_COLLECTIVE_TIMEOUT`, else 60.

    Raises:
        ValueError: it is not a positive number.
    """
    text = os.environ.get("VLLM_MS_COLLECTIVE_TIMEOUT") or "60"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"VLLM_MS_COLLECTIVE_TIMEOUT: found {text!r}, expected a number of seconds, such as 60.")
    return seconds


def call(function: str, *arguments: Any) -> int:
    """What a function of the library returns, whose last arguments are the text of an error and its length.

    Raises:
        GroupError: the text.
    """
    text = ctypes.create_string_buffer(2000)
    result = getattr(build.load(), function)(*arguments, text, len(text))
    if text.value:
        raise GroupError(text.value.decode(errors="replace"))
    return result


def leave(name: str) -> None:
    build.load().vllm_ms_leave_group(name.encode())


@functools.cache
def flush_at_exit() -> None:
    """What this process has sent leaves it before it ends."""
    atexit.register(lambda: build.load().vllm_ms_flush_groups(ctypes.c_double(FLUSH_SECONDS)))


def use_step_timeout() -> None:
    """From now on ranks run steps, nothing that takes minutes."""
    build.load().vllm_ms_set_group_timeout(ctypes.c_double(step_timeout()))


def fail(reason: str) -> None:
    """Tell all groups of this process that it will not come to their collectives any more."""
    build.load().vllm_ms_fail_groups(reason.encode())


def failure() -> str:
    """Why a group of this process has ended; empty where none has."""
    text = ctypes.create_string_buffer(2000)
    build.load().vllm_ms_group_failure(text, len(text))
    return text.value.decode(errors="replace")


def lost_rank() -> str:
    """Which rank on another host is gone or has left, or what it has reported; empty where all are there."""
    text = ctypes.create_string_buffer(2000)
    build.load().vllm_ms_lost_rank(text, len(text))
    return text.value.decode(errors="replace")


def _tensor(x: torch.Tensor) -> torch.Tensor:
    if x.dtype not in DTYPES:
        raise TypeError(f"collective of {x.dtype}; supported: {', '.join(map(str, DTYPES))}")
    return x.contiguous()


def _sides(x: torch.Tensor, dim: int) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    outer = x.shape[:dim].numel()
    return ctypes.c_int64(outer), ctypes.c_int64(x.numel() // max(outer, 1))


def all_reduce(name: str, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The sum over ranks of x, float32, bfloat16 or float16, added in the order of ranks.

    out: where to put it, of x's shape and type and contiguous; it may be x.
    """
    x = _tensor(x)
    out = torch.empty_like(x) if out is None else out
    source, result = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())
    call("vllm_ms_all_reduce", name.encode(), source, ctypes.c_int64(x.numel()), DTYPES[x.dtype], result)
    return out


def all_gather(name: str, x: torch.Tensor, dim: int, size: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """The ranks' x, one after the other along dim (not negative)."""
    x = _tensor(x)
    out = x.new_empty(*x.shape[:dim], size * x.shape[dim], *x.shape[dim + 1 :]) if out is None else out
    _resizing("vllm_ms_all_gather", name, x, _sides(x, dim), out)
    return out


def reduce_scatter(name: str, x: torch.Tensor, dim: int, size: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Of the sum over ranks of x this rank's part, of `size` equal ones along dim (not negative)."""
    x = _tensor(x)
    out = x.new_empty(*x.shape[:dim], x.shape[dim] // size, *x.shape[dim + 1 :]) if out is None else out
    _resizing("vllm_ms_reduce_scatter", name, x, _sides(out, dim), out)
    return out


def _resizing(function: str, name: str, x: torch.Tensor, sides: tuple, out: torch.Tensor) -> None:
    pointers = (ctypes.c_void_p(x.data_ptr()), *sides, DTYPES[x.dtype], ctypes.c_void_p(out.data_ptr()))
    call(function, name.encode(), *pointers)


def dispatch(
    name: str, x: torch.Tensor, routing: torch.Tensor, token_ranks: torch.Tensor, capacity: int, out: torch.Tensor
) -> torch.Tensor:
    """`moe_dispatch` outside of a graph: x [T, N] float32 → out [A, N], see ops/exchange.py."""
    return _exchanged("vllm_ms_dispatch", name, x, routing, token_ranks, capacity, out)


def combine(
    name: str, y: torch.Tensor, routing: torch.Tensor, token_ranks: torch.Tensor, capacity: int, out: torch.Tensor
) -> torch.Tensor:
    """`moe_combine` outside of a graph: y [A, N] float32 → out [T, N], see ops/exchange.py."""
    return _exchanged("vllm_ms_combine", name, y, routing, token_ranks, capacity, out)


def _exchanged(function: str, name: str, x, routing, token_ranks, capacity: int, out: torch.Tensor) -> torch.Tensor:
    tokens = (ctypes.c_void_p(token_ranks.data_ptr()), ctypes.c_int64(len(token_ranks)), ctypes.c_int64(capacity))
    chosen = (ctypes.c_void_p(routing.data_ptr()), ctypes.c_int64(routing.shape[1] // 2))
    rows = (ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.shape[1]), ctypes.c_void_p(out.data_ptr()))
    call(function, name.encode(), *tokens, *chosen, *rows)
    return out
