"""vLLM's sampler with our kernels: seeds decide alone, and requests of all kinds share a batch."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_mindspore.worker.sampling import uniforms, use_kernels

VOCAB = 997


def metadata(temperature: list[float], generators: dict | None = None, **changes) -> SamplingMetadata:
    rows = len(temperature)
    fields = dict(
        temperature=torch.tensor(temperature),
        all_greedy=not any(temperature),
        all_random=all(temperature),
        top_p=None,
        top_k=None,
        generators=generators or {},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(rows),
        presence_penalties=torch.zeros(rows),
        repetition_penalties=torch.ones(rows),
        output_token_ids=[[] for _ in range(rows)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    return SamplingMetadata(**{**fields, **changes})


@pytest.fixture
def sampler() -> Sampler:
    made = Sampler()
    use_kernels(made)
    return made


def seeded(*seeds: int) -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(seed) for row, seed in enumerate(seeds)}


def tokens(sampler: Sampler, logits: torch.Tensor, data: SamplingMetadata) -> list[int]:
    return sampler(logits.clone(), data).sampled_token_ids[:, 0].tolist()


def test_greedy_and_random_requests_share_a_batch(sampler):
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    limits = {
        "top_k": torch.tensor([VOCAB, 5, VOCAB, 1], dtype=torch.int32),
        "top_p": torch.tensor([1.0, 1.0, 0.5, 1.0]),
    }
    best = logits.argmax(-1).tolist()
    top5 = logits[1].topk(5).indices.tolist()
    drawn = [tokens(sampler, logits, metadata([0.0, 1.0, 1.0, 1.0], **limits)) for _ in range(200)]
    assert {row[0] for row in drawn} == {best[0]}
    assert {row[1] for row in drawn} == set(top5)
    assert len({row[2] for row in drawn}) > 50
    assert {row[3] for row in drawn} == {best[3]}
    assert tokens(sampler, logits, metadata([0.0] * 4)) == best


def test_a_seed_decides_whatever_else_is_in_the_batch(sampler):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        torch.rand(7)  # the default generator goes on
        mixed = tokens(sampler, logits, metadata([1.0] * 3, {1: torch.Generator().manual_seed(8)}))
        alone = tokens(sampler, logits[1:2], metadata([1.0], seeded(8)))
        assert mixed[1:2] == alone
    draws = {tuple(tokens(sampler, logits[1:2], metadata([1.0], seeded(seed)))) for seed in range(20)}
    assert len(draws) > 10


def test_only_requests_without_a_seed_use_the_default_generator():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert uniforms(2, seeded(1, 2)).tolist() == uniforms(2, seeded(1, 2)).tolist()
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (
        uniforms(3, {0: torch.Generator().manual_seed(1)}),
        uniforms(3, {0: torch.Generator().manual_seed(1)}),
    )
    assert first[0] == second[0] and (first[1:] != second[1:]).all()


def test_vllm_filters_itself_where_it_must_return_what_is_left():
    made = Sampler(logprobs_mode="processed_logprobs")
    use_kernels(made)
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(2))
    data = metadata([1.0, 1.0], top_k=torch.tensor([3, 3], dtype=torch.int32), max_num_logprobs=5)
    logprobs = made(logits.clone(), data).logprobs_tensors.logprobs
    assert (logprobs > float("-inf")).sum(-1).tolist() == [4, 4]  # the sampled one and the three that are left


def test_vllms_float64_noise_is_used_when_asked_for():
    made = Sampler(use_fp64_gumbel=True)
    before = made.topk_topp_sampler.forward
    use_kernels(made)
    assert made.topk_topp_sampler.forward == before
