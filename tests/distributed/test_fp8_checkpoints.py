"""Ranks that have a part of the weights, or some of the experts, read a checkpoint in fp8 as one process does."""

import pytest

from tests.distributed.layouts import engine
from tests.models.checkpoints import checkpoint
from tests.models.engine import greedy
from tests.models.reference import MAX_TOKENS, PROMPTS, reference
from tests.support import fp8

NAME = "parallel-deepseek-v3"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="parts of experts", marks=pytest.mark.slow),
        pytest.param(dict(enable_expert_parallel=True), id="some experts", marks=pytest.mark.slow),
        pytest.param(dict(enable_expert_parallel=True, enable_ep_weight_filter=True), id="some experts are read"),
    ],
)
def test_tokens_of_two_ranks_equal_the_reference(options, tmp_path):
    in_fp8, exact = fp8.write(tmp_path, checkpoint(NAME), fp8.BLOCKS)
    with engine(NAME, in_fp8, tensor_parallel_size=2, **options) as llm:
        assert greedy(llm, PROMPTS, MAX_TOKENS) == reference(NAME, folder=exact).generate(PROMPTS)
