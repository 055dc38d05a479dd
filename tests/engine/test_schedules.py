"""The same bits under every other way to schedule: what test_same_output.py shows one by one, combined and configured.

gemma3 has several KV cache groups of different windows, the hardest case of block tables and prefix caching.
"""

import pytest

from tests.models.engine import engine
from tests.models.reference import PROMPTS

MAX_TOKENS = 32
FAMILIES = ["qwen3", "gemma3"]


def generate(llm, prompts=PROMPTS, **options) -> list[tuple[list[int], list[dict[int, float]]]]:
    """(token ids, logprobs of the three best candidates of each) of every prompt, all submitted at once."""
    from vllm import SamplingParams

    defaults = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True, "logprobs": 3, "detokenize": False}
    parameters = SamplingParams(**{**defaults, **options})
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    return [
        (
            list(output.outputs[0].token_ids),
            [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs],
        )
        for output in outputs
    ]


def metric(llm, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


@pytest.fixture(scope="module")
def alone():
    """alone(family): what each prompt gives as the engine's only request, read in one step, with no prefix cached."""
    known = {}

    def of(family: str):
        if family not in known:
            with engine(family, max_num_seqs=1, enable_prefix_caching=False) as llm:
                known[family] = [generate(llm, [prompt])[0] for prompt in PROMPTS]
        return known[family]

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_prefix_cache_and_preemption_together(family, alone):
    expected = alone(family)  # before the engine below: one engine's end takes vLLM's process groups from another's
    blocks = {"qwen3": 24, "gemma3": 72}[family]
    options = {"max_num_batched_tokens": 16, "num_gpu_blocks_override": blocks, "disable_log_stats": False}
    with engine(family, enable_prefix_caching=True, **options) as llm:
        assert generate(llm) == expected
        assert generate(llm, PROMPTS[::-1]) == expected[::-1]
        assert metric(llm, "num_preemptions") > 0
        assert metric(llm, "prefix_cache_hits") > 0


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {"async_scheduling": True}),
        ("qwen3", {"async_scheduling": False}),
        ("qwen3", {"enable_chunked_prefill": False, "max_num_batched_tokens": 512}),
        ("qwen3", {"block_size": 1}),
        ("qwen3", {"block_size": 64}),
        ("gemma3", {"disable_hybrid_kv_cache_manager": True}),
        ("qwen3", {"distributed_executor_backend": "mp"}),
    ],
    ids=["async", "sync", "whole prompts", "blocks of 1", "blocks of 64", "one KV cache group", "worker process"],
)
def test_configured(family, options, alone):
    expected = alone(family)
    with engine(family, enable_prefix_caching=False, **options) as llm:
        assert generate(llm) == expected


def test_prompt_logprobs_read_in_chunks_beside_other_requests(alone):
    def prompt_logprobs(**options):
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2, detokenize=False)
        with engine("qwen3", **options) as llm:
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], parameters, use_tqdm=False)
        return [
            [{token: entry.logprob for token, entry in (step or {}).items()} for step in output.prompt_logprobs]
            for output in outputs
        ]

    assert prompt_logprobs(max_num_seqs=1) == prompt_logprobs(max_num_batched_tokens=16)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"], ids=["our draw", "vLLM's draw"])
def test_a_seed_gives_the_same_tokens_however_the_prompt_is_cut(mode):
    """Rows of unfinished prompts take part in sampling, but must not use up their generators."""

    def tokens(**options):
        with engine("qwen3", logprobs_mode=mode, **options) as llm:
            return [ids for ids, _ in generate(llm, temperature=1.0, seed=5, top_p=0.95)]

    assert tokens(max_num_batched_tokens=16) == tokens(max_num_seqs=1)


def test_a_mixed_workload_compiles_nothing():
    """Counted by MindSpore itself, over prefill, decode, mixed steps, one row and many, sampling and logprobs."""
    from vllm_mindspore.compiler.program import compiled_graphs

    with engine("qwen3", enable_prefix_caching=True, max_num_batched_tokens=64) as llm:
        before = compiled_graphs()
        assert before >= 2, "the model's graph and that of the logits"
        for prompts, options in (
            (PROMPTS[:1], {"max_tokens": 1}),
            (PROMPTS, {}),
            (PROMPTS[-1:], {"prompt_logprobs": 1, "max_tokens": 3}),
            (PROMPTS[2:5] * 4, {"temperature": 1.0, "seed": 1, "max_tokens": 9}),
            ([[7] * 200], {"max_tokens": 40}),
        ):
            generate(llm, prompts, **options)
        calls = llm.collective_rpc("graph_statistics")[0]["model"]["calls"]
        assert compiled_graphs() == before
    assert calls > 60
