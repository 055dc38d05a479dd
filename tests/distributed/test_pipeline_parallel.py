"""A model's layers in stages, one after the other in processes of their own: the tokens of one process."""

import pytest

from tests.distributed.layouts import engine
from tests.models.engine import greedy
from tests.models.reference import MAX_TOKENS, PROMPTS, reference

# (family, stages, tensor-parallel ranks of a stage); `make test-slow` runs all.
FIRST = [("parallel-qwen3", 2, 1)]
LAYOUTS = [
    *FIRST,
    ("parallel-llama", 3, 1),
    ("parallel-qwen3-moe", 2, 1),
    ("parallel-deepseek-v3", 2, 1),
    ("parallel-deepseek-v32", 3, 1),
    ("parallel-gpt-oss", 4, 1),
    ("parallel-gpt-oss", 2, 2),
    ("parallel-llama", 2, 2),
]


@pytest.mark.parametrize(
    ("name", "stages", "ranks"),
    [layout if layout in FIRST else pytest.param(*layout, marks=pytest.mark.slow) for layout in LAYOUTS],
)
def test_float32_tokens_equal_the_reference(name, stages, ranks, layout):
    layout(name, f"PP {stages}" + (f", TP {ranks}" if ranks > 1 else ""))
    with engine(name, pipeline_parallel_size=stages, tensor_parallel_size=ranks) as llm:
        assert greedy(llm, PROMPTS, MAX_TOKENS) == reference(name).generate(PROMPTS)
        counts = llm.collective_rpc("graph_statistics")
    assert len(counts) == stages * ranks
    assert all(graph["compiles"] + graph["loads"] == 1 for count in counts for graph in count.values())
    assert sum("logits" in count for count in counts) == ranks, "only the last stage has the output head"
