"""/v1/completions: what users of the OpenAI API take for granted about sampling, stopping, probabilities and usage."""

import math

import pytest

from tests.support.server import NAME

PROMPT = "Return a new list containing the names of all files in the given directory."


@pytest.fixture(scope="module")
def greedy(complete):
    return complete(PROMPT, max_tokens=40, ignore_eos=True).choices[0]


def test_greedy_text_is_the_same_every_time(complete, greedy):
    again = complete(PROMPT, max_tokens=40, ignore_eos=True).choices[0]
    assert again.text == greedy.text and again.token_ids == greedy.token_ids
    assert len(greedy.token_ids) == 40 and greedy.finish_reason == "length"


def test_stream_concatenates_to_the_text_without_streaming(complete, greedy):
    chunks = list(complete(PROMPT, max_tokens=40, ignore_eos=True, stream=True))
    assert len(chunks) >= 20, "a stream arrives in many pieces"
    assert "".join(chunk.choices[0].text for chunk in chunks) == greedy.text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stream_of_several_choices_is_told_apart_by_index(complete):
    options = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 20, "ignore_eos": True}
    texts = [choice.text for choice in complete(PROMPT, **options).choices]
    streamed = ["", "", ""]
    for chunk in complete(PROMPT, stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts and len(set(texts)) == 3


def test_stream_reports_usage_when_asked(complete):
    chunks = list(complete(PROMPT, max_tokens=7, ignore_eos=True, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 7
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_prompts_answer_in_order_and_as_each_alone(complete):
    prompts = ["Return a", "The value of", "If the file", "import os\n"]
    together = complete(prompts, max_tokens=16)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    assert [c.text for c in together.choices] == [complete(p, max_tokens=16).choices[0].text for p in prompts]


def test_token_ids_are_a_prompt_too(complete, server, greedy):
    ids = server.tokens(PROMPT)
    assert complete(ids, max_tokens=40, ignore_eos=True).choices[0].text == greedy.text


def test_usage_counts_tokens(complete, server):
    usage = complete(PROMPT, max_tokens=9, ignore_eos=True).usage
    assert usage.prompt_tokens == len(server.tokens(PROMPT))
    assert usage.completion_tokens == 9 and usage.total_tokens == usage.prompt_tokens + 9


def test_cached_prefix_is_reported_and_changes_nothing(complete):
    prompt = "Cached prefix. " + PROMPT * 6
    first, second = (complete(prompt, cache_salt="once") for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 64
    assert second.choices[0].text == first.choices[0].text


def test_seed_repeats_and_another_seed_differs(complete):
    options = {"temperature": 1.0, "ignore_eos": True}
    texts = {seed: complete(PROMPT, seed=seed, **options).choices[0].text for seed in (1, 2, 3)}
    assert len(set(texts.values())) == 3
    assert complete(PROMPT, seed=2, **options).choices[0].text == texts[2]


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}], ids=lambda o: next(iter(o))
)
def test_a_sampler_narrowed_to_the_best_token_is_greedy(complete, options):
    greedy = complete(PROMPT, max_tokens=40, ignore_eos=True, temperature=0, logprobs=2).choices[0]
    choice = complete(PROMPT, max_tokens=40, ignore_eos=True, **{"temperature": 1.0, "seed": 3, **options}).choices[0]
    decided = len(greedy.token_ids)
    if "temperature" in options:  # vLLM takes 0.01 for anything lower: not enough to decide between close candidates
        gaps = [max(best.values()) - min(best.values()) for best in greedy.logprobs.top_logprobs]
        decided = next((i for i, gap in enumerate(gaps) if gap < 0.2), decided)
    assert decided > 5
    assert choice.token_ids[:decided] == greedy.token_ids[:decided]


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.2}], ids=lambda o: next(iter(o)))
def test_sampling_stays_within_its_limits(complete, options):
    answer = complete(PROMPT, temperature=1.0, seed=11, max_tokens=60, ignore_eos=True, logprobs=20, **options)
    logprobs = answer.choices[0].logprobs
    for chosen, candidates in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        better = sum(math.exp(value) for value in candidates.values() if value > chosen + 1e-4)
        best = max(candidates.values())
        assert {
            "top_k": sum(value > chosen + 1e-4 for value in candidates.values()) < options.get("top_k", 0),
            "top_p": better < options.get("top_p", 0) + 1e-3,
            "min_p": math.exp(chosen - best) >= options.get("min_p", 0) - 1e-3,
        }[next(iter(options))]


def test_logit_bias_forbids_and_forces(complete, greedy):
    first = greedy.token_ids[0]
    without = complete(PROMPT, max_tokens=1, logit_bias={str(first): -100}).choices[0].token_ids
    assert without != [first]
    forced = complete(PROMPT, max_tokens=5, ignore_eos=True, logit_bias={"300": 100}).choices[0].token_ids
    assert forced == [300] * 5


