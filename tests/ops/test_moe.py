"""moe_experts on CPU through MindSpore: right against float64, and independent of the batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import mindspore as ms
import numpy as np
import pytest

from tests.ops.helpers import (
    DTYPES,
    activate,
    current_isa,
    jit_with_dynamic_tokens,
    normalise,
    relative_error,
    stored,
    tensor,
)
from vllm_mindspore.ops import registry

EPS = 1e-6


@dataclass
class Experts:
    """One use of moe_experts with random weights of a storage type."""

    experts: int
    hidden: int
    inter: int
    dtype: str = "float32"
    activation: str = "silu_and_mul"
    norm: str = ""
    present: tuple[str, ...] = ()
    interleaved: bool = False
    weight_on_input: bool = False
    width: int = 0
    seed: int = 0
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    OPTIONAL = ("w13_bias", "w2_bias", "residual", "norm_weight", "norm_bias")
    LIMITS = {"alpha": 1.702, "beta": 1.0, "limit": 0.7}

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.width = self.width or self.hidden
        rows = 2 * self.inter if self.activation.endswith("_and_mul") else self.inter
        shapes = {
            "w13": (self.experts, rows, self.hidden),
            "w2": (self.experts, self.width, self.inter),
            "w13_bias": (self.experts, rows),
            "w2_bias": (self.experts, self.width),
            "norm_weight": (self.hidden,),
            "norm_bias": (self.hidden,),
        }
        for name, shape in shapes.items():
            if name in ("w13", "w2") or name in self.present:
                scale = np.sqrt(shape[-1]) if name in ("w13", "w2") else 1.0
                self.weights[name] = rng.standard_normal(shape) / scale
        self.op = registry.build(
            "moe_experts",
            "cpu",
            self.present,
            norm=self.norm,
            eps=EPS,
            norm_offset=1.0,
            activation=self.activation,
            interleaved=self.interleaved,
            weight_on_input=self.weight_on_input,
            **self.LIMITS,
        )

    def inputs(self, x, routing, residual=None) -> list[ms.Tensor]:
        values = [tensor(x), tensor(routing), tensor(self.weights["w13"], self.dtype)]
        values.append(tensor(self.weights["w2"], self.dtype))
        for name in self.OPTIONAL:
            if name in self.present:
                values.append(tensor(residual) if name == "residual" else tensor(self.weights[name], self.dtype))
        return values

    def expected(self, x, routing, residual=None) -> np.ndarray:
        w = {name: stored(value, self.dtype) for name, value in self.weights.items()}
        x = normalise(np.asarray(x, np.float64), self.norm, EPS, w.get("norm_weight"), w.get("norm_bias"), 1.0)
        out = np.zeros((len(x), self.width)) if residual is None else residual.astype(np.float64)
        top_k = routing.shape[1] // 2
        for t, j in itertools.product(range(len(x)), range(top_k)):
            expert, weight = routing[t, j], routing[t, top_k + j]
            if not 0 <= expert < self.experts:
                continue
            of = {name: value[int(expert)] for name, value in w.items() if not name.startswith("norm")}
            row = self.rounded(x[t] * weight if self.weight_on_input else x[t])
            hidden = self.rounded(self.activate(of["w13"] @ row + of.get("w13_bias", 0.0)))
            y = of["w2"] @ hidden + of.get("w2_bias", 0.0)
            out[t] += y if self.weight_on_input else weight * y
        return out

    def activate(self, sums):
        if self.interleaved:
            sums = np.concatenate([sums[0::2], sums[1::2]])
        if self.activation != "clamped_silu_and_mul":
            return activate(sums, self.activation)
        limit = self.LIMITS["limit"]
        gate, up = np.split(sums, 2)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return gate / (1 + np.exp(-self.LIMITS["alpha"] * gate)) * (up + self.LIMITS["beta"])

    @property
    def rounds_activations(self) -> bool:
        return self.dtype == "bfloat16" and current_isa() in ("avx512", "amx")

    def rounded(self, values):
        return bfloat16(values) if self.rounds_activations else values

    @property
    def tolerance(self) -> float:
        # a value next to a rounding boundary may round the other way than in float64
        return 2e-3 if self.rounds_activations else 5e-6


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Finite values rounded to bfloat16, as float64."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def random_rows(rows, columns, seed=1):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def random_routing(rows, experts, top_k, seed=2):
    """Different experts for each row and positive weights: [rows, 2 * top_k]."""
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(experts)[:top_k] for _ in range(rows)]).reshape(rows, top_k)
    return np.concatenate([ids, rng.random((rows, top_k)) + 0.1], axis=1).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 2), (8, 8), (64, 3)])
def test_odd_shapes_are_right(dtype, experts, top_k):
    for hidden, inter, width in ((1, 1, 1), (33, 17, 50), (64, 32, 7), (100, 130, 100)):
        moe = Experts(experts, hidden, inter, dtype, width=width)
        for rows in (0, 1, 2, 7, 33):
            x, routing = random_rows(rows, hidden), random_routing(rows, experts, top_k)
            error = relative_error(moe.op(*moe.inputs(x, routing)), moe.expected(x, routing))
            assert error < moe.tolerance, (hidden, inter, width, rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_and_many_tokens_are_right(dtype):
    """Weights are read panel by panel, and one expert's tokens take several jobs."""
    moe = Experts(3, 1030, 1060, dtype, width=40)
    x = random_rows(300, 1030)
    routing = random_routing(300, 3, 2)
    routing[:290, 0], routing[:290, 1] = 1, 2
    assert relative_error(moe.op(*moe.inputs(x, routing)), moe.expected(x, routing)) < moe.tolerance
    wide = Experts(2, 5000, 8, dtype, width=9)
    x, routing = random_rows(260, 5000), random_routing(260, 2, 1)
    routing[:, 0] = 1
    assert relative_error(wide.op(*wide.inputs(x, routing)), wide.expected(x, routing)) < wide.tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "relu2", "silu", "gelu",
                                        "clamped_silu_and_mul"])  # fmt: skip
