"""paged_attention on CPU: right against float64, and bit for bit independent of what else is computed with it."""

from __future__ import annotations

import dataclasses
import itertools

import mindspore as ms
import numpy as np
import pytest

from tests.ops import attention_reference as reference
from vllm_mindspore.ops import registry

DTYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16}
STEP = [(5, 5), (1, 70), (0, 3), (66, 200), (1, 600), (1, 1)]  # (query length, sequence length)


def tensor(array, dtype=None):
    t = ms.Tensor(np.ascontiguousarray(array))
    return t if dtype is None else t.astype(DTYPES[dtype])


def stored(array, dtype):
    """The values of `array` as they are in `dtype`."""
    return tensor(array, dtype).astype(ms.float32).asnumpy()


def run(
    query, step, num_heads, dtype="float32", scale=None, sliding_window=0, soft_cap=0.0, sinks=None, alibi=None,
    sink_kv=None,
):  # fmt: skip
    num_kv_heads, head_size = step.kv_cache.shape[1], int(np.prod(query.shape[1:])) // num_heads
    optional = {"sinks": sinks, "alibi_slopes": alibi, "sink_kv": sink_kv}
    present = tuple(name for name, value in optional.items() if value is not None)
    op = registry.build(
        "paged_attention",
        "cpu",
        present,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        scale=head_size**-0.5 if scale is None else scale,
        block_size=step.block_size,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    tensors = [tensor(query), tensor(step.kv_cache, dtype)]
    tensors += [tensor(t) for t in (step.block_table, step.query_start_loc, step.seq_lens)]
    types = {"sink_kv": dtype}  # as the cache
    return op(*tensors, *(tensor(optional[name], types.get(name)) for name in present)).asnumpy()


def make(rng, requests, num_heads, num_kv_heads, head_size, block_size=16, dtype="float32", value_size=None):
    step = reference.make_step(rng, requests, block_size, num_kv_heads, head_size, value_size=value_size)
    step.kv_cache = stored(step.kv_cache, dtype)
    query = rng.standard_normal((step.num_tokens, num_heads, head_size)).astype(np.float32)
    return step, query


def expect(query, step, scale=None, alibi=None, **features):
    num_heads, head_size = query.shape[1:]
    scale = head_size**-0.5 if scale is None else scale
    return reference.attention(query, step, num_heads, scale, alibi_slopes=alibi, **features)


def feature_cases():
    """Every head size with every combination of features at least once, the other dimensions in rotation."""
    shapes = itertools.cycle([(4, 4), (8, 2), (7, 1), (6, 2), (16, 1), (10, 5), (3, 3)])
    blocks = itertools.cycle([16, 32, 1, 7, 128])
    dtypes = itertools.cycle(DTYPES)
    windows = itertools.cycle([0, 1, 17, 64, 300])
    sizes = itertools.cycle([64, 80, 96, 112, 128, 256, 20, 33, 1])
    for caps, sinks, alibi in itertools.product([0.0, 30.0], [False, True], [False, True]):
        for _ in range(5):
            yield next(sizes), next(shapes), next(blocks), next(dtypes), next(windows), caps, sinks, alibi


@pytest.mark.parametrize("head_size,heads,block_size,dtype,window,soft_cap,sinks,alibi", feature_cases())
def test_equal_to_float64(head_size, heads, block_size, dtype, window, soft_cap, sinks, alibi):
    num_heads, num_kv_heads = heads
    rng = np.random.default_rng(head_size * num_heads + block_size)
    step, query = make(rng, STEP, num_heads, num_kv_heads, head_size, block_size, dtype)
    features = {
        "sliding_window": window,
        "soft_cap": soft_cap,
        "sinks": rng.standard_normal(num_heads).astype(np.float32) * 3 if sinks else None,
        "alibi": (2.0 ** -rng.uniform(0, 8, num_heads)).astype(np.float32) if alibi else None,
    }
    out = run(query, step, num_heads, dtype, **features)
    atol = max(2e-6, reference.rounding(dtype, head_size))
    np.testing.assert_allclose(out, expect(query, step, **features), atol=atol, rtol=1e-5)


VALUE_SIZES = [(192, 128), (64, 32), (96, 33), (33, 20), (20, 16), (16, 1), (2, 1), (128, 80)]


@pytest.mark.parametrize("head_size,value_size", VALUE_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,window", [((8, 2), 0), ((16, 1), 17), ((3, 3), 0)])
def test_values_narrower_than_keys_equal_to_float64(head_size, value_size, dtype, heads, window):
    num_heads, num_kv_heads = heads
    rng = np.random.default_rng(head_size * num_heads)
    step, query = make(rng, STEP, num_heads, num_kv_heads, head_size, 16, dtype, value_size)
    out = run(query, step, num_heads, dtype, sliding_window=window)
    atol = max(2e-6, reference.rounding(dtype, head_size, value_size))
    np.testing.assert_allclose(out, expect(query, step, sliding_window=window), atol=atol, rtol=1e-5)


def learned(rng, num_sinks, num_kv_heads, width, dtype):
    return stored(rng.standard_normal((num_sinks, num_kv_heads, width)).astype(np.float32), dtype)


@pytest.mark.parametrize("head_size,heads", [(64, (8, 2)), (32, (3, 3)), (192, (16, 1)), (33, (6, 2)), (1, (4, 1))])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_sinks,block_size", [(1, 16), (13, 7), (128, 16), (700, 32)])
def test_learned_keys_and_values_equal_to_float64(head_size, heads, dtype, num_sinks, block_size):
    num_heads, num_kv_heads = heads
    rng = np.random.default_rng(head_size * num_heads + num_sinks)
    step, query = make(rng, STEP, num_heads, num_kv_heads, head_size, block_size, dtype)
    features = {"sink_kv": learned(rng, num_sinks, num_kv_heads, 2 * head_size, dtype)}
    if num_sinks == 13:
        features |= {"soft_cap": 20.0, "sinks": rng.standard_normal(num_heads).astype(np.float32)}
    out = run(query, step, num_heads, dtype, **features)
    atol = max(2e-6, reference.rounding(dtype, head_size))
    np.testing.assert_allclose(out, expect(query, step, **features), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_keys_give_the_bits_of_the_same_keys_in_the_cache(dtype):
    """A request that begins with them, alone and cut into chunks."""
    rng = np.random.default_rng(4)
    sinks, requests = 37, [(66, 500), (1, 900)]
    step, query = make(rng, requests, 4, 2, 64, dtype=dtype)
    sink_kv = learned(rng, sinks, 2, 128, dtype)
    longer = reference.make_step(rng, [(n, sinks + length) for n, length in requests], 16, 2, 64)
    for request, (_, length) in enumerate(requests):
        longer.kv_cache[longer.slots(request, 0, sinks)] = sink_kv
        longer.kv_cache[longer.slots(request, sinks, sinks + length)] = step.kv_cache[step.slots(request, 0, length)]
    out = run(query, step, 4, dtype, sink_kv=sink_kv)
    assert np.array_equal(out, run(query, longer, 4, dtype))
    first = dataclasses.replace(
        step, query_start_loc=np.array([0, 20, 20], np.int32), seq_lens=np.array([454, 900], np.int32)
    )
    assert np.array_equal(out[:20], run(query[:20], first, 4, dtype, sink_kv=sink_kv))


@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 1e4])
def test_sharp_and_flat_softmax(magnitude):
    rng = np.random.default_rng(1)
    step, query = make(rng, [(40, 700), (1, 130)], 4, 2, 64)
    query *= magnitude
    # one rounding of a logit of size m moves a weight by m * 2^-24
    logits = 8 * magnitude
    np.testing.assert_allclose(run(query, step, 4), expect(query, step), atol=2e-6 + 1e-6 * logits)


def test_weights_in_half_precision():
    rng = np.random.default_rng(2)
    step, query = make(rng, STEP, 4, 2, 32)
    sinks, alibi = stored(rng.standard_normal(4), "bfloat16"), stored(rng.standard_normal(4) / 9, "float16")
    op = registry.build(
        "paged_attention", "cpu", ("sinks", "alibi_slopes"), num_heads=4, num_kv_heads=2, head_size=32, scale=0.2,
        block_size=16, sliding_window=0, soft_cap=0.0,
    )  # fmt: skip
    state = [tensor(t) for t in (step.kv_cache, step.block_table, step.query_start_loc, step.seq_lens)]
    out = op(tensor(query), *state, tensor(sinks, "bfloat16"), tensor(alibi, "float16")).asnumpy()
    np.testing.assert_allclose(out, expect(query, step, 0.2, sinks=sinks, alibi=alibi), atol=2e-6)


FEATURES = {
    "plain": {},
    "window": {"sliding_window": 90},
    "all": {
        "sliding_window": 300,
        "soft_cap": 20.0,
        "sinks": np.array([1, -1, 0, 2], np.float32),
        "alibi": np.array([0.1, 0.01, 0.3, -0.001], np.float32),
    },
}


def pick(step, query, request, begin, end):
    """A step of one request, with the queries of positions [begin, end) only."""
    length = int(step.seq_lens[request])
    first = int(step.query_start_loc[request + 1]) - length  # token of position 0
    one = reference.Step(
        step.kv_cache,
        step.block_table[request : request + 1],
        np.array([0, end - begin], np.int32),
        np.array([end], np.int32),
        step.block_size,
    )
    return one, query[first + begin : first + end]


@pytest.mark.parametrize(
    "dtype,head_size,features",
    [("float32", 64, "plain"), ("bfloat16", 80, "window"), ("bfloat16", 128, "all"), ("float16", 20, "all")],
)
def test_bits_do_not_depend_on_batch_or_chunks(dtype, head_size, features):
    features = FEATURES[features]
    rng = np.random.default_rng(3)
    # request -> where its queries are cut
    cuts = {(1300, 1300): (1000, 1129, 1130), (1, 1): (), (75, 75): (13, 26, 64), (33, 400): (1,), (1, 2000): ()}
    step, query = make(rng, list(cuts), 4, 2, head_size, 16, dtype)
    batch = run(query, step, 4, dtype, **features)
    for request, ((queries, length), inner) in enumerate(cuts.items()):
        first, before = int(step.query_start_loc[request]), length - queries
        for begin, end in [(0, queries), *itertools.pairwise((0, *inner, queries))]:
            one, part = pick(step, query, request, before + begin, before + end)
            np.testing.assert_array_equal(run(part, one, 4, dtype, **features), batch[first + begin : first + end])


def test_prefill_and_decode_give_the_same_bits():
    rng = np.random.default_rng(4)
    step, query = make(rng, [(700, 700)], 8, 1, 64, 16, "bfloat16")
    whole = run(query, step, 8, "bfloat16")
    for position in (0, 1, 63, 64, 65, 511, 512, 513, 640, 699):
        one, part = pick(step, query, 0, position, position + 1)
        np.testing.assert_array_equal(run(part, one, 8, "bfloat16"), whole[position : position + 1])


def test_unseen_slots_leave_no_trace():
    rng = np.random.default_rng(5)
    requests = [(40, 90), (1, 33)]
    step, query = make(rng, requests, 4, 2, 48)
    clean = run(query, step, 4, sliding_window=20)
    seen = np.zeros(len(step.kv_cache), bool)
    for request, (queries, length) in enumerate(requests):
        seen[step.slots(request, max(0, length - queries - 19), length)] = True
    for garbage in (np.nan, np.inf, 3e38):
        step.kv_cache[~seen] = garbage
        np.testing.assert_array_equal(run(query, step, 4, sliding_window=20), clean)


def test_later_tokens_leave_no_trace():
    rng = np.random.default_rng(6)
    step, query = make(rng, [(100, 100)], 4, 2, 64)
    clean = run(query, step, 4)
    step.kv_cache[step.slots(0, 77, 100)] = np.nan
    out = run(query, step, 4)
    np.testing.assert_array_equal(out[:77], clean[:77])
    assert np.isnan(out[77:]).all()


def test_nan_query_stays_in_its_row():
    rng = np.random.default_rng(7)
    step, query = make(rng, [(9, 600), (1, 5)], 4, 2, 64)
    clean = run(query, step, 4).reshape(10, 4, 64)
    query[3, 1] = np.nan
    out = run(query, step, 4).reshape(10, 4, 64)
    assert np.isnan(out[3, 1]).all()
    out[3, 1] = clean[3, 1]
    np.testing.assert_array_equal(out, clean)


def test_no_tokens_no_requests_and_padding():
    rng = np.random.default_rng(8)
    step, query = make(rng, [], 4, 2, 64)
    assert run(query.reshape(0, 256), step, 4).shape == (0, 256)
    padded = rng.standard_normal((5, 4, 64)).astype(np.float32)
    assert not run(padded, step, 4).any()
    step, query = make(rng, [(0, 10), (3, 3), (0, 0), (0, 7)], 4, 2, 64)
    out = run(np.concatenate([query, padded]), step, 4)
    np.testing.assert_allclose(out[:3], expect(query, step), atol=2e-6)
    assert not out[3:].any()


def test_profile_run_with_block_tables_of_zeros():
    rng = np.random.default_rng(9)
    step, query = make(rng, [(40, 40), (1, 300)], 4, 2, 64)
    step.block_table[:] = 0
    np.testing.assert_allclose(run(query, step, 4), expect(query, step), atol=2e-6)


def test_query_of_rank_two_and_three_are_the_same():
    rng = np.random.default_rng(10)
    step, query = make(rng, STEP, 4, 2, 64)
    np.testing.assert_array_equal(run(query, step, 4), run(query.reshape(-1, 256), step, 4))


def test_long_context():
    rng = np.random.default_rng(11)
    step, query = make(rng, [(2, 32768), (1, 5000)], 2, 1, 64, 32, "bfloat16")
    out = run(query, step, 2, "bfloat16")
    # a mean over thousands of values: so are the errors of rounding
    np.testing.assert_allclose(out, expect(query, step), atol=max(2e-6, reference.rounding("bfloat16", 64) / 20))


def broken(step, name):
    if name == "block too high":
        step.block_table[1, 1] = len(step.kv_cache) // step.block_size
    elif name == "block negative":
        step.block_table[1, 0] = -1
    elif name == "table too narrow":
        step.seq_lens[1] = step.block_table.shape[1] * step.block_size + 1
    elif name == "fewer keys than queries":
        step.seq_lens[1] = 1
    elif name == "tokens beyond the query":
        step.query_start_loc[2] += 1
    elif name == "query_start_loc descends":
        step.query_start_loc[1] = step.query_start_loc[2] + 1


@pytest.mark.parametrize(
    "name,value",
    [
        ("block too high", "block 10,"),
        ("block negative", "block -1,"),
        ("table too narrow", "seq_lens 65 "),
        ("fewer keys than queries", "seq_lens 1 "),
        ("tokens beyond the query", "2..5 "),
        ("query_start_loc descends", "0..5 "),
    ],
)
def test_impossible_steps_are_named(capfd, name, value):
    rng = np.random.default_rng(12)
    step, query = make(rng, [(2, 40), (2, 60)], 4, 2, 64)
    assert len(step.kv_cache) == 160
    broken(step, name)
    with pytest.raises(RuntimeError):
        run(query, step, 4)
    message = capfd.readouterr().err
    assert "vllm_ms.paged_attention: request" in message
    assert value in message


@pytest.mark.parametrize(
    "change", [{"num_heads": 5}, {"block_size": 0}, {"sliding_window": -1}, {"soft_cap": -1.0}, {"head_size": 0}]
)
def test_impossible_attributes_are_rejected(change):
    attributes = {
        "num_heads": 4, "num_kv_heads": 2, "head_size": 64, "scale": 1.0, "block_size": 16, "sliding_window": 0,
        "soft_cap": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=next(iter(change))):
        registry.build("paged_attention", "cpu", (), **{**attributes, **change})


@pytest.mark.parametrize("present,window", [(("alibi_slopes", "sink_kv"), 0), (("sink_kv",), 5)])
def test_learned_keys_have_no_position(present, window):
    attributes = dict(num_heads=4, num_kv_heads=2, head_size=64, scale=1.0, block_size=16, soft_cap=0.0)
    with pytest.raises(ValueError, match="a sink has no position"):
        registry.build("paged_attention", "cpu", present, **attributes, sliding_window=window)


def test_learned_keys_of_another_type_than_the_cache_are_refused(capfd):
    rng = np.random.default_rng(5)
    step, query = make(rng, [(1, 5)], 4, 2, 64)
    op = registry.build(
        "paged_attention", "cpu", ("sink_kv",), num_heads=4, num_kv_heads=2, head_size=64, scale=1.0, block_size=16,
        sliding_window=0, soft_cap=0.0,
    )  # fmt: skip
    tensors = [tensor(t) for t in (query, step.kv_cache, step.block_table, step.query_start_loc, step.seq_lens)]
    with pytest.raises(RuntimeError):
        op(*tensors, tensor(learned(rng, 3, 2, 128, "float32"), "bfloat16")).asnumpy()
    assert "sink_kv: must have the type of kv_cache" in capfd.readouterr().err
