"""`LLM(...)` in a script: the sampler's arithmetic on our logits, to the last bit, and the methods people call."""

import pytest

from tests.models.engine import engine
from tests.models.reference import PROMPTS, reference

PROMPT = PROMPTS[4]
FAVOURITE, BIAS = 500, 60.0


@pytest.fixture(scope="module")
def llm():
    """Reports the logits that the sampler has made of the model's, so that penalties can be seen."""
    with engine("qwen3", logprobs_mode="processed_logits", max_logprobs=50) as llm:
        yield llm


def sample(llm, prompts=(PROMPT,), **options):
    from vllm import SamplingParams

    parameters = SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **options})
    return llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], parameters, use_tqdm=False)


def favourites_logits(llm, **options) -> list[float]:
    """The processed logit of a token that is biased to win every step."""
    output = sample(llm, logprobs=1, logit_bias={FAVOURITE: BIAS}, **options)[0].outputs[0]
    assert list(output.token_ids) == [FAVOURITE] * 8
    return [step[FAVOURITE].logprob for step in output.logprobs]


def test_greedy_logits_are_the_references(llm):
    tokens = reference("qwen3").generate([PROMPT])[0][:8]
    output = sample(llm, logprobs=5)[0].outputs[0]
    assert list(output.token_ids) == tokens
    expected = reference("qwen3").logits(PROMPT + tokens)[len(PROMPT) - 1 : -1]
    for step, row in zip(output.logprobs, expected, strict=True):
        for token, entry in step.items():
            assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)


def test_presence_and_frequency_penalties_are_subtracted_from_the_logits(llm):
    plain = favourites_logits(llm)
    penalized = favourites_logits(llm, presence_penalty=1.5, frequency_penalty=0.25)
    expected = [value - (1.5 * (i > 0) + 0.25 * i) for i, value in enumerate(plain)]
    assert penalized == pytest.approx(expected, abs=1e-5)


def test_repetition_penalty_divides_a_positive_logit(llm):
    """Penalties come after the bias; a token of the prompt or of the text so far is penalized."""
    plain = favourites_logits(llm)
    assert FAVOURITE not in PROMPT and min(plain) > 0
    penalized = favourites_logits(llm, repetition_penalty=1.25)
    assert penalized == pytest.approx([value / (1.25 if i else 1.0) for i, value in enumerate(plain)], rel=1e-5)


def test_sampled_frequencies_follow_the_probabilities(llm):
    """400 samples of one token: each of the best five is drawn as often as its probability says, within 4 sigma."""
    count = 400
    logits = reference("qwen3").logits(PROMPT)[-1]
    probabilities = logits.softmax(-1)
    drawn = [o.token_ids[0] for o in sample(llm, temperature=1.0, max_tokens=1, n=count, seed=9)[0].outputs]
    for token in probabilities.topk(5).indices.tolist():
        p = probabilities[token].item()
        assert abs(drawn.count(token) - p * count) <= 4 * (p * (1 - p) * count) ** 0.5 + 1


def test_several_samples_of_a_prompt_differ_and_repeat_with_the_seed(llm):
    first, second = ([tuple(o.token_ids) for o in sample(llm, temperature=1.0, n=6, seed=3)[0].outputs] for _ in "ab")
    assert first == second and len(set(first)) == 6


def test_requests_with_different_parameters_share_a_batch(llm):
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    sampled = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True, top_k=40, min_p=0.01)
    mixed = llm.generate(prompts, [greedy, sampled] * 4, use_tqdm=False)
    for i, parameters in ((0, greedy), (1, sampled), (6, greedy), (7, sampled)):
        alone = llm.generate(prompts[i], parameters, use_tqdm=False)[0]
        assert alone.outputs[0].token_ids == mixed[i].outputs[0].token_ids


def test_chat_text_and_token_prompts_are_the_same(llm):
    messages = [{"role": "user", "content": "What is a list?"}]
    tokenizer = llm.get_tokenizer()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    by_chat = llm.chat(messages, greedy, use_tqdm=False)[0]
    by_ids = llm.generate({"prompt_token_ids": ids}, greedy, use_tqdm=False)[0]
    assert by_chat.prompt_token_ids == ids
    assert by_chat.outputs[0].text == by_ids.outputs[0].text == tokenizer.decode(by_ids.outputs[0].token_ids)


def test_the_prefix_cache_can_be_reset(llm):
    prompt = [PROMPTS[-1][::-1]]
    sample(llm, prompt)
    assert sample(llm, prompt)[0].num_cached_tokens >= 128
    assert llm.reset_prefix_cache()
    assert sample(llm, prompt)[0].num_cached_tokens == 0


@pytest.mark.parametrize(
    "prompt", [[], [10**6], [5] * 300, [-1]], ids=["empty", "out of the vocabulary", "too long", "negative"]
)
def test_a_bad_prompt_is_an_error_and_the_engine_goes_on(llm, prompt):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError):
        sample(llm, [prompt])
    assert len(sample(llm)[0].outputs[0].token_ids) == 8


def test_embeddings_are_refused(llm):
    with pytest.raises(ValueError):
        llm.embed([{"prompt_token_ids": PROMPT}])
