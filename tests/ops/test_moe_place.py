"""Counting, placing and localising the experts that tokens chose, on CPU through MindSpore."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.helpers import tensor
from vllm_mindspore.ops import registry

EXPERTS, TOP_K = 11, 3


def routing(tokens: int) -> np.ndarray:
    """Random ids, a few of them no expert's, then weights."""
    rng = np.random.default_rng(tokens)
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)] or [np.zeros(0)]).reshape(tokens, TOP_K)
    ids[rng.random(ids.shape) < 0.1] = -1
    return np.concatenate([ids, rng.random((tokens, TOP_K))], 1).astype(np.float32)


@pytest.mark.parametrize("tokens", [0, 1, 2, 33, 300])
def test_tokens_of_each_expert_are_counted(tokens):
    chosen = routing(tokens)
    counts = registry.build("moe_count", "cpu", experts=EXPERTS)(tensor(chosen)).asnumpy()
    ids = chosen[:, :TOP_K].astype(int)
    assert counts.tolist() == np.bincount(ids[ids >= 0], minlength=EXPERTS).tolist()


@pytest.mark.parametrize("tokens", [0, 1, 2, 33, 300])
def test_tokens_take_the_places_of_an_expert_in_turn(tokens):
    expert_map = np.full((EXPERTS, 3), -1, np.int32)
    expert_map[:, 0] = np.random.default_rng(0).permutation(EXPERTS)
    expert_map[4, 1:] = 20, 21
    expert_map[6, 1] = 22
    expert_map[7] = -1  # nowhere
    chosen = routing(tokens)
    placed = registry.build("moe_place", "cpu")(tensor(chosen), tensor(expert_map)).asnumpy()
    assert np.array_equal(placed[:, TOP_K:], chosen[:, TOP_K:])
    for token, row in enumerate(chosen[:, :TOP_K].astype(int)):
        for j, expert in enumerate(row):
            places = [place for place in expert_map[expert] if place >= 0] if expert >= 0 else []
            assert placed[token, j] == (places[token % len(places)] if places else -1)


@pytest.mark.parametrize(("first", "count"), [(0, 11), (0, 4), (4, 4), (8, 4), (20, 5)])
def test_places_of_other_ranks_become_no_expert(first, count):
    chosen = routing(50)
    local = registry.build("moe_local", "cpu", first=first, count=count)(tensor(chosen)).asnumpy()
    ids = chosen[:, :TOP_K]
    assert np.array_equal(local[:, :TOP_K], np.where((ids >= first) & (ids < first + count), ids - first, -1))
    assert np.array_equal(local[:, TOP_K:], chosen[:, TOP_K:])