def test_every_activation_with_every_extra_is_right(dtype, activation):
    residual = random_rows(9, 40, 5)
    gated = activation.endswith("_and_mul")
    for norm, interleaved in itertools.product(("", "rms", "layer"), (False, True) if gated else (False,)):
        norms = {"": (), "rms": ("norm_weight",), "layer": ("norm_weight", "norm_bias")}[norm]
        for extras in ((), ("w13_bias", "w2_bias", "residual")):
            moe = Experts(6, 40, 37, dtype, activation, norm, (*extras, *norms), interleaved)
            x, routing = random_rows(9, 40), random_routing(9, 6, 2)
            given = residual if extras else None
            error = relative_error(moe.op(*moe.inputs(x, routing, given)), moe.expected(x, routing, given))
            assert error < 3 * moe.tolerance, (norm, interleaved, extras)


def test_weights_can_multiply_the_input():
    moe = Experts(4, 30, 20, weight_on_input=True)
    x, routing = random_rows(11, 30), random_routing(11, 4, 1)
    assert relative_error(moe.op(*moe.inputs(x, routing)), moe.expected(x, routing)) < moe.tolerance
    with pytest.raises(RuntimeError, match="weight_on_input: only with one expert"):
        moe.op(*moe.inputs(x, random_routing(11, 4, 2)))


def test_pairs_without_an_expert_contribute_nothing():
    moe = Experts(4, 30, 20, present=("residual",))
    x, residual, routing = random_rows(6, 30), random_rows(6, 30, 3), random_routing(6, 4, 2)
    routing[0, 0], routing[1, :2], routing[2, 1], routing[3, 0] = -1, -1, 4, np.nan
    found = moe.op(*moe.inputs(x, routing, residual))
    assert relative_error(found, moe.expected(x, routing, residual)) < moe.tolerance
    assert np.array_equal(found.asnumpy()[1], residual[1])


def test_experts_without_tokens_are_not_read():
    moe = Experts(5, 30, 20)
    x, routing = random_rows(7, 30), random_routing(7, 2, 2)
    expected = moe.expected(x, routing)
    for name in ("w13", "w2"):
        moe.weights[name][2:] = np.nan
    assert relative_error(moe.op(*moe.inputs(x, routing)), expected) < moe.tolerance


