"""kill -9 of a rank in the middle of a step: a clean end that names the rank, and the next start works."""

import pytest

from tests.distributed.layouts import served_greedy, server
from tests.models.reference import PROMPTS
from tests.support.crash import kill

TENSORS, ENGINES = ("--tensor-parallel-size=2",), ("--data-parallel-size=2", "--enable-expert-parallel")
LONG, MAX_TOKENS = "--max-model-len=512", 500  # of a request that has not ended when its rank is killed


def ranks(running) -> list:
    """The server's processes that are ranks: the workers, or the engines where these have none."""
    named = [(process, " ".join(process.cmdline())) for process in running.processes()]
    workers = [process for process, name in named if "Worker" in name]
    return workers or [process for process, name in named if "EngineCore" in name]


@pytest.mark.parametrize(
    ("options", "times"),
    [(TENSORS, 1), *(pytest.param(options, 20, marks=pytest.mark.slow) for options in (TENSORS, ENGINES))],
)
@pytest.mark.timeout(3600)
def test_a_killed_rank_ends_the_server_and_the_next_one_starts(options, times, tmp_path):
    first = None
    for repeat in range(times):
        log = tmp_path / f"server-{repeat}.log"
        with server("parallel-qwen3-moe", log, *options, LONG) as running:
            tokens = served_greedy(running, PROMPTS[:2], 8)
            first = first or tokens
            assert tokens == first
            victims = ranks(running)
            assert len(victims) == 2
            victim = victims[repeat % 2]
            status, message = kill(running, victim, MAX_TOKENS)
            assert status == 500 and message
            assert running.process.returncode not in (0, None)
        if options == TENSORS:
            assert f"rank {repeat % 2} (process {victim.pid})" in log.read_text(), "the rank is named"
