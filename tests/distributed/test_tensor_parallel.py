"""Several ranks give the tokens that one gives, which are the reference's."""

import pytest
from vllm import LLM

from tests.models.checkpoints import checkpoint
from tests.models.engine import greedy
from tests.models.parallel_families import PARALLEL_FAMILIES
from tests.models.reference import MAX_TOKENS, PROMPTS, reference

# `make test-slow` runs all.
FIRST = [("parallel-qwen3", 2), ("parallel-deepseek-v3", 2)]
LAYOUTS = [(name, ranks) for name in PARALLEL_FAMILIES for ranks in (2, 4)]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [layout if layout in FIRST else pytest.param(*layout, marks=pytest.mark.slow) for layout in LAYOUTS],
)
def test_float32_tokens_equal_the_reference(name, ranks):
    llm = LLM(
        str(checkpoint(name)),
        dtype="float32",
        tensor_parallel_size=ranks,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        disable_log_stats=True,
        seed=0,
    )
    try:
        assert greedy(llm, PROMPTS, MAX_TOKENS) == reference(name).generate(PROMPTS)
        counts = llm.collective_rpc("graph_statistics")
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert len(counts) == ranks
    assert all(graph["compiles"] + graph["loads"] == 1 for count in counts for graph in count.values())
