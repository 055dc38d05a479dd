"""What the ranks of test_groups.py do: processes that are spawned import it by name."""

import itertools
import os
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import GROUP
from vllm_mindspore.distributed import groups

SHAPES = [(1,), (7, 3), (5, 33), (3, 200, 1024)]


def tensor(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def collectives(rank: int, size: int, dtypes: list[torch.dtype]) -> list[tuple[torch.Tensor, ...]]:
    found = []
    for dtype, shape in itertools.product(dtypes, SHAPES):
        x = tensor(rank, shape, dtype)
        scattered = groups.reduce_scatter(GROUP, torch.cat([x + i for i in range(size)], -1), x.dim() - 1, size)
        gathered = [groups.all_gather(GROUP, x, dim, size) for dim in range(x.dim())]
        found.append((groups.all_reduce(GROUP, x), scattered, *gathered))
    return found


def wait_for_the_last(rank: int, size: int, folder: str) -> tuple[float, str, str]:
    groups.all_reduce(GROUP, torch.ones(3))
    if rank == size - 1:
        (Path(folder) / "pid").write_text(str(os.getpid()))
        time.sleep(1000)
    with pytest.raises(groups.GroupError) as caught:
        groups.all_reduce(GROUP, torch.ones(3))
    return time.monotonic(), str(caught.value), groups.failure()


def stall(rank: int) -> str:
    groups.build.load().vllm_ms_set_group_timeout(groups.ctypes.c_double(0.5))
    if rank == 1:
        time.sleep(3)
        return ""
    with pytest.raises(groups.GroupError) as caught:
        groups.all_reduce(GROUP, torch.ones(3))
    return str(caught.value)


def fail(rank: int) -> str:
    if rank == 0:
        time.sleep(0.5)
        groups.fail("no memory left")
        return ""
    with pytest.raises(groups.GroupError) as caught:
        groups.all_gather(GROUP, torch.ones(3), 0, 3)
    return str(caught.value)


def different(rank: int) -> str:
    groups.__version__ = f"1.{rank}"
    with pytest.raises(groups.GroupError) as caught:
        groups.join(GROUP, torch.distributed.group.WORLD, spin=False)
    return str(caught.value)


def _layers_of_experts(worker) -> list[torch.nn.Module]:
    return [module for module in worker.get_model().modules() if hasattr(module, "logical_to_physical")]


def swap_expert_weights(worker, a: int, b: int) -> None:
    """In every layer the weights in the slots `a` and `b` of each rank."""
    for layer in _layers_of_experts(worker):
        for weight in (layer.w13_weight, layer.w2_weight):
            weight.data[[a, b]] = weight.data[[b, a]]


def swap_places(worker, a: int, b: int) -> None:
    """In every layer's map the slots `a` and `b` of each rank."""
    for layer in _layers_of_experts(worker):
        places, capacity = layer.logical_to_physical, -(-len(layer.logical_to_physical) // 2)
        slots = places % capacity
        moved = torch.where(slots == a, places - a + b, torch.where(slots == b, places - b + a, places))
        places.copy_(moved)