def test_repetition_penalty_makes_every_token_new(complete):
    allowed = list(range(1000, 1012))
    bias = {str(token): 100.0 for token in allowed}
    choice = complete("Return", max_tokens=12, ignore_eos=True, logit_bias=bias, repetition_penalty=1e6).choices[0]
    assert sorted(choice.token_ids) == allowed


def test_frequency_penalty_balances_what_it_may_choose_from(complete):
    options = {"max_tokens": 60, "ignore_eos": True, "allowed_token_ids": [1000, 1001]}
    free, penalized = (
        complete("Return", frequency_penalty=penalty, **options).choices[0].token_ids.count(1000) for penalty in (0, 2)
    )
    assert abs(penalized - 30) <= 12
    assert abs(penalized - 30) <= abs(free - 30)


def test_bad_words_do_not_appear(complete, greedy, server):
    words = [server.text([token]) for token in greedy.token_ids[:3]]
    choice = complete(PROMPT, max_tokens=40, bad_words=[word for word in words if word.strip()] or words).choices[0]
    assert choice.token_ids[0] != greedy.token_ids[0]
    assert not set(choice.token_ids) & set(greedy.token_ids[:1])


def test_stop_string_ends_the_text_before_it(complete, greedy):
    middle = len(greedy.text) // 2
    stop = greedy.text[middle : middle + 3]
    before = greedy.text[: greedy.text.index(stop)]
    choice = complete(PROMPT, max_tokens=40, ignore_eos=True, stop=[stop, "never to be seen"]).choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (before, "stop", stop)
    kept = complete(PROMPT, max_tokens=40, ignore_eos=True, stop=[stop], include_stop_str_in_output=True).choices[0]
    assert kept.text == before + stop
    streamed = complete(PROMPT, max_tokens=40, ignore_eos=True, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == before


def test_stop_token_ends_the_text(complete, greedy):
    stop = greedy.token_ids[10]
    length = greedy.token_ids.index(stop) + 1
    choice = complete(PROMPT, max_tokens=40, ignore_eos=True, stop_token_ids=[stop]).choices[0]
    assert choice.token_ids == greedy.token_ids[:length]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_min_tokens_holds_stopping_back(complete, greedy):
    stop = greedy.token_ids[0]
    choice = complete(PROMPT, max_tokens=40, min_tokens=20, stop_token_ids=[stop]).choices[0]
    assert len(choice.token_ids) >= 20 and stop not in choice.token_ids[:20]


def test_logprobs_of_greedy_text_are_the_highest(complete):
    logprobs = complete(PROMPT, logprobs=5, ignore_eos=True).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 24
    for token, chosen, candidates in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(candidates.values()) == candidates[token]
        assert sum(map(math.exp, candidates.values())) <= 1 + 1e-5
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_prompt_logprobs_agree_with_those_of_decoding(complete, server, greedy):
    """The logprob of a token is the same bits whether it was sampled or read as part of a prompt."""
    decoded = complete(PROMPT, max_tokens=40, ignore_eos=True, logprobs=1).choices[0]
    ids = server.tokens(PROMPT)
    read = complete(ids + decoded.token_ids, max_tokens=1, prompt_logprobs=0).choices[0].prompt_logprobs
    assert read[0] is None and len(read) == len(ids) + 40
    read_logprobs = [read[len(ids) + i][str(token)]["logprob"] for i, token in enumerate(decoded.token_ids)]
    assert read_logprobs == decoded.logprobs.token_logprobs


def test_echo_returns_the_prompt_and_its_logprobs(complete, server):
    options = {"echo": True, "logprobs": 0, "max_tokens": 4, "ignore_eos": True}
    choice = complete(PROMPT, return_token_ids=False, **options).choices[0]  # vLLM echoes token ids instead, if asked
    assert choice.text.startswith(PROMPT)
    prompt_length = len(server.tokens(PROMPT))
    assert len(choice.logprobs.token_logprobs) == prompt_length + 4 and choice.logprobs.token_logprobs[0] is None
    prompt_logprobs = complete(PROMPT, prompt_logprobs=0, max_tokens=1).choices[0].prompt_logprobs
    expected = [next(iter(entry.values()))["logprob"] for entry in prompt_logprobs[1:]]
    assert choice.logprobs.token_logprobs[1:prompt_length] == expected


def test_tokenize_and_detokenize_are_inverse(server):
    tokens = server.tokens(PROMPT)
    assert tokens and server.text(tokens) == PROMPT
    chat = server.http.post("/tokenize", json={"model": NAME, "messages": [{"role": "user", "content": PROMPT}]}).json()
    assert chat["count"] > len(tokens) and chat["max_model_len"] == 2048
