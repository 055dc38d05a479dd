"""Data-parallel ranks that share a draft's experts take its steps together, with requests and without."""

from types import SimpleNamespace

import pytest
import torch

from vllm_mindspore.worker import draft

MAX_MODEL_LEN, OTHER_TOKENS = 6, 5


class Step:
    """Stands in for a draft's graph; notes how many tokens each step has here and over all ranks."""

    block_size = 4

    def __init__(self, exchanges_tokens: bool):
        self.exchanges_tokens, self.taken = exchanges_tokens, []

    def __call__(self, inputs, is_dummy: bool = False):
        ranks = None if inputs.token_ranks is None else inputs.token_ranks.tolist()
        self.taken.append((len(inputs.input_ids), ranks))
        return torch.zeros(inputs.num_reqs, 3), torch.eye(inputs.num_reqs, 7)


@pytest.fixture
def make(monkeypatch):
    """make(number of draft tokens, whether ranks share experts): a proposer on the second of two ranks, and what it has
    told the others."""

    def make(number: int, exchanges_tokens: bool = True):
        proposer, told = draft.DraftProposer.__new__(draft.DraftProposer), []

        def coordinate(num_tokens_unpadded: int, allow_microbatching: bool, parallel_config):
            told.append(num_tokens_unpadded)
            return False, torch.tensor([OTHER_TOKENS, num_tokens_unpadded], dtype=torch.int32), 0

        monkeypatch.setattr(draft, "coordinate_batch_across_dp", coordinate)
        proposer.vllm_config = SimpleNamespace(parallel_config=None)
        proposer.num_speculative_tokens, proposer.max_model_len, proposer.hidden_size = number, MAX_MODEL_LEN, 3
        proposer._enable_probabilistic_draft_probs = False
        proposer.step = Step(exchanges_tokens)
        return proposer, told

    return make


def propose(proposer, number: int) -> torch.Tensor:
    """For two requests, of three tokens and of one."""
    metadata = SimpleNamespace(
        query_start_loc=torch.tensor([0, 3, 4], dtype=torch.int32), seq_lens=torch.tensor([3, 1], dtype=torch.int32),
        block_table_tensor=torch.zeros(2, 2, dtype=torch.int32), slot_mapping=torch.zeros(4, dtype=torch.int64),
        max_seq_len=3,
    )  # fmt: skip
    return proposer.propose(
        number, torch.zeros(4, dtype=torch.int32), torch.tensor([0, 1, 2, 0]), torch.zeros(4, 3),
        torch.zeros(2, dtype=torch.int32), None, metadata, None,
    )  # fmt: skip


def of_all(own_tokens: int) -> list[int]:
    return [0] * OTHER_TOKENS + [1] * own_tokens


@pytest.mark.parametrize("number", [1, 2, 4])
def test_every_step_knows_the_tokens_of_all_ranks(number, make):
    proposer, told = make(number)
    assert propose(proposer, number).shape == (2, number)
    assert told == [4, 2][:number]
    assert proposer.step.taken == [(4, of_all(4)), *[(2, of_all(2))] * (number - 1)]


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "requests"), [(1, 1), (16, 3)])
def test_a_rank_without_requests_takes_as_many_steps(number, tokens, requests, make):
    proposer, told = make(number)
    proposer.dummy_run(tokens, use_cudagraphs=False)
    assert told == [tokens, requests][:number]
    assert proposer.step.taken == [(tokens, of_all(tokens)), *[(requests, of_all(requests))] * (number - 1)]


def test_ranks_that_share_nothing_tell_nothing(make):
    proposer, told = make(2, exchanges_tokens=False)
    propose(proposer, 2)
    proposer.dummy_run(1)
    assert told == [] and [ranks for _, ranks in proposer.step.taken] == [None] * 4
