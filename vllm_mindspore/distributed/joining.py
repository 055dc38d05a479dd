"""How the ranks of a group find each other: those of one host by memory, those of other hosts by TCP (csrc/links.h).

Everything is told over vLLM's own group of the same ranks (gloo), before the first collective of ours.
"""

from __future__ import annotations

import ctypes
import functools
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from vllm.logger import init_logger

from vllm_mindspore.compiler import cache
from vllm_mindspore.distributed import groups, hosts
from vllm_mindspore.distributed.gather import of_every_rank
from vllm_mindspore.distributed.groups import GroupError, call
from vllm_mindspore.version import __version__

logger = init_logger("vllm.vllm_mindspore.distributed")

SLOT_BYTES = 32 << 20  # most that a rank writes before the others read it; what is not used takes no memory
STARTING_TIMEOUT = 1800.0  # seconds that a rank may take to compile what another had in its cache
CONNECTING_SECONDS = 30.0
MOST_SILENCE = 10.0  # seconds; less where VLLM_MS_COLLECTIVE_TIMEOUT is
_SPIN_NANOSECONDS = 1_000_000


@dataclass(frozen=True)
class Member:
    """What a rank tells the others of itself."""

    host: str  # the same for ranks that can share memory
    address: str  # of its host, for those that cannot
    process: int


@functools.cache
def _same() -> dict[str, str]:
    return {"vllm_mindspore": __version__, "sources": cache.source_hash()}


def join(name: str, cpu_group: dist.ProcessGroup, spin: bool, one_way: bool = False) -> None:
    """Join this process's group `name`, whose ranks are those of `cpu_group`. Every rank must call it.

    spin: whether each rank has a CPU of its own, on which it may wait busily. one_way: a group of two, for the
    operators `send` on the first rank and `receive` on the second.

    Raises:
        GroupError: the ranks run different versions, memory cannot be shared, or a host cannot be reached.
    """
    rank = dist.get_rank(cpu_group)
    _require_same(name, _told(cpu_group, _same()))
    members = _told(cpu_group, Member(hosts.identity(), hosts.address(), os.getpid()))
    _share_memory(name, cpu_group, rank, members, spin, one_way)
    others = [other for other, member in enumerate(members) if member.host != members[rank].host]
    if len({member.host for member in members}) > 1:
        _connect(name, cpu_group, rank, members, others)
    where = f", {len(others)} of them on other hosts" if others else ""
    logger.info("rank %d of %d in group %s%s", rank, len(members), name, where)


def _told(cpu_group: dist.ProcessGroup, mine: Any) -> list[Any]:
    """What each rank has to say. Raises the first error that a rank has instead, on all of them."""
    found = of_every_rank(mine, cpu_group)
    for error in found:
        if isinstance(error, GroupError):
            raise error
    return found


def _or_error(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except GroupError as error:
        return error


def _require_same(name: str, versions: list[dict[str, str]]) -> None:
    for other, found in enumerate(versions):
        for fact, value in versions[0].items():
            if found.get(fact) != value:
                raise GroupError(
                    f"group {name}: {fact} of rank 0 is {value!r}, of rank {other} {found.get(fact)!r}. "
                    "Install the same version for all ranks."
                )


def _share_memory(
    name: str, cpu_group: dist.ProcessGroup, rank: int, members: list[Member], spin: bool, one_way: bool
) -> None:
    """The first rank of each host makes memory, the others of that host join it."""
    first = next(other for other, member in enumerate(members) if member.host == members[rank].host)
    spin_nanoseconds = ctypes.c_int64(_SPIN_NANOSECONDS if spin else 0)
    options = (ctypes.c_double(STARTING_TIMEOUT), spin_nanoseconds, int(one_way))

    def joined(memory: str) -> int:
        arguments = (name.encode(), rank, len(members), memory.encode(), ctypes.c_int64(SLOT_BYTES))
        return call("vllm_ms_join_group", *arguments, *options)

    made = _or_error(lambda: f"/proc/{os.getpid()}/fd/{joined('')}") if rank == first else ""
    paths = _told(cpu_group, made)
    _told(cpu_group, "" if rank == first else _or_error(lambda: joined(paths[first])))


def _connect(name: str, cpu_group: dist.ProcessGroup, rank: int, members: list[Member], others: list[int]) -> None:
    token = _told(cpu_group, secrets.token_hex(16))[0]
    listening = _told(cpu_group, _or_error(lambda: _listen(name, token, members[rank].address, others, rank)))

    def connect() -> None:
        for other in others:
            endpoint = listening[other][rank] if other < rank else ""
            member = members[other]
            words = (str(member.process).encode(), member.address.encode(), endpoint.encode())
            call("vllm_ms_connect", name.encode(), other, *words)
        call("vllm_ms_greet", name.encode(), ctypes.c_double(CONNECTING_SECONDS))

    _told(cpu_group, _or_error(connect))
    groups.flush_at_exit()


def _listen(name: str, token: str, address: str, others: list[int], rank: int) -> dict[int, str]:
    """The endpoints at which this rank waits for each rank above it."""
    import zmq.backend.cython._zmq as linked_with_libzmq

    silence = min(MOST_SILENCE, groups.step_timeout())
    ranks = (ctypes.c_int32 * len(others))(*others)
    library = linked_with_libzmq.__file__.encode()
    call(
        "vllm_ms_listen", name.encode(), library, token.encode(), address.encode(), ranks, len(others),
        ctypes.c_double(silence),
    )  # fmt: skip
    found = {}
    for other in others:
        if other > rank:
            text = ctypes.create_string_buffer(256)
            call("vllm_ms_endpoint", name.encode(), other, text, len(text))
            found[other] = text.value.decode()
    return found
