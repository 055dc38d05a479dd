"""Groups of processes: their sums, and what becomes of them when a rank dies, stalls, fails or is another version."""

import itertools
import os
import signal
import time

import pytest
import torch

from tests.distributed import work
from tests.distributed.ranks import Ranks, results
from vllm_mindspore.distributed import groups

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2}}


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_gets_the_same_and_right_values(size, tmp_path):
    found = results(work.collectives, size, tmp_path, size, list(TOLERANCE))
    for i, (dtype, shape) in enumerate(itertools.product(TOLERANCE, work.SHAPES)):
        inputs = [work.tensor(rank, shape, dtype) for rank in range(size)]
        total = torch.stack([x.double() for x in inputs]).sum(0)
        for rank in range(size):
            summed, part, *gathered = found[rank][i]
            assert torch.equal(summed, found[0][i][0])
            torch.testing.assert_close(summed.double(), total, **TOLERANCE[dtype])
            torch.testing.assert_close(part.double(), total + rank * size, **TOLERANCE[dtype])
            for dim, whole in enumerate(gathered):
                assert torch.equal(whole, torch.cat(inputs, dim))


@pytest.mark.parametrize("size", [2, 3])
def test_a_killed_rank_is_named_within_a_second(size, tmp_path):
    ranks = Ranks(work.wait_for_the_last, size, tmp_path, size, str(tmp_path))
    killed = tmp_path / "pid"
    while not killed.exists() or not killed.read_text():
        time.sleep(0.05)
    time.sleep(0.5)  # the others wait by now
    moment = time.monotonic()
    os.kill(int(killed.read_text()), signal.SIGKILL)
    *answers, dead = ranks.answers()
    assert dead is None
    for noticed, error, failure in answers:
        assert moment < noticed < moment + 1
        assert f"rank {size - 1} (process {killed.read_text()})" in error
        assert "has died" in error
        assert failure == error


def test_a_stalled_rank_is_named(tmp_path):
    assert "rank 1" in (text := results(work.stall, 2, tmp_path)[0])
    assert "did not arrive within 0.5 s" in text


def test_a_failing_rank_tells_the_others(tmp_path):
    for text in results(work.fail, 3, tmp_path)[1:]:
        assert "rank 0 of group test: no memory left" in text


def test_ranks_of_different_versions_are_refused(tmp_path):
    for text in Ranks(work.different, 2, tmp_path, joins=False).answers():
        assert "vllm_mindspore of rank 0 is '1.0', of rank 1 '1.1'" in text


def test_a_timeout_that_is_no_time_is_refused(monkeypatch):
    for text in ("soon", "-1", "0", "inf"):
        monkeypatch.setenv("VLLM_MS_COLLECTIVE_TIMEOUT", text)
        with pytest.raises(ValueError, match=f"VLLM_MS_COLLECTIVE_TIMEOUT: found '{text}'"):
            groups.step_timeout()