def test_a_token_that_is_no_number_spoils_only_itself():
    moe = Experts(5, 30, 20)
    x, routing = random_rows(7, 30), random_routing(7, 5, 2)
    x[3, 4] = np.nan
    found = moe.op(*moe.inputs(x, routing)).asnumpy()
    assert np.isnan(found[3]).all()
    assert np.isfinite(found[[0, 1, 2, 4, 5, 6]]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_batch(dtype):
    moe = Experts(6, 1100, 70, dtype, norm="rms", present=("norm_weight",), width=65)
    x, routing = random_rows(61, 1100), random_routing(61, 6, 3)
    routing[20:55, :3] = [5, 1, 0]  # most tokens to the same experts
    together = moe.op(*moe.inputs(x, routing)).asnumpy()
    for rows in (slice(0, 1), slice(4, 6), slice(7, 10), slice(11, 26), slice(5, 60), slice(60, 61)):
        alone = moe.op(*moe.inputs(x[rows], routing[rows])).asnumpy()
        assert np.array_equal(alone, together[rows]), rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_graph_serves_every_token_count(dtype):
    moe = Experts(8, 70, 24, dtype, present=("residual",))
    graph = None
    for rows in (3, 17, 0, 1, 40, 3):
        x, routing, residual = random_rows(rows, 70, rows), random_routing(rows, 8, 2), random_rows(rows, 70, 7)
        inputs = moe.inputs(x, routing, residual)
        if graph is None:
            graph = jit_with_dynamic_tokens(moe.op, inputs, (0, 0, None, None, 0))
        found = graph(*inputs)
        assert relative_error(found, moe.expected(x, routing, residual)) < moe.tolerance, rows
        assert np.array_equal(found.asnumpy(), moe.op(*inputs).asnumpy()), "graph and PyNative differ"


def test_weights_are_read_in_place():
    w13 = np.ones((1, 16, 8), np.float32)
    shared = ms.from_numpy(w13)
    moe = Experts(1, 8, 16, activation="relu")
    x, routing, w2 = (tensor(np.ones(shape, np.float32)) for shape in ((1, 8), (1, 2), (1, 8, 16)))
    routing = tensor(np.array([[0.0, 1.0]], np.float32))
    assert moe.op(x, routing, shared, w2).asnumpy()[0, 0] == 128.0
    w13[:] = 2.0
    assert moe.op(x, routing, shared, w2).asnumpy()[0, 0] == 256.0


def test_wrong_arguments_are_refused(capfd):
    moe = Experts(4, 10, 6)
    x, routing, w13, w2 = moe.inputs(random_rows(3, 10), random_routing(3, 4, 2))
    cases = (
        ((tensor(random_rows(3, 9)), routing, w13, w2), "last dimension of x and of w13: 9 against 10"),
        ((x, tensor(random_rows(2, 4)), w13, w2), "rows of x and of routing: 3 against 2"),
        ((x, tensor(random_rows(3, 5)), w13, w2), "routing: 5 columns"),
        ((x, routing, w13, w2[:3]), "experts of w13 and of w2: 4 against 3"),
        ((x, routing, w13[:, :10], w2), "rows of w13 and what w2 takes: 10 against 12"),
    )
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match=message):
            moe.op(*arguments)
    with pytest.raises(RuntimeError, match=r"function\(MoeExperts\) is 1"):
        moe.op(x, routing, w13.astype(ms.bfloat16), w2).asnumpy()
    assert "w13 and w2: of different types" in capfd.readouterr().err
    attributes = {"norm": "", "eps": EPS, "norm_offset": 0.0, "activation": "silu_and_mul", "interleaved": False}
    attributes |= {**Experts.LIMITS, "weight_on_input": False}
    for changed, message in (({"activation": "swish"}, "'swish'"), ({"norm": "batch"}, "'batch'"),
                             ({"activation": "relu", "interleaved": True}, "interleaved is for gated")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            registry.build("moe_experts", "cpu", **{**attributes, **changed})
    with pytest.raises(ValueError, match="norm_weight given without a norm"):
        registry.build("moe_experts", "cpu", ("norm_weight",), **attributes)
