"""What every rank of one of PyTorch's groups has to say, before there are groups of ours."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def of_every_rank(mine: T, group: dist.ProcessGroup) -> list[T]:
    """The `mine` of each rank of `group`, in the order of ranks; each of them must call it. Values are pickled."""
    found: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found
