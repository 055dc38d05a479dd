"""Sparse attention under every way to schedule: the reference's tokens, in which its selection is visible."""

import pytest
import torch

from tests.models.engine import engine, greedy, statistics
from tests.models.reference import MAX_TOKENS, PROMPTS, reference

NAME = "deepseek-v32"


def specifications(llm) -> dict:
    """vLLM's specification of each layer's KV cache."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_kv_cache_spec()


def test_chunks_prefix_cache_and_preemption_together():
    config, options = reference(NAME).config(), {"max_num_batched_tokens": 23}
    assert min(map(len, PROMPTS)) < config.index_topk < max(map(len, PROMPTS)), "some prompts are selected from"
    with engine(
        NAME, enable_prefix_caching=True, num_gpu_blocks_override=26, disable_log_stats=False, **options
    ) as llm:
        assert greedy(llm, PROMPTS, MAX_TOKENS) == reference(NAME).generate(PROMPTS)
        assert greedy(llm, PROMPTS[::-1], MAX_TOKENS) == reference(NAME).generate(PROMPTS)[::-1]
        counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        graphs, found = statistics(llm), specifications(llm)
    assert counts["vllm:num_preemptions"] > 0 and counts["vllm:prefix_cache_hits"] > 0
    assert {name: graph["compiles"] + graph["loads"] for name, graph in graphs.items()} == {"model": 1, "logits": 1}
    keys = [spec for name, spec in found.items() if name.endswith("indexer.k_cache")]
    assert len(keys) == config.num_hidden_layers and len(found) == 2 * len(keys)
    assert {(spec.head_size, spec.dtype) for spec in keys} == {(config.index_head_dim, torch.float32)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"max_num_seqs": 1}, {"block_size": 1}, {"block_size": 64}, {"max_num_batched_tokens": 1024}],
    ids=["alone", "blocks of 1", "blocks of 64", "whole prompts"],
)
@pytest.mark.parametrize("name", [NAME, "glm-moe-dsa"])
def test_configured(name, options):
    with engine(name, enable_prefix_caching=False, **options) as llm:
        assert greedy(llm, PROMPTS, MAX_TOKENS) == reference(name).generate(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAME, "glm-moe-dsa"])
def test_unfused_graphs_give_the_same_tokens(name, monkeypatch):
    monkeypatch.setenv("VLLM_MS_DISABLE_PASSES", "fuse_mla,fuse_norm,fuse_residual,fuse_activation,fuse_moe")
    with engine(name) as llm:
        assert greedy(llm, PROMPTS, MAX_TOKENS) == reference(name).generate(PROMPTS)
        assert statistics(llm)["model"]["operators"]["vllm_ms.mla_attention.default"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["mindspore_int8", "mindspore_int4"])
def test_quantized_weights(quantization):
    """Its own products are quantized, but not those that the indexer makes keys and weights of."""
    with engine(NAME, "bfloat16", quantization=quantization) as llm:
        operators = statistics(llm)["model"]["operators"]
        assert all(len(set(tokens)) > 5 for tokens in greedy(llm, PROMPTS, MAX_TOKENS))
    assert operators["vllm_ms.lightning_indexer.default"] == 3
    assert operators[f"vllm_ms.linear_{quantization.removeprefix('mindspore_')}.default"] >= 3 * 4
    assert operators["vllm_ms.linear.default"] >= 3
