"""The same greedy float32 output however a request is scheduled: to the last bit of its logprobs."""

import pytest

from tests.models.engine import engine, statistics
from tests.models.reference import PROMPTS, reference

# gemma2: two KV cache groups, sliding windows, soft caps; glm4-moe: experts, grouped routing, a shared expert
FAMILIES = ["qwen3", "gemma2", "glm4-moe"]
LATENT = "deepseek-v3"
LONG = 48


def generate(llm, prompts=PROMPTS, max_tokens=LONG):
    """Per prompt: tokens, and the logprob of each, as float32 gives them."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    results = []
    for output in outputs:
        completion = output.outputs[0]
        values = [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
        results.append((list(completion.token_ids), values))
    return results, outputs


@pytest.fixture(scope="module")
def whole():
    """family → results with every prompt prefilled in one piece, all prompts in one batch."""
    results = {}
    for name in [*FAMILIES, LATENT]:
        with engine(name, max_num_batched_tokens=1024, enable_prefix_caching=False) as llm:
            results[name] = generate(llm)[0]
        assert [tokens for tokens, _ in results[name]] == [ids[:LONG] for ids in reference(name).generate(PROMPTS)]
    return results


def assert_same(name, found, expected):
    """To the last bit; but how many of a request's tokens a step has decides the form of latent attention, so that
    there another schedule may round differently."""
    if name != LATENT:
        assert found == expected
        return
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, values), (_, others) in zip(found, expected, strict=True):
        assert values == pytest.approx(others, abs=1e-4)


@pytest.mark.parametrize("name", [*FAMILIES, LATENT])
def test_chunked_prefill_changes_nothing(name, whole):
    with engine(name, max_num_batched_tokens=23, enable_prefix_caching=False) as llm:
        assert_same(name, generate(llm)[0], whole[name])


@pytest.mark.parametrize("name", [*FAMILIES, LATENT])
def test_a_request_alone_gives_what_it_gives_in_a_batch(name, whole):
    with engine(name, max_num_seqs=1, enable_prefix_caching=False) as llm:
        assert generate(llm)[0] == whole[name]


@pytest.mark.parametrize("name", [*FAMILIES, LATENT])
def test_prefix_cache_hits_change_nothing(name, whole):
    with engine(name, enable_prefix_caching=True) as llm:
        first, _ = generate(llm)
        second, outputs = generate(llm)
        assert max(output.num_cached_tokens for output in outputs) >= 64
    assert first == whole[name]
    assert_same(name, second, whole[name])


@pytest.mark.parametrize(("name", "blocks"), [("qwen3", 26), ("gemma2", 40), ("glm4-moe", 26), (LATENT, 26)])
def test_preemption_changes_nothing(name, blocks, whole):
    with engine(name, enable_prefix_caching=False, num_gpu_blocks_override=blocks, disable_log_stats=False) as llm:
        found, _ = generate(llm)
        preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preemptions > 0
    assert_same(name, found, whole[name])


@pytest.mark.parametrize("name", [*FAMILIES, LATENT])
def test_unfused_graphs_give_the_same_tokens(name, whole, monkeypatch):
    passes = "fuse_attention,fuse_mla,fuse_norm,fuse_residual,fuse_activation,fuse_moe"
    monkeypatch.setenv("VLLM_MS_DISABLE_PASSES", passes)
    attention = "mla_attention" if name == LATENT else "paged_attention"
    with engine(name, enable_prefix_caching=False) as llm:
        found, _ = generate(llm)
        assert statistics(llm)["model"]["operators"][f"vllm_ms.{attention}.default"] > 0
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in whole[name]]


def test_pynative_gives_what_the_graph_gives(whole):
    with engine("qwen3", enforce_eager=True, enable_prefix_caching=False) as llm:
        found, _ = generate(llm, PROMPTS[:5], 16)
        assert [graph["compiles"] for graph in statistics(llm).values()] == [0, 0]
    assert found == [(tokens[:16], values[:16]) for tokens, values in whole["qwen3"][:5]]


def test_a_mixed_workload_compiles_nothing_again():
    with engine("qwen3") as llm:
        for count, length in ((1, 1), (8, 3), (3, 200), (5, 40)):
            generate(llm, [PROMPTS[-1][:length]] * count, max_tokens=count)
        counts = {name: graph["compiles"] + graph["loads"] for name, graph in statistics(llm).items()}
    assert counts == {"model": 1, "logits": 1}
