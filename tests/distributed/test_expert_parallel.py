"""Experts spread over ranks that share their tokens: the tokens of one process, and a map that can be changed."""

import pytest

from tests.distributed import work
from tests.distributed.layouts import engine
from tests.models.engine import greedy
from tests.models.parallel_families import PARALLEL_FAMILIES
from tests.models.reference import MAX_TOKENS, PROMPTS, reference

# `make test-slow` runs all.
FIRST = [("parallel-deepseek-v3", 2)]
# Without gpt-oss: vLLM's loader of it gives all ranks as many experts, and this one has seven.
WITHOUT = ("parallel-llama", "parallel-qwen3", "parallel-gemma3", "parallel-gpt-oss")
WITH_EXPERTS = [name for name in PARALLEL_FAMILIES if name not in WITHOUT]
LAYOUTS = [(name, ranks) for name in WITH_EXPERTS for ranks in (2, 4)]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [layout if layout in FIRST else pytest.param(*layout, marks=pytest.mark.slow) for layout in LAYOUTS],
)
def test_float32_tokens_equal_the_reference(name, ranks, layout):
    layout(name, f"TP {ranks}, EP")
    with engine(name, tensor_parallel_size=ranks, enable_expert_parallel=True) as llm:
        assert greedy(llm, PROMPTS, MAX_TOKENS) == reference(name).generate(PROMPTS)
        statistics, tokens = llm.collective_rpc("graph_statistics"), llm.collective_rpc("tokens_of_experts")
    assert all(graph["compiles"] + graph["loads"] == 1 for found in statistics for graph in found.values())
    assert tokens[0] and all(counts == tokens[0] for counts in tokens), "ranks that share their tokens count the same"


def test_ranks_with_whole_groups_of_experts_have_the_same_work():
    """Pangu Pro MoE takes equally many experts of each group, whatever the tokens."""
    name = "parallel-pangu-pro-moe"
    config = PARALLEL_FAMILIES[name].config()
    with engine(name, tensor_parallel_size=2, enable_expert_parallel=True) as llm:
        assert greedy(llm, PROMPTS, MAX_TOKENS) == reference(name).generate(PROMPTS)
        layers = llm.collective_rpc("tokens_of_experts")[0]
    assert len(layers) == config.num_hidden_layers - len(config.mlp_only_layers)
    for counts in layers.values():
        first, second = counts[: config.num_experts // 2], counts[config.num_experts // 2 :]
        assert sum(first) == sum(second) > 0
        assert len(set(counts)) > 2, "experts themselves are chosen unevenly"


def test_experts_move_to_other_places_without_a_compilation(monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions for the ranks
    name = "parallel-qwen3-moe"
    expected = reference(name).generate(PROMPTS)
    with engine(name, tensor_parallel_size=2, enable_expert_parallel=True) as llm:
        before = llm.collective_rpc("graph_statistics")
        llm.collective_rpc(work.swap_expert_weights, args=(0, 2))
        assert greedy(llm, PROMPTS, MAX_TOKENS) != expected, "the weights moved, and the map knows nothing of it"
        llm.collective_rpc(work.swap_places, args=(0, 2))
        llm.reset_prefix_cache()
        assert greedy(llm, PROMPTS, MAX_TOKENS) == expected
        after = llm.collective_rpc("graph_statistics")
    assert compilations(after) == compilations(before)


def compilations(statistics: list[dict]) -> list[list[tuple[int, int]]]:
    """Graphs compiled and loaded, of each graph of each rank."""
    return [[(graph["compiles"], graph["loads"]) for graph in found.values()] for found in statistics]
