"""What the ranks of test_groups.py do: processes that are spawned import it by name."""

import itertools
import os
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import GROUP
from vllm_mindspore.distributed import groups, joining

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


CAPACITY, WIDTH = 2, 40  # of experts a rank, of rows


def _tokens(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's rank, of which the first has none, and its two places and weights."""
    token_ranks = torch.repeat_interleave(torch.arange(size, dtype=torch.int32), 3 * torch.arange(size))
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randperm(size * CAPACITY, generator=generator)[:2] for _ in token_ranks]
    return token_ranks, torch.cat([torch.stack(ids).float(), torch.full((len(ids), 2), 0.5)], 1)


def exchanges(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to the ranks that have a token's experts, and back."""
    token_ranks, routing = _tokens(size)
    x = tensor(rank, (3 * rank, WIDTH), torch.float32)
    rows = groups.dispatch(GROUP, x, routing, token_ranks, CAPACITY, torch.empty(len(routing), WIDTH))
    back = torch.empty(3 * rank, WIDTH)
    return rows, groups.combine(GROUP, rows * (rank + 1.5), routing, token_ranks, CAPACITY, back)


def exchanged(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What they give, by plain arithmetic."""
    token_ranks, routing = _tokens(size)
    x = torch.cat([tensor(other, (3 * other, WIDTH), torch.float32) for other in range(size)])
    here = [(routing[:, :2] // CAPACITY == other).any(1, keepdim=True).float() for other in range(size)]
    total = sum((x * has * (other + 1.5) for other, has in enumerate(here)), torch.zeros_like(x))
    return x * here[rank], total[token_ranks == rank]


def collectives_and_exchanges(rank: int, size: int, dtypes: list[torch.dtype]) -> list:
    return [collectives(rank, size, dtypes), *(exchanges(rank, size) for _ in range(6))]


def use_a_cable_until_it_is_cut(rank: int, folder: str) -> tuple[float, str]:
    groups.use_step_timeout()
    x = torch.ones(1 << 20)
    with pytest.raises(groups.GroupError) as caught:
        for i in itertools.count():
            groups.all_reduce(GROUP, x)
            if i == 3 and rank == 0:
                (Path(folder) / "pid").write_text(str(os.getpid()))
    return time.monotonic(), str(caught.value)


def _error(function) -> str:
    with pytest.raises(groups.GroupError) as caught:
        function()
    return str(caught.value)


def go_wrong(rank: int) -> list[str]:
    """One error after the other, each in a group of its own."""
    world, x = torch.distributed.group.WORLD, torch.ones(3)
    address, joining.CONNECTING_SECONDS = os.environ["VLLM_HOST_IP"], 1.0
    os.environ["VLLM_HOST_IP"] = "127.0.0.1"
    found = [_error(lambda: joining.join("unreachable", world, spin=False))]
    os.environ["VLLM_HOST_IP"], joining.CONNECTING_SECONDS = address, 30.0
    joining.join("different", world, spin=False)
    if rank == 0:
        found.append(_error(lambda: groups.all_reduce("different", x)))
    else:
        found.append(_error(lambda: groups.all_gather("different", x[:2], 0, 2)))
    joining.join("failing", world, spin=False)
    if rank == 0:
        groups.fail("no memory left")
    found.append("" if rank == 0 else _error(lambda: groups.all_reduce("failing", x)))
    joining.join("stalling", world, spin=False)
    groups.build.load().vllm_ms_set_group_timeout(groups.ctypes.c_double(0.5))
    if rank == 1:
        time.sleep(1.5)
    found.append("" if rank == 1 else _error(lambda: groups.all_reduce("stalling", x)))
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
    joining.__version__ = f"1.{rank}"
    with pytest.raises(groups.GroupError) as caught:
        joining.join(GROUP, torch.distributed.group.WORLD, spin=False)
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
