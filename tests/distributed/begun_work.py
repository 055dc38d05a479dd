"""What the ranks of test_begun.py do: processes that are spawned import it by name."""

import os

import pytest
import torch

from tests.distributed.ranks import GROUP
from vllm_mindspore.distributed import joining

WIRES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS, WIDTH = 5, 36


def values(rank: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(rank))


def tokens(size: int) -> tuple[list[int], torch.Tensor]:
    """How many tokens each rank has, the first none, and the rank of each."""
    counts = [4 * rank for rank in range(size)]
    return counts, torch.repeat_interleave(torch.arange(size, dtype=torch.int32), torch.tensor(counts))


def rows_of_all(rank: int, size: int) -> torch.Tensor:
    return torch.randn(sum(tokens(size)[0]), WIDTH, generator=torch.Generator().manual_seed(100 + rank))


def counts(size: int) -> torch.Tensor:
    """Rows from each rank to each: none from the first to itself."""
    return torch.tensor([[(2 * i + 3 * j) % 5 for j in range(size)] for i in range(size)], dtype=torch.int32)


def rows_to_each(rank: int, size: int) -> tuple[torch.Tensor, ...]:
    sent = counts(size)[rank].tolist()
    return torch.randn(sum(sent), WIDTH, generator=torch.Generator().manual_seed(200 + rank)).split(sent)


def graphs(rank: int, size: int) -> dict[str, list[dict[str, torch.Tensor]]]:
    """By wire: the results of a graph, twice."""
    pair = torch.distributed.new_group([0, 1])
    if rank < 2:
        joining.join("pair", pair, spin=False, one_way=True)
    return {wire: _run(rank, size, wire) for wire in WIRES}


def _run(rank: int, size: int, wire: str) -> list[dict[str, torch.Tensor]]:
    import mindspore as ms

    network = _network(rank, size, wire)
    own, got = torch.zeros(tokens(size)[0][rank], 1), torch.zeros(int(counts(size)[:, rank].sum()), 1)
    rows = torch.cat(rows_to_each(rank, size))
    given = [values(rank), rows_of_all(rank, size), tokens(size)[1], own, rows, counts(size), got]
    tensors = [_to_mindspore(tensor) for tensor in given]
    run = ms.jit(network, capture_mode="ast", jit_level="O0")
    names = ["all_reduce", "all_gather", "reduce_scatter", "reduce_scatter_rows", "all_to_all", "received"]
    return [
        {name: torch.from_numpy(result.asnumpy().copy()) for name, result in zip(names, run(*tensors), strict=True)}
        for _ in range(2)
    ]


def _to_mindspore(tensor: torch.Tensor):
    import mindspore as ms

    if tensor.numel() == 0:
        return ms.ops.zeros(tuple(tensor.shape), ms.float32)
    return ms.Tensor(tensor.numpy())


def _network(rank: int, size: int, wire: str):
    from mindspore import nn

    from vllm_mindspore.ops.registry import build

    def made(name: str, group: str = GROUP, **attributes):
        return build(name, "cpu", wire=wire, group=group, **attributes)

    class Network(nn.Cell):
        def __init__(self):
            super().__init__()
            along, of_rows = dict(dim=1, size=size), dict(rank=rank, size=size)
            self.reduce, self.reduced = made("all_reduce_start"), made("all_reduce_wait")
            self.gather, self.gathered = made("all_gather_start", **along), made("all_gather_wait", **along)
            self.scatter, self.scattered = (
                made("reduce_scatter_start", **along), made("reduce_scatter_wait", **along)
            )  # fmt: skip
            self.sum_rows, self.summed_rows = (
                made("reduce_scatter_rows_start", **of_rows), made("reduce_scatter_rows_wait", **of_rows)
            )  # fmt: skip
            self.exchange, self.exchanged = made("all_to_all_start", **of_rows), made("all_to_all_wait", **of_rows)
            self.rank = rank
            if rank == 0:
                self.send = made("send", "pair", target=1)
            if rank == 1:
                self.receive = made("receive", "pair", width=WIDTH, source=0)

        def construct(self, x, rows, token_ranks, own, to_each, counts, got):
            reducing, gathering, scattering = self.reduce(x), self.gather(x), self.scatter(x)
            if self.rank == 0:
                received = self.send(x)
            elif self.rank == 1:
                received = self.receive(x)
            else:
                received = x
            scattered = self.scattered(scattering, x)
            summing = self.sum_rows(rows, token_ranks)
            reduced = self.reduced(reducing, x)
            exchanging = self.exchange(to_each, counts)
            gathered = self.gathered(gathering, x)
            exchanged = self.exchanged(exchanging, to_each, counts, got)
            summed = self.summed_rows(summing, rows, token_ranks, own)
            return reduced, gathered, scattered, summed, exchanged, received

    return Network()


def made_for_others(rank: int, size: int, errors: str) -> None:
    """Calls operators of graphs that were made for one rank more; what they say goes to the file `errors`."""
    import mindspore as ms

    from vllm_mindspore.ops.registry import build

    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    x, token_ranks = ms.Tensor(values(rank).numpy()), ms.ops.zeros((ROWS,), ms.int32)
    for name, attributes in (("gather_rows_start", {}), ("reduce_scatter_rows_start", {"wire": "float32"})):
        with pytest.raises(RuntimeError):
            build(name, "cpu", group=GROUP, rank=rank, size=size + 1, **attributes)(x, token_ranks).asnumpy()
