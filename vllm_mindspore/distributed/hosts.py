"""What the ranks of one host share, its CPUs and its memory; and by which address other hosts reach it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from vllm.logger import init_logger

from vllm_mindspore.distributed.gather import of_every_rank

logger = init_logger("vllm.vllm_mindspore.distributed")


ENGINES = "vllm_mindspore_data_parallel_size_local"  # in vLLM's additional_config


def note_engines(vllm_config) -> None:
    """Keep this host's number of data-parallel engines: vLLM tells the engines of a dense model that there is one."""
    engines = vllm_config.parallel_config.data_parallel_size_local
    if engines > 1:
        vllm_config.additional_config = {**vllm_config.additional_config, ENGINES: engines}


@dataclass(frozen=True)
class Place:
    """A rank is the `index`-th of `ranks` on its host, those of all data-parallel engines."""

    index: int
    ranks: int


def identity() -> str:
    """The same for processes that can share memory: those of one kernel that see the same processes and networks."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    kernel = boot.read_text().strip() if boot.is_file() else socket.gethostname()
    return " ".join([kernel, *(_namespace(name) for name in ("pid", "net"))])


def _namespace(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{name}")
    except OSError:
        return ""


def find_place(vllm_config, world: dist.ProcessGroup) -> Place:
    """Of this rank among those of its host. world: vLLM's group of all ranks; each of them must call it."""
    found = of_every_rank(identity(), world)
    here = [rank for rank, host in enumerate(found) if host == found[dist.get_rank(world)]]
    place = Place(here.index(dist.get_rank(world)), len(here))
    engines = vllm_config.additional_config.get(ENGINES, 1)
    if vllm_config.parallel_config.data_parallel_size > 1 or engines == 1:
        return place
    # Engines of a dense model know nothing of each other.
    before = vllm_config.parallel_config.data_parallel_rank_local or 0
    return Place(before * place.ranks + place.index, engines * place.ranks)


def take_share_of_cpus(index: int, ranks: int) -> None:
    """Keep this process to its share of the host's CPUs, disjoint from other ranks' where there are enough.

    Before the first operator, whose thread pool takes what it finds.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) >= ranks:
        share = cpus[index * len(cpus) // ranks : (index + 1) * len(cpus) // ranks]
        os.sched_setaffinity(0, share)
        logger.info("rank %d of %d on this host takes CPUs %s", index, ranks, ",".join(map(str, share)))
    else:
        os.environ["VLLM_MS_NUM_THREADS"] = "1"
        logger.warning("%d ranks share %d CPUs: they will wait for each other", ranks, len(cpus))
    global _own_cpus
    _own_cpus = len(cpus) >= ranks


_own_cpus = False


def has_own_cpus() -> bool:
    """Whether this process has taken CPUs that no other rank runs on."""
    return _own_cpus


_towards = "127.0.0.1"


def note_master(address: str) -> None:
    """Where the first rank is, for `address`."""
    global _towards
    _towards = address


def address() -> str:
    """By which other hosts reach this one: `VLLM_HOST_IP`, else the address from which packets to the master leave.

    Empty where none do.
    """
    given = os.environ.get("VLLM_HOST_IP")
    if given:
        return given
    try:
        family, _, _, _, target = socket.getaddrinfo(_towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            return probe.getsockname()[0]
    except OSError:
        return ""
