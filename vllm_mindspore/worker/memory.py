"""Memory of the host: what there is, what this process uses, and how much of it the KV cache may take."""

import os
from pathlib import Path

import psutil
from vllm.config import CacheConfig
from vllm.logger import init_logger
from vllm.utils.mem_utils import format_gib

logger = init_logger("vllm.vllm_mindspore.memory")

GIB = 1 << 30
DEFAULT_KV_CACHE = 4 * GIB
DEFAULT_SHARE_OF_FREE = 0.5


def total_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its control group's limit if that is lower."""
    total = psutil.virtual_memory().total
    limit = _cgroup_value("memory.max", "memory/memory.limit_in_bytes")
    return min(total, limit) if limit else total


def available_memory() -> int:
    """Bytes that can still be allocated without swapping, within the control group."""
    free = psutil.virtual_memory().available
    limit = _cgroup_value("memory.max", "memory/memory.limit_in_bytes")
    used = _cgroup_value("memory.current", "memory/memory.usage_in_bytes")
    return min(free, max(limit - used, 0)) if limit and used else free


def resident_memory() -> int:
    """Resident bytes of this process."""
    return psutil.Process().memory_info().rss


def _cgroup_value(v2: str, v1: str) -> int | None:
    for name in (v2, v1):
        path = Path("/sys/fs/cgroup") / name
        if path.is_file():
            text = path.read_text().strip()
            return int(text) if text.isdigit() and int(text) < (1 << 62) else None
    return None


def kv_cache_bytes(cache_config, minimum: int, maximum: int, ranks: int = 1) -> int:
    """Bytes the KV cache of one rank may take, asked after weights and activations are resident.

    In order: --kv-cache-memory-bytes, `VLLM_MS_KV_CACHE_GIB`, --gpu-memory-utilization when it is not vLLM's default
    (share of total memory this process may reach), else 4 GiB, or what one request of --max-model-len needs
    (`minimum`, bytes) if that is more, but at most what --max-num-seqs such requests need (`maximum`, bytes) and half
    of the free memory. Of what is free or a share of the total, and of the 4 GiB, each of the host's `ranks` takes an
    equal part; bytes that are asked for are for each.

    Raises:
        ValueError: more memory is asked for than is free; names the option and both sizes.
    """
    free = available_memory()
    explicit, source = cache_config.kv_cache_memory_bytes, "--kv-cache-memory-bytes"
    if explicit is None and os.environ.get("VLLM_MS_KV_CACHE_GIB"):
        source = "VLLM_MS_KV_CACHE_GIB"
        explicit = _gib_from_environment(os.environ[source])
    if explicit is None and cache_config.gpu_memory_utilization != _default_utilization():
        source = f"--gpu-memory-utilization {cache_config.gpu_memory_utilization}"
        explicit = int(total_memory() * cache_config.gpu_memory_utilization / ranks) - resident_memory()
    if explicit is None:
        return min(max(DEFAULT_KV_CACHE // ranks, minimum), maximum, int(free * DEFAULT_SHARE_OF_FREE) // ranks)
    if not 0 < explicit <= free:
        raise ValueError(
            f"{source}: the KV cache would take {format_gib(explicit)} GiB, but {format_gib(free)} GiB of "
            f"{format_gib(total_memory())} GiB are free and this process already holds "
            f"{format_gib(resident_memory())} GiB. Choose a size between 0 and the free memory."
        )
    return explicit


def _default_utilization() -> float:
    return CacheConfig().gpu_memory_utilization


def _gib_from_environment(text: str) -> int:
    try:
        return int(float(text) * GIB)
    except ValueError:
        raise ValueError(f"VLLM_MS_KV_CACHE_GIB: found {text!r}, expected a number of GiB such as 4 or 0.5.") from None
