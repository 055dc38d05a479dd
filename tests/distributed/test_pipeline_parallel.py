"""A model's layers in stages, one after the other in processes of their own: the tokens of one process."""

import pytest

from tests.distributed.layouts import engine
from tests.models.engine import greedy
from tests.models.reference import MAX_TOKENS, PROMPTS, reference

# (family, stages, tensor-parallel ranks of a stage, options); `make test-slow` runs all.
EXPERTS = "enable_expert_parallel"
FIRST = [("parallel-gemma3", 2, 1)]
LAYOUTS = [
    *FIRST,
    ("parallel-qwen3", 2, 1),
    ("parallel-llama", 3, 1),
    ("parallel-qwen3-moe", 2, 1),
    ("parallel-deepseek-v3", 2, 1),
    ("parallel-deepseek-v32", 3, 1),
    ("parallel-pangu-pro-moe", 2, 1),
    ("parallel-minimax-m2", 2, 1),
    ("parallel-gpt-oss", 4, 1),
    ("parallel-gpt-oss", 2, 2),
    ("parallel-llama", 2, 2),
    ("parallel-qwen3-moe", 2, 2, EXPERTS),
    ("parallel-deepseek-v3", 2, 2, EXPERTS),
    ("parallel-pangu-pro-moe", 2, 2, EXPERTS),
]


@pytest.mark.parametrize(
    "stages",
    [stages if stages in FIRST else pytest.param(stages, marks=pytest.mark.slow) for stages in LAYOUTS],
    ids=lambda stages: " ".join(map(str, stages)),
)
def test_float32_tokens_equal_the_reference(stages, layout):
    name, stages, ranks, *options = stages
    layout(name, f"PP {stages}" + f", TP {ranks}" * (ranks > 1) + ", EP" * (EXPERTS in options))
    sizes = dict(pipeline_parallel_size=stages, tensor_parallel_size=ranks)
    with engine(name, **sizes, **dict.fromkeys(options, True)) as llm:
        assert greedy(llm, PROMPTS, MAX_TOKENS) == reference(name).generate(PROMPTS)
        counts = llm.collective_rpc("graph_statistics")
    assert len(counts) == stages * ranks
    assert all(graph["compiles"] + graph["loads"] == 1 for count in counts for graph in count.values())
    assert sum("logits" in count for count in counts) == ranks, "only the last stage has the output head"
