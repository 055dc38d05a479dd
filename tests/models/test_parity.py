"""Every family, served unmodified from its class, against a model that is not vLLM's."""

import pytest
import torch

from vllm_mindspore.ops import columns

from .engine import engine, greedy, prompt_logprobs, statistics
from .families import FAMILIES
from .reference import MAX_TOKENS, PROMPTS, reference

# Close relatives of others in the table; `make test-slow` and `make support-table` run these too.
RELATIVES = ["llama-linear", "exaone3", "internlm3", "glm4-moe-lite", "axk1", "ling2", "hy-v3", "granite-moe-shared"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in RELATIVES else name for name in FAMILIES]
)
def test_float32_tokens_and_logits_equal_the_reference(name):
    expected = reference(name)
    ids = max(PROMPTS, key=len)
    with engine(name, max_logprobs=-1) as llm:
        tokens = greedy(llm, PROMPTS, MAX_TOKENS)
        compiled = {graph: values["compiles"] + values["loads"] for graph, values in statistics(llm).items()}
        logprobs = prompt_logprobs(llm, ids, expected.logits([5]).shape[-1])
        shared = {graph: (values["weights_shared"], values["weights"]) for graph, values in statistics(llm).items()}
    assert tokens == expected.generate(PROMPTS)
    assert (logprobs - expected.logits(ids)[:-1].log_softmax(-1)).abs().max() < 1e-4
    assert compiled == {"model": 1, "logits": 1}
    assert all(count == total for count, total in shared.values()), f"weights were copied: {shared}"


# One of each way to attend and to route; `make test-slow` and `make support-table` run all.
IN_BFLOAT16 = ["llama3", "qwen3", "gemma2", "opt", "falcon-alibi"]
IN_BFLOAT16 += ["deepseek-v3", "deepseek-v3-moe", "qwen3-moe", "gpt-oss", "pangu-pro-moe-v2"]
IN_BFLOAT16 += ["internlm2", "mimo-v2-flash"]
NOT_CODED = ["opt", "minicpm", "mimo-v2-flash"]  # their checkpoints' sizes are not multiples of 16


@pytest.mark.parametrize(
    "name", [name if name in IN_BFLOAT16 else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_bfloat16_divergence_is_not_above_hugging_faces_own(name):
    exact, rounded = reference(name), reference(name, "bfloat16")
    ids = max(PROMPTS, key=len)
    with engine(name, "bfloat16", max_logprobs=-1) as llm:
        ours = prompt_logprobs(llm, ids, exact.logits([5]).shape[-1])
        counts = statistics(llm)["model"]
    arranged, coded = counts["weights_in_columns"], counts["weights_coded"]
    assert bool(arranged) == columns.supported(), "in columns or not: that is tested here"
    assert bool(coded) == (bool(arranged) and name not in NOT_CODED)
    wanted = exact.logits(ids)[:-1].log_softmax(-1)
    theirs = rounded.logits(ids, torch.bfloat16)[:-1].log_softmax(-1)
    assert _divergence(wanted, ours) <= _divergence(wanted, theirs)


def _divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean over positions of KL(wanted || found), nats."""
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()
