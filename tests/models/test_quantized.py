"""Every family with int8 weights gives nearly Hugging Face's distributions: each way of loading a weight is covered."""

import pytest

from .engine import engine, prompt_logprobs, statistics
from .families import FAMILIES
from .reference import PROMPTS, reference

IDS = PROMPTS[5]
# vLLM's models that compute logits with the embedding itself (gemma2), or make a head without a quantization method.
EXACT_HEADS = ("gemma2", "opt", "opt-postnorm")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_int8_stays_close_to_hugging_face(name):
    expected = reference(name).logits(IDS)[:-1].log_softmax(-1)
    with engine(name, max_logprobs=-1, quantization="mindspore_int8") as llm:
        found = prompt_logprobs(llm, IDS, expected.shape[-1])
        operators = [graph["operators"] for graph in statistics(llm).values()]
    divergence = (expected.exp() * (expected - found)).sum(-1)
    # random routers choose between near equals: where one chooses another expert, that token's distribution is another
    routed = "vllm_ms.moe_route.default" in operators[0]
    assert (divergence.median() if routed else divergence.mean()) < 0.01
    assert "vllm_ms.linear_int8.default" in operators[0]
    exact = name in EXACT_HEADS or routed  # routers stay exact
    assert ["vllm_ms.linear.default" in graph for graph in operators] == [exact, name in EXACT_HEADS]
