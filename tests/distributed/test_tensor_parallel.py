"""Several ranks give the tokens that one gives, which are the reference's."""

import pytest

from tests.distributed.layouts import engine
from tests.models.engine import greedy
from tests.models.parallel_families import PARALLEL_FAMILIES
from tests.models.reference import MAX_TOKENS, PROMPTS, reference

# `make test-slow` runs all.
FIRST = [("parallel-qwen3", 2)]
LAYOUTS = [(name, ranks) for name in PARALLEL_FAMILIES for ranks in (2, 4)]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [layout if layout in FIRST else pytest.param(*layout, marks=pytest.mark.slow) for layout in LAYOUTS],
)
def test_float32_tokens_equal_the_reference(name, ranks, layout):
    layout(name, f"TP {ranks}")
    with engine(name, tensor_parallel_size=ranks) as llm:
        assert greedy(llm, PROMPTS, MAX_TOKENS) == reference(name).generate(PROMPTS)
        counts = llm.collective_rpc("graph_statistics")
    assert len(counts) == ranks
    assert all(graph["compiles"] + graph["loads"] == 1 for count in counts for graph in count.values())
