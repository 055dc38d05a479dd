"""Two engines in one process, each with graphs, caches and settings of its own."""

import math

from tests.models.engine import engine, greedy
from tests.models.reference import PROMPTS, reference

PROMPT = PROMPTS[4]


def test_two_engines_do_not_disturb_each_other():
    with engine("qwen3") as first:
        alone = greedy(first, PROMPTS, 8)
        with engine("gemma3", block_size=32) as second:
            assert greedy(first, PROMPTS, 8) == alone
            assert greedy(second, [PROMPT], 8) == [ids[:8] for ids in reference("gemma3").generate([PROMPT])]
            assert greedy(first, PROMPTS, 8) == alone


def test_beam_search_finds_a_text_at_least_as_likely_as_greedy():
    from vllm.sampling_params import BeamSearchParams

    def log_likelihood(tokens: list[int]) -> float:
        rows = reference("qwen3").logits(PROMPT + tokens)[len(PROMPT) - 1 : -1].log_softmax(-1)
        return math.fsum(row[token].item() for token, row in zip(tokens, rows, strict=True))

    parameters = BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True)
    with engine("qwen3") as llm:
        (best_first,) = greedy(llm, [PROMPT], 6)
        beams = llm.beam_search([{"prompt_token_ids": PROMPT}], parameters)[0].sequences
    found = {tuple(beam.tokens[len(PROMPT) :]): beam.cum_logprob for beam in beams}
    assert len(found) == 4
    for tokens, total in found.items():
        assert abs(log_likelihood(list(tokens)) - total) < 1e-3
    assert max(found.values()) >= log_likelihood(best_first) - 1e-3
