"""Numpy forms of the Triton kernels that vLLM's in-tree runner launches on the host side of a step."""

import functools
import sys
from collections.abc import Callable

import numpy as np


def compute_slot_mapping(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr,
    positions_ptr,
    block_table_ptr,
    block_table_stride: int,
    slot_mapping_ptr,
    KV_CACHE_BLOCK_SIZE: int | None = None,
    TOTAL_CP_WORLD_SIZE: int = 1,
    TOTAL_CP_RANK: int = 0,
    CP_KV_CACHE_INTERLEAVE_SIZE: int = 1,
    PAD_ID: int = -1,
    BLOCK_SIZE: int = 1024,
) -> None:
    """Fill `slot_mapping[:max_num_tokens]` (int64): block_table[request, position // block] * block + position % block.

    Argument names and order are those of vLLM's Triton kernel (`vllm/v1/worker/block_table.py`); the tensors live on
    the host. Context parallelism is refused at start, so the CP arguments are always 1, 0 and 1.
    """
    query_start_loc, positions = query_start_loc_ptr.numpy(), positions_ptr.numpy()
    block_table, slot_mapping = block_table_ptr.numpy(), slot_mapping_ptr.numpy()
    lengths = np.diff(query_start_loc)
    request = np.repeat(np.arange(len(lengths)), lengths)
    position = positions[: len(request)]
    block = block_table[request, position // KV_CACHE_BLOCK_SIZE].astype(np.int64)
    slot_mapping[: len(request)] = block * KV_CACHE_BLOCK_SIZE + position % KV_CACHE_BLOCK_SIZE
    slot_mapping[num_tokens:max_num_tokens] = PAD_ID


KERNELS = {"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": compute_slot_mapping}


@functools.cache
def register() -> None:
    """Hand the kernels to vLLM's dispatcher (`Platform.register_triton_kernel_overrides`), once in a process."""
    hand_over(KERNELS)


def hand_over(kernels: dict[str, Callable[..., None]]) -> None:
    """Give `kernels`, by the names of Triton's, to vLLM's dispatcher.

    It looks at every attribute of every module, and llvmlite's library, once numba has been imported, answers to the
    name `__dict__` with a function of its own: these modules are out of sight meanwhile.
    """
    from vllm.triton_utils.dispatcher import register_kernels

    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "llvmlite"}
    try:
        register_kernels(kernels)
    finally:
        sys.modules.update(hidden)
