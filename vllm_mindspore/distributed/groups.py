"""Groups of ranks that share memory (csrc/collectives.h): how a process joins them, uses them and leaves them.

A graph names its groups: "tp" is the tensor-parallel group of the process that runs it, "dp", "ep" and "pp" likewise.
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from vllm.logger import init_logger

from vllm_mindspore.compiler import cache
from vllm_mindspore.ops import build
from vllm_mindspore.version import __version__

logger = init_logger("vllm.vllm_mindspore.distributed")

SLOT_BYTES = 32 << 20  # most that a rank writes before the others read it; what is not used takes no memory
STARTING_TIMEOUT = 1800.0  # seconds that a rank may take to compile what another had in its cache
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SPIN_NANOSECONDS = 1_000_000


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


@functools.cache
def _identity() -> dict[str, str]:
    """What the ranks of a group must have in common."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": boot.read_text().strip() if boot.is_file() else socket.gethostname(),
        "vllm_mindspore": __version__,
        "sources": cache.source_hash(),
    }


def _call(function: str, *arguments: Any) -> int:
    text = ctypes.create_string_buffer(2000)
    result = getattr(build.load(), function)(*arguments, text, len(text))
    if text.value:
        raise GroupError(text.value.decode(errors="replace"))
    return result


def join(name: str, cpu_group: dist.ProcessGroup, spin: bool) -> None:
    """Join this process's group `name`, whose ranks are those of `cpu_group`. Every rank must call it.

    spin: whether each rank has a CPU of its own, on which it may wait busily.

    Raises:
        GroupError: the ranks run different versions or on several hosts, or the memory cannot be shared.
    """
    rank, size = dist.get_rank(cpu_group), dist.get_world_size(cpu_group)
    _agree(name, cpu_group, rank, size)
    options = (ctypes.c_double(STARTING_TIMEOUT), ctypes.c_int64(_SPIN_NANOSECONDS if spin else 0))

    def joined(memory: str) -> int:
        arguments = (name.encode(), rank, size, memory.encode(), ctypes.c_int64(SLOT_BYTES))
        return _call("vllm_ms_join_group", *arguments, *options)

    first = dist.get_global_rank(cpu_group, 0)
    path = [_or_error(lambda: f"/proc/{os.getpid()}/fd/{joined('')}") if rank == 0 else None]
    dist.broadcast_object_list(path, src=first, group=cpu_group)
    mine = path[0] if rank == 0 or isinstance(path[0], GroupError) else _or_error(lambda: joined(path[0]))
    found: list[Any] = [None] * size
    dist.all_gather_object(found, mine, group=cpu_group)
    for error in found:
        if isinstance(error, GroupError):
            raise error
    logger.info("rank %d of %d in group %s", rank, size, name)


def _or_error(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except GroupError as error:
        return error


def _agree(name: str, cpu_group: dist.ProcessGroup, rank: int, size: int) -> None:
    identities: list[dict[str, str]] = [{}] * size
    dist.all_gather_object(identities, _identity(), group=cpu_group)
    for other, identity in enumerate(identities):
        for fact, value in identity.items():
            if value == identities[0][fact]:
                continue
            advice = "Start them on one host." if fact == "host" else "Install the same version for all ranks."
            raise GroupError(
                f"group {name}: {fact} of rank 0 is {identities[0][fact]!r}, of rank {other} {value!r}. {advice}"
            )


def leave(name: str) -> None:
    build.load().vllm_ms_leave_group(name.encode())


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
    _call("vllm_ms_all_reduce", name.encode(), source, ctypes.c_int64(x.numel()), DTYPES[x.dtype], result)
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
    _call(function, name.encode(), *pointers)


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
    _call(function, name.encode(), *tokens, *chosen, *rows)
    return out
