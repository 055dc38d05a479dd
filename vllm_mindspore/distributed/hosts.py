"""What the ranks of one host share: its CPUs and its memory."""

import os

from vllm.logger import init_logger

logger = init_logger("vllm.vllm_mindspore.distributed")


ENGINES = "vllm_mindspore_data_parallel_size"  # in vLLM's additional_config


def note_engines(vllm_config) -> None:
    """Keep the number of data-parallel engines: vLLM tells the engines of a dense model that there is one."""
    engines = vllm_config.parallel_config.data_parallel_size
    if engines > 1:
        vllm_config.additional_config = {**vllm_config.additional_config, ENGINES: engines}


def local_ranks(vllm_config) -> int:
    """How many ranks run on this host, which is the only one: those of all data-parallel engines."""
    return vllm_config.parallel_config.world_size * vllm_config.additional_config.get(ENGINES, 1)


def index_on_host(parallel_config, local_rank: int) -> int:
    """This rank's place among them."""
    return parallel_config.data_parallel_index * parallel_config.world_size + local_rank


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
