"""Which drafted tokens are kept: greedy ones exactly, seeds and distributions as without drafts, with both samplers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from tests.worker.test_sampling import metadata, seeded
from vllm_mindspore.worker.rejection import MatchingSampler
from vllm_mindspore.worker.sampling import use_kernels

VOCAB = 13


def make(mode: str = "raw_logprobs") -> MatchingSampler:
    sampler = Sampler(logprobs_mode=mode)
    use_kernels(sampler)
    return MatchingSampler(sampler)


def drafted(drafts: list[list[int]]) -> SpecDecodeMetadata:
    """Requests with these drafts, whose rows of logits are one after the other."""
    counts, made = (
        np.array([len(draft) for draft in drafts]),
        SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu")),
    )
    ends = np.cumsum(counts + 1)
    made.bonus_logits_indices = torch.from_numpy(ends - 1)
    rows = [np.arange(end - 1 - count, end - 1) for end, count in zip(ends, counts, strict=True)]
    made.target_logits_indices = torch.from_numpy(np.concatenate(rows))
    return made


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def kept(sampler, drafts, logits, data, probabilities=None) -> list[list[int]]:
    before = logits.clone()
    output = sampler(drafted(drafts), probabilities, logits, data).sampled_token_ids
    assert torch.equal(before, logits)
    tokens, _ = sampler.parse_output(output, VOCAB)
    return tokens


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_greedy_tokens_up_to_the_first_wrong_draft(mode):
    logits = noise(9)
    best = logits.argmax(-1).tolist()
    wrong = (best[4] + 1) % VOCAB
    drafts = [[best[0], best[1]], [], [wrong, best[5]], [best[7]]]
    expected = [best[:3], best[3:4], best[4:5], best[7:9]]
    sampler = make(mode)
    assert kept(sampler, drafts, logits, metadata([0.0] * 4)) == expected
    # beside a request that samples
    tokens = kept(sampler, drafts, logits, metadata([0.0, 1.0, 0.0, 0.0]))
    assert [tokens[0], tokens[2], tokens[3]] == [expected[0], expected[2], expected[3]] and len(tokens[1]) == 1


def test_a_seed_gives_the_tokens_it_gives_without_drafts():
    """Draft after draft, right or wrong: what is kept is what one token after the other would have been."""
    limits = {"top_k": torch.tensor([9], dtype=torch.int32), "top_p": torch.tensor([0.9])}
    table, plain, sampler = noise(VOCAB, 1), make().sampler, make()
    generators, text = seeded(4), [3]
    for _ in range(60):
        text += plain(table[text[-1:]].clone(), metadata([0.8], generators, **limits)).sampled_token_ids[0].tolist()
    generators, found, accepted = seeded(4), [3], 0
    guesses = torch.Generator().manual_seed(5)
    while len(found) < len(text):
        draft = [text[len(found) + i] if torch.rand((), generator=guesses) < 0.7 else 0 for i in range(3)
                 if len(found) + i < len(text)]  # fmt: skip
        rows = table[[found[-1], *draft]]
        (tokens,) = kept(sampler, [draft], rows, metadata([0.8], generators, **limits))
        accepted += len(tokens) - 1
        found += tokens
    assert found[: len(text)] == text and 20 < accepted < 60


@pytest.mark.parametrize("kind", ["certain drafts", "certain drafts, vLLM's sampler", "probable drafts"])
def test_the_distribution_is_that_without_drafts(kind):
    """30,000 first tokens against the softmax that top-k leaves: chi-squared, p > 4e-5 with 7 degrees of freedom."""
    count, kept_tokens = 30_000, 8
    torch.manual_seed(11)
    row = noise(1, 3)[0]
    logits = row.repeat(2 * count, 1)
    limits = {"top_k": torch.full((count,), kept_tokens, dtype=torch.int32)}
    q = noise(1, 4)[0].softmax(-1)
    drafts = torch.multinomial(q, count, replacement=True) if kind.startswith("probable") else torch.full((count,), 5)
    row[5] = logits[:, 5] = row.max()  # drafted, and likely
    sampler = make("processed_logprobs" if "vLLM" in kind else "raw_logprobs")
    probabilities = q.repeat(count, 1) if kind.startswith("probable") else None
    output = sampler(drafted(drafts[:, None].tolist()), probabilities, logits, metadata([1.0] * count, **limits))
    first, second = output.sampled_token_ids.T
    assert ((second >= 0) == (first == drafts)).all()
    expected = row.masked_fill(row < row.topk(kept_tokens).values[-1], float("-inf")).softmax(-1).double()
    for tokens in (first, second[second >= 0]):
        observed, wanted = torch.bincount(tokens, minlength=VOCAB).double(), expected * len(tokens)
        assert (observed[wanted == 0] == 0).all()
        used = wanted > 0
        assert ((observed - wanted).square()[used] / wanted[used]).sum() < 31.8
    share = (second >= 0).double().mean()
    assert abs(share - torch.minimum(expected, q.double()).sum() if probabilities is not None else
               share - expected[5]) < 0.015  # fmt: skip


def test_penalties_and_masks_count_drafts_before_them():
    """A token that is drafted may not be repeated after itself, and a forbidden one is never chosen."""
    logits = torch.zeros(3, VOCAB)
    logits[:, 4], logits[:, 7], logits[:, 2] = 3.0, 2.5, 9.0
    mask = torch.zeros(1, VOCAB, dtype=torch.bool)
    mask[0, 2] = True
    data = metadata(
        [0.0],
        no_penalties=False,
        prompt_token_ids=torch.full((1, 1), VOCAB),
        presence_penalties=torch.tensor([1.0]),
        allowed_token_ids_mask=mask,
        spec_token_ids=[[4, 7]],
    )
    assert kept(make(), [[4, 7]], logits, data) == [[4, 7, 4]]  # 4: 2.0 after both, 7: 1.5


def test_logprobs_are_those_of_the_kept_tokens():
    logits = noise(5, 6)
    best = logits.argmax(-1).tolist()
    drafts = [[best[0], (best[1] + 1) % VOCAB], [best[3]]]
    sampler = make()
    output = sampler(drafted(drafts), None, logits, metadata([0.0, 0.0], max_num_logprobs=2))
    tokens, logprobs = sampler.parse_output(output.sampled_token_ids, VOCAB, logprobs_tensors=output.logprobs_tensors)
    assert tokens == [best[:2], best[3:5]]
    expected = logits.log_softmax(-1)
    rows = [0, 1, 3, 4]
    assert logprobs.logprob_token_ids[:, 0].tolist() == [best[row] for row in rows]
    assert np.allclose(logprobs.logprobs[:, 0], [expected[row, best[row]].item() for row in rows])
