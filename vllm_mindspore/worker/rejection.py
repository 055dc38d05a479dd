"""Which drafted tokens are kept: those that the model would have chosen itself.

A draft names one token, so sampling the model's token first and comparing afterwards gives the distribution of
rejection sampling (https://arxiv.org/abs/2211.17192 with a draft that is certain: accept x with probability p(x), else
draw from p without x). It needs one pass of our sampling kernel over all rows instead of a sort, a softmax and a matrix
of noise, and a request's seed gives the same tokens with drafts as without: a draw for a token that is not kept is
taken back.

Where vLLM must return processed logits or logprobs, uses its own float64 noise, or knows the draft's probabilities
(`draft_sample_method`: "probabilistic"), its own rejection sampler runs, on the kernels of `rejection_kernels.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler
from vllm.v1.sample.sampler import _SAMPLING_EPS
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_mindspore.ops.sampling import argmax, sample
from vllm_mindspore.worker import rejection_kernels
from vllm_mindspore.worker.sampling import draws_by_kernel


class MatchingSampler(RejectionSampler):
    """vLLM's rejection sampler for drafts that name one token at each position."""

    def __init__(self, *arguments):
        rejection_kernels.register()
        super().__init__(*arguments)

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """logits: [drafted tokens + requests, vocabulary] float32, a request's rows one after the other; unchanged.

        `sampled_token_ids` is [requests, 1 + the longest draft] int32: the drafted tokens that are kept, the one after
        them, then -1.
        """
        if draft_probs is not None or not draws_by_kernel(self.sampler):
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        rows = [drafted + 1 for drafted in metadata.num_draft_tokens]
        draws = None if sampling_metadata.all_greedy else Draws.of(rows, sampling_metadata.generators)
        chosen = self._chosen(metadata, logits, sampling_metadata, draws)
        kept = _kept(metadata, chosen)
        if draws is not None:
            draws.take_back(kept)
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                logits[metadata.target_logits_indices],
                logits[metadata.bonus_logits_indices],
                kept,
            )
        return SamplerOutput(sampled_token_ids=kept, logprobs_tensors=logprobs)

    def _chosen(
        self, metadata: SpecDecodeMetadata, logits: torch.Tensor, sampling: SamplingMetadata, draws: Draws | None
    ) -> torch.Tensor:
        """The model's own token at each row, given that the drafted ones before it are right: [rows] int64."""
        drafted, last = metadata.target_logits_indices.long(), metadata.bonus_logits_indices.long()
        processed = torch.empty(logits.shape)
        processed[drafted] = self.apply_logits_processors(logits[drafted], sampling, metadata)
        processed[last] = self.sampler.apply_logits_processors(logits[last], sampling, predict_bonus_token=True)
        if draws is None:
            return argmax(processed)
        request = torch.repeat_interleave(torch.tensor([drafted + 1 for drafted in metadata.num_draft_tokens]))
        temperature = sampling.temperature[request]
        greedy = temperature < _SAMPLING_EPS
        best = argmax(processed) if greedy.any() else None
        processed.div_(torch.where(greedy, 1.0, temperature).unsqueeze(1))
        top_k, top_p = (None if limit is None else limit[request] for limit in (sampling.top_k, sampling.top_p))
        drawn = sample(processed, top_k, top_p, draws.values)
        return drawn if best is None else torch.where(greedy, best, drawn)


@dataclass
class Draws:
    """A number in [0, 1) for each row of a step: float64, from the request's own generator where it has one."""

    values: torch.Tensor
    rows: list[int]
    before: dict[int, tuple[torch.Generator, torch.Tensor]]

    @classmethod
    def of(cls, rows: list[int], generators: dict[int, torch.Generator]) -> Draws:
        """rows: of each request. generators: by request, left where all its rows were drawn."""
        values, before = torch.rand(sum(rows), dtype=torch.float64), {}
        first = [0]
        for count in rows:
            first.append(first[-1] + count)
        for request, generator in generators.items():
            if rows[request] > 1:
                before[request] = generator, generator.get_state()
            for row in range(first[request], first[request + 1]):
                values[row] = torch.rand((), dtype=torch.float64, generator=generator)
        return cls(values, rows, before)

    def take_back(self, kept: torch.Tensor) -> None:
        """Leave the generators where the tokens of [requests, columns] `kept` leave them without drafts."""
        counts = (kept != PLACEHOLDER_TOKEN_ID).sum(dim=1).tolist()
        for request, (generator, state) in self.before.items():
            if counts[request] < self.rows[request]:
                generator.set_state(state)
                for _ in range(counts[request]):
                    torch.rand((), dtype=torch.float64, generator=generator)


def _kept(metadata: SpecDecodeMetadata, chosen: torch.Tensor) -> torch.Tensor:
    """chosen: [rows] → [requests, 1 + the longest draft] int32: tokens up to the first that was drafted otherwise."""
    tokens, drafts = chosen.tolist(), metadata.draft_token_ids.tolist()
    kept = torch.full((len(metadata.num_draft_tokens), metadata.max_spec_len + 1), PLACEHOLDER_TOKEN_ID)
    row = drafted = 0
    for request, count in enumerate(metadata.num_draft_tokens):
        right = 0
        while right < count and tokens[row + right] == drafts[drafted + right]:
            right += 1
        kept[request, : right + 1] = chosen[row : row + right + 1]
        row, drafted = row + count + 1, drafted + count
    return kept.int()
