"""Multi-head latent attention on CPU: right against float64, and bit for bit independent of what else is computed."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from tests.ops import attention_reference
from tests.ops.helpers import jit_with_dynamic_tokens, tensor
from tests.ops.mla_reference import Case, FusedCase, Sizes, expands, masks, tolerance
from vllm_mindspore.ops import registry

SIZES = {
    "deepseek": Sizes(16, 128, 64, 128, 512),
    "tiny": Sizes(4, 16, 8, 16, 48),
    "odd": Sizes(5, 20, 6, 28, 33),
    "one head": Sizes(1, 7, 2, 3, 96),
    "pairs": Sizes(7, 24, 32, 20, 64),
    "many heads": Sizes(130, 8, 8, 8, 40),
}
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32"),
          ("float32", "bfloat16")]  # fmt: skip
MIXED = [(1, 70), (5, 5), (0, 3), (66, 200), (1, 600), (1, 1), (3, 130)]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("cache", "weights"), DTYPES, ids="-".join)
def test_equal_to_float64(name, cache, weights):
    case = Case(SIZES[name], MIXED, cache=cache, weights=weights)
    np.testing.assert_allclose(case.run(), case.expected(), atol=tolerance(case), rtol=1e-5)


def test_the_steps_above_take_both_forms():
    for sizes in SIZES.values():
        forms = {expands(sizes, queries, keys) for queries, keys in MIXED if queries > 0}
        assert forms == {True, False}


@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
def test_block_sizes_of_float64(block_size):
    case = Case(SIZES["tiny"], MIXED, block_size=block_size)
    np.testing.assert_allclose(case.run(), case.expected(), atol=1e-5)


@pytest.mark.parametrize("requests", [[(1, 3500)], [(40, 3000)], [(700, 2600)], [(1, 512), (1, 513), (1, 1025)]])
@pytest.mark.parametrize("name", ["odd", "pairs"])
def test_long_contexts_of_float64(name, requests):
    for dtype in ("float32", "bfloat16"):
        case = Case(SIZES[name], requests, cache=dtype, weights=dtype)
        np.testing.assert_allclose(case.run(), case.expected(), atol=tolerance(case))


@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 1e4])
def test_sharp_and_flat_softmax_of_float64(magnitude):
    case = Case(SIZES["odd"], [(40, 700), (1, 130)], magnitude=magnitude)
    np.testing.assert_allclose(case.run(), case.expected(), atol=1e-5 + 3e-6 * magnitude)


def alone(case, request) -> np.ndarray:
    """What the request gives without the others."""
    first, last = case.step.query_start_loc[request : request + 2]
    single = Case.__new__(type(case))
    single.__dict__ = {**case.__dict__, "query": case.query[first:last]}
    single.step = attention_reference.Step(
        case.step.kv_cache, case.step.block_table[request : request + 1], np.array([0, last - first], np.int32),
        case.step.seq_lens[request : request + 1], case.step.block_size,
    )  # fmt: skip
    return single.run()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["tiny", "pairs", "many heads"])
def test_bits_do_not_depend_on_other_requests(name, dtype):
    case = Case(SIZES[name], [*MIXED, (1, 900), (200, 1100)], cache=dtype, weights=dtype)
    whole = case.run()
    for request, (first, last) in enumerate(
        zip(case.step.query_start_loc, case.step.query_start_loc[1:], strict=False)
    ):
        if first < last:
            np.testing.assert_array_equal(alone(case, request), whole[first:last])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "cuts"), [("pairs", [300, 301, 303, 304]), ("odd", [0, 210, 400, 600])])
def test_bits_do_not_depend_on_chunks_of_one_form(name, cuts, dtype):
    """Chunks that take the same form give the rows of the whole: absorbed in the first case, expanded in the second."""
    sizes = SIZES[name]
    begin, end = cuts[0], cuts[-1]
    case = Case(sizes, [(end - begin, end)], cache=dtype, weights=dtype)
    whole = case.run()
    forms = {expands(sizes, end - begin, end)}
    for low, high in zip(cuts, cuts[1:], strict=False):
        chunk = Case.__new__(Case)
        chunk.__dict__ = {**case.__dict__, "query": case.query[low - begin : high - begin]}
        start, lengths = np.array([0, high - low], np.int32), np.array([high], np.int32)
        chunk.step = attention_reference.Step(case.step.kv_cache, case.step.block_table, start, lengths, 16)
        forms.add(expands(sizes, high - low, high))
        np.testing.assert_array_equal(chunk.run(), whole[low - begin : high - begin])
    assert len(forms) == 1


FUSED = {
    "deepseek v2 lite": {},
    "deepseek v3, after the queries' latent": {"column": 36},
    "not rotated": {"rotated": False},
    "no norm": {"norm": False, "neox": True, "spare": 5},
    "half weights": {"cache": "float16", "weights": "float16", "norm_weights": "bfloat16"},
    "bf16": {"cache": "bfloat16", "weights": "bfloat16", "norm_weights": "bfloat16", "neox": True},
}


@pytest.mark.parametrize("options", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("name", ["tiny", "odd", "pairs"])
def test_fused_equal_to_float64(name, options):
    case = FusedCase(SIZES[name], MIXED, **options)
    out = case.run()
    precision = {"float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[case.cache_dtype]
    found = case.memory.astype(ms.float32).asnumpy()
    np.testing.assert_allclose(found, case.written(), atol=2e-6, rtol=precision)
    untouched = np.ones(len(found), bool)
    untouched[case.slots] = False
    np.testing.assert_array_equal(found[untouched], case.cache[untouched].astype(np.float32))
    np.testing.assert_allclose(out, case.expected(), atol=tolerance(case), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_bits_as_the_separate_operators(dtype):
    case = FusedCase(SIZES["pairs"], MIXED, norm=False, cache=dtype, weights=dtype)
    fused = case.run()
    sizes, positions, cos_sin = case.sizes, tensor(case.positions), tensor(case.cos_sin)
    rotate = registry.build("rotary", "cpu", (), head_size=sizes.rope, rotary_dim=sizes.rope, neox=False)
    heads = case.query.reshape(-1, sizes.heads, sizes.nope + sizes.rope).copy()
    heads[..., sizes.nope :] = rotate(positions, tensor(heads[..., sizes.nope :]), cos_sin).asnumpy()
    memory = tensor(case.cache, dtype)
    k_pe = rotate(positions, tensor(case.kv_a[:, sizes.lora :]), cos_sin)
    write = registry.build("mla_kv_write", "cpu")
    write(memory, tensor(case.kv_a[:, : sizes.lora]), k_pe, tensor(case.slots)).asnumpy()
    np.testing.assert_array_equal(memory.astype(ms.float32).asnumpy(), case.memory.astype(ms.float32).asnumpy())
    attend = registry.build("mla_attention", "cpu", (), **sizes.attributes(16, case.scale))
    separate = attend(tensor(heads), tensor(case.kv_b, dtype), memory, *case.state()).asnumpy()
    np.testing.assert_array_equal(separate, fused)


def test_padding_is_zero_and_skipped_slots_are_not_written():
    case = FusedCase(SIZES["tiny"], [(3, 20), (1, 9)])
    case.query, case.kv_a = (np.concatenate([t, np.ones((2, t.shape[1]), np.float32)]) for t in (case.query, case.kv_a))
    case.positions = np.concatenate([case.positions, [10**9, -5]])  # never read: these slots are skipped
    case.slots = np.concatenate([case.slots, [-1, -1]])
    case.slots[1] = -1
    out = case.run()
    assert not out[4:].any()
    case.positions[4:] = 0
    np.testing.assert_allclose(case.memory.asnumpy(), case.written(), atol=2e-6)
    np.testing.assert_allclose(out, case.expected(), atol=1e-5)


def test_no_tokens():
    for requests in ([], [(0, 5)]):
        assert FusedCase(SIZES["tiny"], requests).run().shape == (0, 64)


def test_profile_run():
    case = FusedCase(SIZES["tiny"], [(40, 40), (1, 1)])
    case.step.block_table[:] = 0
    case.slots[:] = -1
    before = case.memory.asnumpy().copy()
    assert np.isfinite(case.run()).all()
    np.testing.assert_array_equal(case.memory.asnumpy(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.slots.__setitem__(2, len(c.cache)), "slot_mapping has slot "),
        (lambda c: c.positions.__setitem__(2, 4000), "position 4000 of token 2"),
        (lambda c: c.step.block_table.__setitem__((1, 0), 10**6), "request 1: block_table has block 1000000"),
        (lambda c: c.__setattr__("kv_b", c.kv_b[:-1]), "kv_b: rows and heads"),
    ],
)
def test_impossible_steps_are_named_and_nothing_is_written(capfd, change, message):
    case = FusedCase(SIZES["tiny"], [(3, 20), (1, 9)])
    change(case)
    before = case.memory.asnumpy().copy()
    with pytest.raises(RuntimeError) as error:
        case.run()
    assert f"vllm_ms.mla_qkv_attention: {message}" in capfd.readouterr().err + str(error.value)
    np.testing.assert_array_equal(case.memory.asnumpy(), before)


@pytest.mark.parametrize(
    ("change", "message"), [({"v_dim": 0}, "v_dim"), ({"rope_dim": -1}, "rope_dim -1"), ({"rope_dim": 7}, "rope_dim 7")]
)
def test_impossible_attributes_are_rejected(change, message):
    attributes = {**SIZES["tiny"].attributes(16, 1.0), "kv_column": 0, "neox": False, "norm_eps": 1e-6,
                  "norm_offset": 0.0}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        registry.build("mla_qkv_attention", "cpu", ("cos_sin",), **{**attributes, **change})


@pytest.mark.parametrize(("begin", "end"), [(0, 5), (3, 7), (6, 7)])
def test_columns(begin, end):
    op = jit_with_dynamic_tokens(
        registry.build("columns", "cpu", begin=begin, end=end, parts=1), [tensor(np.zeros((2, 7)))], [0]
    )
    for rows in (1, 5, 4000):
        x = np.random.default_rng(0).standard_normal((rows, 7)).astype(np.float32)
        np.testing.assert_array_equal(op(tensor(x)).asnumpy(), x[:, begin:end])
    with pytest.raises(ValueError, match="columns 5 to 5"):
        registry.build("columns", "cpu", begin=5, end=5, parts=1)


@pytest.mark.parametrize(("begin", "end"), [(0, 5), (3, 7), (6, 7)])
def test_columns_of_each_part_of_a_row(begin, end):
    op = registry.build("columns", "cpu", begin=begin, end=end, parts=3)
    for rows in (0, 1, 5, 4000):
        x = np.random.default_rng(0).standard_normal((rows, 3, 7)).astype(np.float32)
        want = x[..., begin:end].reshape(rows, 3 * (end - begin))
        np.testing.assert_array_equal(op(tensor(x.reshape(rows, 21))).asnumpy(), want)
    with pytest.raises(RuntimeError, match=f"columns {begin} to {end} of 3 parts of 20"):
        op(tensor(np.zeros((2, 20)))).asnumpy()


def test_in_a_graph_with_any_number_of_tokens():
    case = FusedCase(SIZES["tiny"], MIXED, cache="bfloat16", weights="bfloat16")
    example = [tensor(case.query), tensor(case.kv_a), tensor(case.positions), tensor(case.cos_sin), tensor(case.gamma),
               tensor(case.kv_b, "bfloat16"), case.memory, tensor(case.slots), *case.state()]  # fmt: skip
    axes = [0, 0, 0, None, None, None, 0, 0, 0, 0, 0]
    net = jit_with_dynamic_tokens(case.operator(), example, axes)
    np.testing.assert_allclose(net(*example).asnumpy(), case.expected(), atol=tolerance(case))


@pytest.mark.parametrize("name", ["deepseek", "odd"])
def test_many_decodes_of_float64(name):
    """More queries in absorbed form than are taken at once."""
    case = Case(SIZES[name], [(1, 40)] * 70, cache="bfloat16", weights="bfloat16")
    np.testing.assert_allclose(case.run(), case.expected(), atol=tolerance(case))


TOP_K = [1, 50, 64, 130]


@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("name", ["tiny", "odd", "pairs"])
@pytest.mark.parametrize(("cache", "weights"), DTYPES[:2], ids="-".join)
def test_selected_positions_equal_to_float64(name, cache, weights, top_k):
    """Steps with requests of all kinds: none, some, and all queries with more keys than are selected."""
    case = Case(SIZES[name], MIXED, cache=cache, weights=weights).select(top_k)
    np.testing.assert_allclose(case.run(), case.expected(), atol=tolerance(case), rtol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "pairs"])
@pytest.mark.parametrize(("cache", "weights"), [*DTYPES[:2], ("bfloat16", "float32")], ids="-".join)
def test_masked_requests_equal_to_float64(name, cache, weights):
    """Queries with all their keys and with some of them in one request, or only such."""
    requests = [(150, 310), (1, 280), (60, 310), (5, 5)]
    assert [masks(SIZES[name], *request, 250) for request in requests] == [True, False, True, False]
    case = Case(SIZES[name], requests, cache=cache, weights=weights).select(250)
    np.testing.assert_allclose(case.run(), case.expected(), atol=tolerance(case), rtol=1e-5)


def test_the_steps_above_mask_some_requests_and_gather_latents_for_others():
    forms = {(k, masks(SIZES[n], *r, k)) for k in TOP_K for n in ("tiny", "odd", "pairs") for r in MIXED if r[1] > k}
    assert {(64, False), (130, True), (130, False)} <= forms


def test_selected_positions_of_deepseeks_sizes_and_long_contexts():
    requests = [(1, 3500), (2, 700), (1, 40), (600, 1300)]
    case = Case(SIZES["deepseek"], requests, cache="bfloat16", weights="bfloat16").select(600)
    assert masks(case.sizes, 600, 1300, 600)
    np.testing.assert_allclose(case.run(), case.expected(), atol=tolerance(case))


@pytest.mark.parametrize("top_k", [600, 900])
def test_as_many_positions_as_keys_are_attention_to_all(top_k):
    case = Case(SIZES["pairs"], MIXED, cache="bfloat16", weights="bfloat16")
    every = case.run()
    np.testing.assert_array_equal(case.select(top_k).run(), every)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_with_selected_positions_do_not_depend_on_other_requests(dtype):
    case = Case(SIZES["pairs"], [*MIXED, (1, 900), (200, 1100)], cache=dtype, weights=dtype).select(100)
    whole, chosen = case.run(), case.selected
    for request, (first, last) in enumerate(
        zip(case.step.query_start_loc, case.step.query_start_loc[1:], strict=False)
    ):
        if first < last:
            case.selected = chosen[first:last]
            np.testing.assert_array_equal(alone(case, request), whole[first:last])


@pytest.mark.parametrize("options", [{}, {"cache": "bfloat16", "weights": "bfloat16"}], ids=["float32", "bf16"])
def test_fused_with_selected_positions_equal_to_float64(options):
    case = FusedCase(SIZES["pairs"], MIXED, column=36, **options).select(50)
    out = case.run()
    np.testing.assert_allclose(out, case.expected(), atol=tolerance(case), rtol=1e-5)


@pytest.mark.parametrize("position", [-1.0, 130.0, np.nan])
def test_positions_that_are_no_keys_are_named(capfd, position):
    case = Case(SIZES["tiny"], [(2, 9), (3, 130)]).select(20)
    case.selected[4, 3] = position  # the last token of all
    with pytest.raises(RuntimeError) as error:
        case.run()
    assert "selected: not all positions of token 4 are in 0..129" in capfd.readouterr().err + str(error.value)
    case.selected[:2] = position  # have fewer keys: not read
    case.selected[4, 3] = 0
    assert np.isfinite(case.run()).all()
