"""The lightning indexer on CPU: the best keys by float64, ties to the lower position, whatever else is computed."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from tests.ops import attention_reference
from tests.ops.helpers import jit_with_dynamic_tokens, tensor
from tests.ops.indexer_reference import IndexerCase, check
from vllm_mindspore.ops import registry

# heads, head_dim, rope, top_k
SIZES = {
    "deepseek": (64, 128, 64, 96),
    "glm": (32, 128, 64, 64),
    "tiny": (3, 16, 8, 8),
    "odd": (5, 37, 6, 13),
    "one": (1, 7, 2, 1),
    "pairs": (7, 32, 32, 31),
}
MIXED = [(1, 70), (5, 5), (0, 3), (66, 200), (1, 600), (1, 1), (3, 130)]
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("cache", "weights"), DTYPES, ids="-".join)
def test_the_best_keys_of_float64(name, cache, weights):
    case = IndexerCase(*SIZES[name], MIXED, cache=cache, weights=weights, neox=name != "glm")
    found = case.run()
    assert check(found, case.scores(), case.top_k, case.tolerance()) > 40
    precision = {"float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[cache]
    memory = case.memory.astype(ms.float32).asnumpy()
    np.testing.assert_allclose(memory, case.written(), atol=2e-6, rtol=precision)
    untouched = np.ones(len(memory), bool)
    untouched[case.slots] = False
    np.testing.assert_array_equal(memory[untouched], case.cache[untouched].astype(np.float32))


@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_block_sizes(block_size):
    case = IndexerCase(*SIZES["odd"], MIXED, block_size=block_size)
    check(case.run(), case.scores(), case.top_k, case.tolerance())


@pytest.mark.parametrize("requests", [[(1, 8000)], [(3, 5000), (1, 4097)], [(700, 900)]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_contexts(requests, dtype):
    """More scores and queries than are kept at once."""
    case = IndexerCase(4, 32, 16, 256, requests, cache=dtype)
    assert check(case.run(), case.scores(), case.top_k, case.tolerance())


@pytest.mark.parametrize("top_k", [49, 50, 51])
def test_as_many_keys_as_are_selected(top_k):
    case = IndexerCase(4, 16, 8, top_k, [(1, 50), (3, 51)])
    found = case.run()
    check(found, case.scores(), top_k, case.tolerance())
    if top_k >= 50:
        np.testing.assert_array_equal(found[0, :50], np.arange(50))


def test_of_equal_scores_the_lower_positions():
    """Keys in three groups with one score each: the best, one that no head likes (0), and one below."""
    case = IndexerCase(2, 16, 8, 40, [(1, 100)])
    case.cos_sin = np.concatenate([np.ones((9000, 4)), np.zeros((9000, 4))], 1).astype(np.float32)  # no rotation
    kind = np.arange(100) % 5
    keys = np.where(kind[:, None] == 0, 1.0, np.where(kind[:, None] == 1, -1.0, 0.0)) * np.ones(16)
    case.cache[case.step.slots(0, 0, 100), 0] = keys
    case.memory = tensor(case.cache)
    case.query = np.concatenate([np.ones(16), -np.ones(16)])[None].astype(np.float32)
    case.key_weights[0, 16:] = (1.0, -1.0)
    case.gamma[:], case.beta[:] = 0, 0  # the token's own key is in the middle group, with what is 0
    positions = case.run()[0].astype(int)
    kind[99] = 2
    best, middle = np.flatnonzero(kind == 0), np.flatnonzero(kind > 1)
    np.testing.assert_array_equal(positions, np.sort(np.concatenate([best, middle[: 40 - len(best)]])))


def test_numbers_that_are_none_are_chosen_last():
    case = IndexerCase(2, 16, 8, 40, [(1, 100)])
    case.key_weights[0, 16:] = np.nan
    np.testing.assert_array_equal(case.run()[0], np.arange(40))


def alone(case, request) -> np.ndarray:
    """What the request gives without the others."""
    first, last = case.step.query_start_loc[request : request + 2]
    single = IndexerCase.__new__(IndexerCase)
    parts = {name: getattr(case, name)[first:last] for name in ("query", "key_weights", "positions", "slots")}
    single.__dict__ = {**case.__dict__, **parts, "memory": tensor(case.cache, case.cache_dtype)}
    single.step = attention_reference.Step(
        case.step.kv_cache, case.step.block_table[request : request + 1], np.array([0, last - first], np.int32),
        case.step.seq_lens[request : request + 1], case.step.block_size,
    )  # fmt: skip
    return single.run()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["odd", "pairs"])
def test_the_same_positions_whatever_else_is_in_the_step(name, dtype):
    """To the last bit: scores without a tolerance."""
    case = IndexerCase(*SIZES[name], [*MIXED, (40, 900)], cache=dtype)
    whole = case.run()
    for request, (first, last) in enumerate(
        zip(case.step.query_start_loc, case.step.query_start_loc[1:], strict=False)
    ):
        if first < last:
            np.testing.assert_array_equal(alone(case, request), whole[first:last])


def test_the_same_positions_however_a_prompt_is_cut():
    case = IndexerCase(*SIZES["pairs"], [(200, 200)], cache="bfloat16")
    whole, cuts = case.run(), [0, 20, 31, 32, 33, 150, 200]
    case.memory = tensor(case.cache, "bfloat16")
    for low, high in zip(cuts, cuts[1:], strict=False):
        chunk = IndexerCase.__new__(IndexerCase)
        parts = {name: getattr(case, name)[low:high] for name in ("query", "key_weights", "positions", "slots")}
        chunk.__dict__ = {**case.__dict__, **parts}
        start, lengths = np.array([0, high - low], np.int32), np.array([high], np.int32)
        chunk.step = attention_reference.Step(case.step.kv_cache, case.step.block_table, start, lengths, 16)
        np.testing.assert_array_equal(chunk.run(), whole[low:high])


def test_tokens_of_no_request_select_nothing_and_skipped_slots_are_not_written():
    case = IndexerCase(*SIZES["tiny"], [(3, 20), (1, 9)])
    for name in ("query", "key_weights"):
        values = getattr(case, name)
        setattr(case, name, np.concatenate([values, np.ones((2, values.shape[1]), np.float32)]))
    case.positions = np.concatenate([case.positions, [10**9, -5]])  # never read: these slots are skipped
    case.slots = np.concatenate([case.slots, [-1, -1]])
    case.slots[1] = -1
    found = case.run()
    assert (found[4:] == -1).all()
    case.positions[4:] = 0
    np.testing.assert_allclose(case.memory.asnumpy(), case.written(), atol=2e-6)
    check(found[:4], case.scores(), case.top_k, case.tolerance())


def test_no_tokens():
    for requests in ([], [(0, 5)]):
        assert IndexerCase(*SIZES["tiny"], requests).run().shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.slots.__setitem__(2, len(c.cache)), "slot_mapping has slot "),
        (lambda c: c.positions.__setitem__(2, 9000), "position 9000 of token 2"),
        (lambda c: c.step.block_table.__setitem__((1, 0), 10**6), "request 1: block_table has block 1000000"),
        (lambda c: c.__setattr__("key_weights", c.key_weights[:, 1:]), "key_weights: width and head_dim + num_heads"),
        (lambda c: c.__setattr__("gamma", c.gamma[1:]), "key_norm"),
    ],
)
def test_impossible_steps_are_named_and_nothing_is_written(capfd, change, message):
    case = IndexerCase(*SIZES["tiny"], [(3, 20), (1, 9)])
    change(case)
    before = case.memory.asnumpy().copy()
    with pytest.raises(RuntimeError) as error:
        case.run()
    assert f"vllm_ms.lightning_indexer: {message}" in capfd.readouterr().err + str(error.value)
    np.testing.assert_array_equal(case.memory.asnumpy(), before)


def test_impossible_attributes_are_rejected():
    attributes = IndexerCase(*SIZES["tiny"], [(1, 2)]).attributes()
    with pytest.raises(ValueError, match="'top_k': 0"):
        registry.build("lightning_indexer", "cpu", (), **{**attributes, "top_k": 0})


def test_in_a_graph_with_any_number_of_tokens():
    case = IndexerCase(*SIZES["pairs"], MIXED, cache="bfloat16", weights="bfloat16")
    operator = registry.build("lightning_indexer", "cpu", (), **case.attributes())
    axes = [0, 0, 0, None, None, None, 0, 0, 0, 0, 0]
    net = jit_with_dynamic_tokens(operator, case.inputs(), axes)
    check(net(*case.inputs()).asnumpy(), case.scores(), case.top_k, case.tolerance())
