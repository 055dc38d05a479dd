"""linear on CPU through MindSpore: right against float64, in every mode, and independent of the batch."""

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
from vllm_mindspore.ops.activation import ACTIVATIONS

OPTIONAL = ("bias", "residual", "norm_weight", "norm_bias")
EPS = 1e-6


@dataclass
class Linear:
    """One use of the operator with random weights of a storage type."""

    n: int
    k: int
    dtype: str = "float32"
    activation: str = ""
    norm: str = ""
    offset: float = 0.0
    present: tuple[str, ...] = ()
    seed: int = 0
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.weights["weight"] = rng.standard_normal((self.n, self.k)) / np.sqrt(self.k)
        for name, size in (("bias", self.n), ("norm_weight", self.k), ("norm_bias", self.k)):
            if name in self.present:
                self.weights[name] = rng.standard_normal(size)
        self.op = registry.build(
            "linear",
            "cpu",
            self.present,
            norm=self.norm,
            eps=EPS,
            norm_offset=self.offset,
            activation=self.activation,
        )

    @property
    def columns(self) -> int:
        return self.n // 2 if self.activation.endswith("_and_mul") else self.n

    def inputs(self, x, residual=None) -> list[ms.Tensor]:
        values = [tensor(x), tensor(self.weights["weight"], self.dtype)]
        for name in OPTIONAL:
            if name in self.present:
                values.append(tensor(residual) if name == "residual" else tensor(self.weights[name], self.dtype))
        return values

    def expected(self, x, residual=None) -> np.ndarray:
        w = {name: stored(value, self.dtype) for name, value in self.weights.items()}
        x = normalise(np.asarray(x, np.float64), self.norm, EPS, w.get("norm_weight"), w.get("norm_bias"), self.offset)
        if self.rounds_activations and x.size:
            x = stored(x, "bfloat16")
        y = activate(x @ w["weight"].T + w.get("bias", 0.0), self.activation)
        return y if residual is None else y + residual

    @property
    def rounds_activations(self) -> bool:
        return self.dtype == "bfloat16" and current_isa() in ("avx512", "amx")

    @property
    def tolerance(self) -> float:
        # a normalised value next to a rounding boundary may round the other way than in float64
        return 2e-3 if self.rounds_activations and self.norm else 5e-6


def random_rows(m, k, seed=1):
    return np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes_are_right(dtype):
    for m, k, n in itertools.product((0, 1, 2, 5, 29), (1, 31, 64, 100, 1030), (1, 2, 7, 40)):
        linear = Linear(n, k, dtype)
        x = random_rows(m, k)
        error = relative_error(linear.op(*linear.inputs(x)), linear.expected(x))
        assert error < linear.tolerance, (m, k, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["", "rms", "layer"])
def test_every_fusion_is_right(dtype, norm):
    norms = {"": (), "rms": ("norm_weight",), "layer": ("norm_weight", "norm_bias")}[norm]
    for activation, extras in itertools.product(ACTIVATIONS, [(), ("bias",), ("residual",), ("bias", "residual")]):
        linear = Linear(22, 75, dtype, activation, norm, 1.0, (*extras, *norms))
        x = random_rows(5, 75)
        residual = random_rows(5, linear.columns, 2) if "residual" in extras else None
        error = relative_error(linear.op(*linear.inputs(x, residual)), linear.expected(x, residual))
        assert error < linear.tolerance, (activation, extras)


def test_norm_without_weights():
    for norm in ("rms", "layer"):
        linear = Linear(8, 40, norm=norm)
        x = random_rows(3, 40)
        assert relative_error(linear.op(*linear.inputs(x)), linear.expected(x)) < linear.tolerance


def test_leading_dimensions_are_kept():
    linear = Linear(6, 10, present=("residual",))
    x, residual = random_rows(12, 10), random_rows(12, 6, 2)
    got = linear.op(*linear.inputs(x.reshape(3, 4, 10), residual.reshape(3, 4, 6)))
    assert relative_error(got, linear.expected(x, residual).reshape(3, 4, 6)) < 5e-6
    one = linear.op(*linear.inputs(x[0], residual[0]))
    assert tuple(one.shape) == (6,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_graph_serves_every_token_count(dtype):
    linear = Linear(24, 70, dtype, "silu_and_mul", "rms", 0.0, ("residual", "norm_weight"))
    graph = None
    for m in (3, 17, 0, 1, 40, 3):
        x, residual = random_rows(m, 70, m), random_rows(m, 12, m + 1)
        inputs = linear.inputs(x, residual)
        if graph is None:
            graph = jit_with_dynamic_tokens(linear.op, inputs, (0, None, 0, None))
        got = graph(*inputs)
        assert relative_error(got, linear.expected(x, residual)) < linear.tolerance, m
        assert np.array_equal(got.asnumpy(), linear.op(*inputs).asnumpy()), "graph and PyNative differ"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_batch(dtype):
    linear = Linear(50, 1100, dtype, "silu_and_mul", "rms", 0.0, ("norm_weight",))
    x = random_rows(31, 1100)
    together = linear.op(*linear.inputs(x)).asnumpy()
    for rows in (slice(0, 1), slice(4, 6), slice(7, 10), slice(11, 15), slice(5, 30)):
        assert np.array_equal(linear.op(*linear.inputs(x[rows])).asnumpy(), together[rows]), rows


def test_weights_are_read_in_place():
    """A weight updated in memory that MindSpore shares is seen by the next call: no converted copy is kept."""
    weight = np.ones((8, 16), np.float32)
    shared = ms.from_numpy(weight)
    linear = Linear(8, 16)
    x = ms.Tensor(np.ones((1, 16), np.float32))
    assert linear.op(x, shared).asnumpy()[0, 0] == 16.0
    weight[0, :] = 2.0
    assert linear.op(x, shared).asnumpy()[0, 0] == 32.0


def test_wrong_arguments_are_refused(capfd):
    linear = Linear(6, 10)
    weight = tensor(linear.weights["weight"])
    with pytest.raises(RuntimeError, match="last dimension of x and of weight: 9 against 10"):
        linear.op(tensor(random_rows(3, 9)), weight)
    with pytest.raises(RuntimeError, match=r"function\(Linear\) is 1"):
        linear.op(tensor(random_rows(3, 10), "float16"), weight).asnumpy()
    assert "vllm_ms.linear: x: activations must be float32" in capfd.readouterr().err
    odd = Linear(5, 10, activation="silu_and_mul")
    with pytest.raises(RuntimeError, match="5 is odd"):
        odd.op(tensor(random_rows(3, 10)), tensor(odd.weights["weight"]))


def test_attributes_are_checked():
    attributes = {"norm": "", "eps": 1e-6, "norm_offset": 0.0, "activation": ""}
    with pytest.raises(ValueError, match="activation 'swish'"):
        registry.build("linear", "cpu", **{**attributes, "activation": "swish"})
    with pytest.raises(ValueError, match="norm 'batch'"):
        registry.build("linear", "cpu", **{**attributes, "norm": "batch"})
    with pytest.raises(ValueError, match="norm_bias is for"):
        registry.build("linear", "cpu", ("norm_bias",), **{**attributes, "norm": "rms"})
    with pytest.raises(ValueError, match="without a norm"):
        registry.build("linear", "cpu", ("norm_weight",), **attributes)
