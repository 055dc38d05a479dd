"""Groups over two hosts, which are two network namespaces: the bits of one host, and what becomes of a lost rank."""

import functools
import itertools
import os
import signal
import time

import pytest
import torch

from tests.distributed import work
from tests.distributed.ranks import Ranks, results
from tests.support import namespaces
from tests.support.namespaces import TwoHosts

pytestmark = pytest.mark.skipif(bool(namespaces.missing()), reason=namespaces.missing())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def two():
    with TwoHosts() as two:
        yield two


SLOW = pytest.mark.slow  # each process imports torch, and there are few CPUs


@pytest.mark.parametrize("places", [(0, 1), pytest.param((0, 1, 0, 1), marks=SLOW)], ids=str)
def test_sums_are_taken_in_the_order_of_ranks_wherever_they_are(places, two, tmp_path):
    size = len(places)
    there = [two.hosts[place] for place in places]
    found = results(work.collectives_and_exchanges, size, tmp_path, size, DTYPES, hosts=there)
    for i, (dtype, shape) in enumerate(itertools.product(DTYPES, work.SHAPES)):
        inputs = [work.tensor(rank, shape, dtype) for rank in range(size)]
        for rank, (collectives, *_) in enumerate(found):
            summed, part, *gathered = collectives[i]
            assert torch.equal(summed, in_order(inputs))
            assert torch.equal(part, in_order([x + rank for x in inputs]))
            for dim, whole in enumerate(gathered):
                assert torch.equal(whole, torch.cat(inputs, dim))
    for rank, (_, *exchanged) in enumerate(found):
        for rows, combined in exchanged:
            expected_rows, expected = work.exchanged(rank, size)
            assert torch.equal(rows, expected_rows)
            assert torch.equal(combined, expected)


def in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """Their sum in float32, from the first to the last, rounded to their type."""
    return functools.reduce(torch.add, [part.float() for part in parts]).to(parts[0].dtype)


def wait_for_process(file) -> str:
    while not file.exists() or not file.read_text():
        time.sleep(0.05)
    time.sleep(0.5)  # the others wait by now
    return file.read_text()


@pytest.mark.parametrize("places", [pytest.param((0, 1), marks=SLOW), (0, 1, 1)], ids=str)
def test_a_killed_rank_is_named_with_its_host_within_a_second(places, two, tmp_path):
    size = len(places)
    there = [two.hosts[place] for place in places]
    ranks = Ranks(work.wait_for_the_last, size, tmp_path, size, str(tmp_path), hosts=there)
    killed = wait_for_process(tmp_path / "pid")
    moment = time.monotonic()
    os.kill(int(killed), signal.SIGKILL)
    *answers, dead = ranks.answers()
    assert dead is None
    for noticed, error, failure in answers:
        assert moment < noticed < moment + 1
        assert f"rank {size - 1} (process {killed}" in error
        assert "has died" in error
        assert failure == error
    assert f"on host {two.hosts[1].address})" in answers[0][1]


def test_a_cut_cable_ends_both_sides(two, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MS_COLLECTIVE_TIMEOUT", "2")
    ranks = Ranks(work.use_a_cable_until_it_is_cut, 2, tmp_path, str(tmp_path), hosts=two.hosts)
    wait_for_process(tmp_path / "pid")
    moment = time.monotonic()
    two.cut()
    for rank, (noticed, error) in enumerate(ranks.answers()):
        assert moment < noticed < moment + 5
        assert f"rank {1 - rank} (process" in error
        assert f"on host {two.hosts[1 - rank].address}) during all_reduce of" in error


def test_what_else_can_go_wrong_is_named_on_both_sides(two, tmp_path):
    answers = results(work.go_wrong, 2, tmp_path, hosts=two.hosts)
    for rank, (unreachable, different, failed, stalled) in enumerate(answers):
        other = two.hosts[1 - rank].address
        assert "rank 1 (process" in unreachable, "all raise the first rank's error"
        assert "on host 127.0.0.1) has not answered at tcp://127.0.0.1:" in unreachable
        assert "VLLM_HOST_IP" in unreachable
        assert "all_reduce of 12 bytes" in different
        assert "all_gather of 8 bytes" in different
        assert rank == 0 or "rank 0 of group failing: no memory left" in failed
        assert rank == 1 or f"on host {other}) during all_reduce of 12 bytes did not arrive within 0.5 s" in stalled
