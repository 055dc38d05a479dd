"""qkv_attention on CPU: the fused form against float64, and against the operators it replaces."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import nn
from mindspore.common import np_dtype
from torch.fx.experimental.proxy_tensor import make_fx

from tests.ops import attention_reference as reference
from vllm_mindspore.ops import registry

DTYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16}
NUMPY = {"float32": np.float32, "bfloat16": np_dtype.bfloat16, "float16": np.float16}
REQUESTS = [(5, 5), (1, 70), (0, 3), (66, 200), (1, 600), (1, 1)]
EPS = 1e-6


class Case:
    """One set of shapes and options, with random tensors of float32 values exact in `dtype`."""

    def __init__(self, heads=(4, 2), head_size=32, block_size=16, dtype="float32", norm="", offset=0.0, rotary_dim=None,
                 neox=True, window=0, soft_cap=0.0, sinks=False, alibi=False, requests=REQUESTS, value_size=None,
                 normed=("q_norm", "k_norm"), num_sinks=0):  # fmt: skip
        self.num_heads, self.num_kv_heads = heads
        self.head_size, self.dtype, self.norm, self.offset, self.neox = head_size, dtype, norm, offset, neox
        self.rotary_dim = head_size // 2 * 2 if rotary_dim is None else rotary_dim
        self.rng = np.random.default_rng(head_size)
        self.value_size = value_size or head_size
        self.step = reference.make_step(
            self.rng, requests, block_size, self.num_kv_heads, head_size, value_size=self.value_size
        )
        self.cache = self.step.kv_cache.astype(NUMPY[dtype])
        self.features = {"sliding_window": window, "soft_cap": soft_cap}
        normed = normed if norm else ()
        norm_sizes = {"head": (1, 1), "full": heads}.get(norm)
        self.optional = {
            "cos_sin": reference.make_cos_sin(700, self.rotary_dim) if self.rotary_dim else None,
            "q_norm": self.weights(norm_sizes[0] * head_size) if "q_norm" in normed else None,
            "k_norm": self.weights(norm_sizes[1] * head_size) if "k_norm" in normed else None,
            "sinks": self.weights(self.num_heads) if sinks else None,
            "alibi_slopes": self.weights(self.num_heads) / 4 if alibi else None,
            "sink_kv": self.learned(num_sinks) if num_sinks else None,
        }
        width = (self.num_heads + self.num_kv_heads) * head_size + self.num_kv_heads * self.value_size
        self.qkv = self.rng.standard_normal((self.step.num_tokens, width)).astype(np.float32) * 2
        self.positions = self.step.token_positions()
        self.slots = self.step.slot_mapping()

    def weights(self, size):
        return np.abs(self.rng.standard_normal(size)).astype(np.float16).astype(np.float32) + 0.5

    def learned(self, num_sinks):
        rows = self.rng.standard_normal((num_sinks, *self.cache.shape[1:]))
        return rows.astype(NUMPY[self.dtype]).astype(np.float32)

    def operator(self):
        present = tuple(name for name, value in self.optional.items() if value is not None)
        return registry.build(
            "qkv_attention", "cpu", present, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            head_size=self.head_size, scale=self.head_size**-0.5, block_size=self.step.block_size,
            rotary_dim=self.rotary_dim, neox=self.neox, norm_eps=EPS, norm_offset=self.offset, norm=self.norm,
            **self.features,
        )  # fmt: skip

    def run(self, weights="float32"):
        """Returns the output; self.cache is written."""
        types = {"sink_kv": self.dtype}  # as the cache
        o = {
            name: None if t is None else ms.Tensor(t).astype(DTYPES[types.get(name, weights)])
            for name, t in self.optional.items()
        }
        state = [ms.Tensor(np.ascontiguousarray(t)) for t in
                 (self.slots, self.step.block_table, self.step.query_start_loc, self.step.seq_lens)]  # fmt: skip
        tensors = [ms.Tensor(self.qkv), ms.Tensor(self.positions), o["cos_sin"], o["q_norm"], o["k_norm"],
                   ms.from_numpy(self.cache), *state, o["sinks"], o["alibi_slopes"],
                   o["sink_kv"]]  # fmt: skip
        return self.operator()(*(t for t in tensors if t is not None)).asnumpy()

    def heads(self):
        """q, k, v [T, heads, head_size] after norm and rotation, float64."""
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        sizes = (self.head_size, self.head_size, self.value_size)
        parts = np.split(self.qkv.astype(np.float64), np.cumsum(counts)[:2] * self.head_size, axis=1)
        result = []
        for part, count, size, name in zip(parts, counts, sizes, ("q_norm", "k_norm", None), strict=True):
            normed = self.norm if self.optional.get(name) is not None else ""
            if normed == "full":
                part = reference.rms(part, self.optional[name], EPS, self.offset)
            part = part.reshape(-1, count, size)
            if normed == "head":
                part = reference.rms(part, self.optional[name], EPS, self.offset)
            if name and self.optional["cos_sin"] is not None:
                part = reference.rotate(part, self.positions, self.optional["cos_sin"], self.neox)
            result.append(part)
        return result

    def expect(self):
        """The output in float64; reads the cache as the operator left it, after checking it."""
        query, key, value = self.heads()
        written = self.slots >= 0
        rows = self.cache.astype(np.float32)
        precision = {"float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[self.dtype]
        want = np.concatenate([key, value], -1)[written]
        np.testing.assert_allclose(rows[self.slots[written]], want, atol=2e-6, rtol=precision)
        untouched = np.ones(len(rows), bool)
        untouched[self.slots[written]] = False
        original = self.step.kv_cache.astype(NUMPY[self.dtype]).astype(np.float32)
        np.testing.assert_array_equal(rows[untouched], original[untouched])
        self.step.kv_cache = rows
        query = reference.read_query(query, self.dtype, self.head_size)
        return reference.attention(
            query, self.step, self.num_heads, self.head_size**-0.5, sinks=self.optional["sinks"],
            alibi_slopes=self.optional["alibi_slopes"], sink_kv=self.optional["sink_kv"], **self.features,
        )  # fmt: skip


MODELS = {
    "llama": {"heads": (8, 2), "head_size": 64},
    "qwen3": {"heads": (4, 2), "head_size": 128, "norm": "head", "dtype": "bfloat16"},
    "olmo2": {"heads": (6, 3), "head_size": 20, "norm": "full", "dtype": "float16"},
    "gemma3": {"heads": (4, 1), "head_size": 256, "norm": "head", "offset": 1.0, "window": 64, "dtype": "bfloat16"},
    "gemma2": {"heads": (4, 2), "head_size": 96, "soft_cap": 50.0, "window": 100},
    "glm4": {"heads": (4, 2), "head_size": 128, "rotary_dim": 64, "neox": False, "dtype": "bfloat16"},
    "gptoss": {"heads": (8, 1), "head_size": 64, "sinks": True, "window": 128, "dtype": "bfloat16"},
    "mpt": {"heads": (7, 7), "head_size": 80, "rotary_dim": 0, "alibi": True},
    "odd": {"heads": (9, 3), "head_size": 33, "rotary_dim": 10, "norm": "full", "offset": 1.0, "block_size": 7},
    "full, no rotation": {"heads": (4, 4), "head_size": 64, "rotary_dim": 0, "norm": "full", "block_size": 1},
    "everything": {"heads": (10, 2), "head_size": 112, "rotary_dim": 56, "neox": False, "norm": "head", "window": 90,
                   "soft_cap": 20.0, "sinks": True, "alibi": True, "dtype": "float16", "block_size": 32},
    "pangu pro moe v2": {"heads": (8, 2), "head_size": 192, "value_size": 128, "rotary_dim": 64, "neox": False,
                         "norm": "head", "normed": ("k_norm",), "num_sinks": 128, "dtype": "bfloat16"},
    "norms of one": {"heads": (6, 2), "head_size": 20, "value_size": 12, "norm": "full", "normed": ("q_norm",),
                     "num_sinks": 13, "rotary_dim": 0, "sinks": True, "soft_cap": 20.0, "block_size": 7},
}  # fmt: skip


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_equal_to_float64(options):
    case = Case(**options)
    out = case.run()
    atol = max(1e-5, reference.rounding(case.dtype, case.head_size, case.value_size))
    np.testing.assert_allclose(out, case.expect(), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision(dtype):
    case = Case(norm="full", sinks=True, alibi=True)
    case.optional = {
        name: None if t is None else ms.Tensor(t).astype(DTYPES[dtype]).astype(ms.float32).asnumpy()
        for name, t in case.optional.items()
    }
    out = case.run(dtype)
    np.testing.assert_allclose(out, case.expect(), atol=1e-5)


@pytest.mark.parametrize("neox", [True, False])
def test_same_bits_as_the_separate_operators(neox):
    case = Case(heads=(8, 2), head_size=80, rotary_dim=32, neox=neox, dtype="bfloat16", window=70, sinks=True)
    plain = Case(heads=(8, 2), head_size=80, rotary_dim=32, neox=neox, dtype="bfloat16", window=70, sinks=True)
    fused = case.run()
    widths = np.cumsum([8 * 80, 2 * 80])
    query, key, value = (ms.Tensor(np.ascontiguousarray(t)) for t in np.split(plain.qkv, widths, axis=1))
    rotate = registry.build("rotary", "cpu", (), head_size=80, rotary_dim=32, neox=neox)
    positions, cos_sin = ms.Tensor(plain.positions), ms.Tensor(plain.optional["cos_sin"])
    query, key = (rotate(positions, t, cos_sin) for t in (query, key))
    cache = ms.from_numpy(plain.cache)
    registry.build("kv_write", "cpu")(cache, key, value, ms.Tensor(plain.slots)).asnumpy()
    attend = registry.build(
        "paged_attention", "cpu", ("sinks",), num_heads=8, num_kv_heads=2, head_size=80, scale=80**-0.5, block_size=16,
        sliding_window=70, soft_cap=0.0,
    )  # fmt: skip
    state = [ms.Tensor(t) for t in (plain.step.block_table, plain.step.query_start_loc, plain.step.seq_lens)]
    separate = attend(query, cache, *state, ms.Tensor(plain.optional["sinks"])).asnumpy()
    np.testing.assert_array_equal(plain.cache, case.cache)
    np.testing.assert_array_equal(separate, fused)


@pytest.mark.parametrize("norm", ["", "head", "full"])
def test_chunks_of_a_prompt_give_the_same_bits(norm):
    whole = Case(norm=norm, dtype="bfloat16", requests=[(600, 600)])
    chunked = Case(norm=norm, dtype="bfloat16", requests=[(600, 600)])
    want = whole.run()
    qkv, positions, slots = chunked.qkv, chunked.positions, chunked.slots
    outputs = []
    for begin, end in [(0, 1), (1, 130), (130, 131), (131, 512), (512, 600)]:
        chunked.qkv, chunked.positions, chunked.slots = qkv[begin:end], positions[begin:end], slots[begin:end]
        chunked.step.query_start_loc = np.array([0, end - begin], np.int32)
        chunked.step.seq_lens = np.array([end], np.int32)
        outputs.append(chunked.run())
    np.testing.assert_array_equal(np.concatenate(outputs), want)
    np.testing.assert_array_equal(chunked.cache, whole.cache)


def test_padding_is_zero_and_skipped_slots_are_not_written():
    case = Case(norm="head", requests=[(3, 20), (1, 9)])
    case.qkv = np.concatenate([case.qkv, np.ones((2, case.qkv.shape[1]), np.float32)])
    case.positions = np.concatenate([case.positions, [10**9, -5]])  # never read: these slots are skipped
    case.slots = np.concatenate([case.slots, [-1, -1]])
    case.slots[1] = -1
    out = case.run()
    assert not out[4:].any()
    case.positions[4:] = 0
    np.testing.assert_allclose(out, case.expect(), atol=1e-5)


def test_no_tokens():
    for requests in ([], [(0, 5)]):
        assert Case(norm="full", requests=requests).run().shape == (0, 128)


def test_profile_run():
    case = Case(requests=[(40, 40)])
    case.step.block_table[:] = 0
    case.slots[:] = -1
    before = case.cache.copy()
    assert np.isfinite(case.run()).all()
    np.testing.assert_array_equal(case.cache, before)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: c.slots.__setitem__(2, len(c.cache)), "slot_mapping has slot "),
        (lambda c: c.positions.__setitem__(2, 700), "position 700 of token 2"),
        (lambda c: c.step.block_table.__setitem__((1, 0), 10**6), "block_table has block 1000000"),
    ],
)
def test_impossible_steps_are_named_and_nothing_is_written(capfd, change, message):
    case = Case(requests=[(3, 20), (1, 9)])
    change(case)
    before = case.cache.copy()
    with pytest.raises(RuntimeError):
        case.run()
    assert f"vllm_ms.qkv_attention: {'request 1: ' if 'block' in message else ''}{message}" in capfd.readouterr().err
    np.testing.assert_array_equal(case.cache, before)


@pytest.mark.parametrize(
    "present,change,message",
    [
        ((), {"norm": "head"}, "q_norm or k_norm"),
        (("k_norm",), {}, "q_norm or k_norm"),
        (("alibi_slopes", "sink_kv"), {}, "a sink has no position"),
        ((), {"norm": "layer"}, "norm 'layer'"),
        (("cos_sin",), {"rotary_dim": 5}, "rotary_dim 5"),
        ((), {"num_kv_heads": 3}, "num_kv_heads 3"),
    ],
)
def test_impossible_attributes_are_rejected(present, change, message):
    attributes = {
        "num_heads": 4, "num_kv_heads": 2, "head_size": 64, "scale": 1.0, "block_size": 16, "sliding_window": 0,
        "soft_cap": 0.0, "rotary_dim": 64, "neox": True, "norm_eps": EPS, "norm_offset": 0.0, "norm": "",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        registry.build("qkv_attention", "cpu", present, **{**attributes, **change})


def test_in_a_torch_graph_with_a_symbolic_number_of_tokens():
    registry.define_all()
    ops = torch.ops.vllm_ms

    def layer(qkv, positions, cos_sin, cache, slots, block_table, query_start_loc, seq_lens):
        query, key, value = qkv.split([32, 16, 16], -1)
        query = ops.rotary(positions, query, cos_sin, 8, 8, True)
        ops.kv_write(cache, key, value, slots)
        state = (block_table, query_start_loc, seq_lens)
        out = ops.paged_attention(query, cache, *state, None, None, None, 4, 2, 8, 1.0, 16, 0, 0.0)
        attributes = (4, 2, 8, 1.0, 16, 0, 0.0, 8, True, 1e-6, 0.0, "")
        return out + ops.qkv_attention(
            qkv, positions, cos_sin, None, None, cache, slots, *state, None, None, None, *attributes
        )

    integers = [torch.zeros(shape, dtype=torch.int32) for shape in ((2, 3), (3,), (2,))]
    tokens = torch.zeros(5, dtype=torch.int64)
    graph = make_fx(layer, tracing_mode="symbolic")(
        torch.zeros(5, 64), tokens, torch.zeros(9, 8), torch.zeros(32, 2, 16), tokens.clone(), *integers
    )
    outputs = {node.target.name(): node.meta.get("val") for node in graph.graph.nodes if "vllm_ms" in str(node.target)}
    assert set(outputs) == {f"vllm_ms::{name}" for name in ("rotary", "kv_write", "paged_attention", "qkv_attention")}
    for name, value in outputs.items():
        if name == "vllm_ms::kv_write":
            assert value is None
            continue
        assert value.dtype == torch.float32 and value.shape[1] == 32
        assert isinstance(value.shape[0], torch.SymInt)


class Layer(nn.Cell):
    """A layer of a decoder: its cache is a Parameter with the memory of a numpy array."""

    def __init__(self, case):
        super().__init__()
        self.attend = case.operator()
        shared = ms.from_numpy(case.cache)
        self.cache = ms.Parameter(ms.ops.zeros(shared.shape, shared.dtype), requires_grad=False)
        self.cache.set_data(shared)
        self.cos_sin = ms.Parameter(ms.Tensor(case.optional["cos_sin"]), requires_grad=False)

    def construct(self, qkv, positions, slots, block_table, query_start_loc, seq_lens):
        return self.attend(qkv, positions, self.cos_sin, self.cache, slots, block_table, query_start_loc, seq_lens)


class Layers(nn.Cell):
    def __init__(self, cases):
        super().__init__()
        self.layers = nn.CellList([Layer(case) for case in cases])

    def construct(self, qkv, positions, slots, block_table, query_start_loc, seq_lens):
        outputs = []
        for layer in self.layers:
            outputs.append(layer(qkv, positions, slots, block_table, query_start_loc, seq_lens))
        return outputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_a_graph_with_any_number_of_tokens(dtype):
    cases = [Case(dtype=dtype), Case(dtype=dtype, window=30)]
    net = Layers(cases)
    integers = [ms.Tensor(shape=[None], dtype=d) for d in (ms.int64, ms.int64, ms.int32, ms.int32)]
    table = ms.Tensor(shape=[None, None], dtype=ms.int32)
    qkv = ms.Tensor(shape=[None, cases[0].qkv.shape[1]], dtype=ms.float32)
    net.set_inputs(qkv, integers[0], integers[1], table, integers[2], integers[3])
    net = ms.jit(net, capture_mode="ast", jit_level="O0")
    for requests in (REQUESTS, [(1, 71), (1, 601)], [], [(0, 4)], [(130, 130), (1, 5)]):
        step = Case(dtype=dtype, requests=requests)
        inputs = [step.qkv, step.positions, step.slots, step.step.block_table, step.step.query_start_loc,
                  step.step.seq_lens]  # fmt: skip
        outputs = net(*(ms.Tensor(np.ascontiguousarray(t)) for t in inputs))
        for case, output in zip(cases, outputs, strict=True):
            step.features, step.cache = case.features, case.cache
            step.step.kv_cache = case.cache.copy()
            atol = max(1e-5, reference.rounding(dtype, step.head_size))
            np.testing.assert_allclose(output.asnumpy(), step.expect(), atol=atol)
