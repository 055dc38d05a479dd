"""Collectives in graphs that begin them, do other work, and end them in another order; and what one rank sends."""

import functools

import pytest
import torch

from tests.distributed import begun_work as work
from tests.distributed.ranks import GROUP, results
from tests.support import namespaces
from tests.support.namespaces import TwoHosts


def in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, parts)


def check(found: list[dict], size: int) -> None:
    for wire, rounding in work.WIRES.items():
        x = [work.values(rank).to(rounding).float() for rank in range(size)]
        rows = [work.rows_of_all(rank, size).to(rounding).float() for rank in range(size)]
        sent = [work.rows_to_each(rank, size) for rank in range(size)]
        for rank, answers in enumerate(found):
            first, again = answers[wire]
            assert all(torch.equal(first[name], again[name]) for name in first), "the same bits again"
            assert torch.equal(first["all_reduce"], in_order(x))
            assert torch.equal(first["all_gather"], torch.cat(x, 1))
            assert torch.equal(first["reduce_scatter"], in_order(x).chunk(size, 1)[rank])
            own = work.tokens(size)[1] == rank
            assert torch.equal(first["reduce_scatter_rows"], in_order(rows)[own])
            expected = torch.cat([parts[rank] for parts in sent]).to(rounding).float()
            assert torch.equal(first["all_to_all"], expected)
            if rank == 1:
                assert torch.equal(first["received"], x[0])


def test_graphs_end_in_another_order_than_they_began(tmp_path):
    check(results(work.graphs, 2, tmp_path, 2), 2)


def test_graphs_made_for_other_ranks_say_so(tmp_path):
    errors = tmp_path / "errors"
    results(work.made_for_others, 2, tmp_path, 2, str(errors))
    said = errors.read_text()
    for name in ("gather_rows_start", "reduce_scatter_rows_start"):
        for rank in range(2):
            text = f"this is rank {rank} of 2 in group {GROUP}, the graph was made for rank {rank} of 3"
            assert f"vllm_ms.{name}: {text}" in said


@pytest.mark.slow
@pytest.mark.skipif(bool(namespaces.missing()), reason=namespaces.missing())
@pytest.mark.parametrize("places", [(0, 1), (0, 1, 1)], ids=str)
def test_also_between_hosts(places, tmp_path):
    size = len(places)
    with TwoHosts() as two:
        check(results(work.graphs, size, tmp_path, size, hosts=[two.hosts[place] for place in places]), size)
