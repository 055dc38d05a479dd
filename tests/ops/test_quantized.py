"""linear_int8 and linear_int4 on CPU through MindSpore: right against float64, in every mode, with every fusion."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import mindspore as ms
import numpy as np
import pytest
import torch

from tests.ops.helpers import activate, jit_with_dynamic_tokens, normalise, relative_error, tensor
from vllm_mindspore.ops import quantized, registry
from vllm_mindspore.ops.activation import ACTIVATIONS

OPTIONAL = ("bias", "residual", "norm_weight", "norm_bias")
EPS = 1e-6
TOLERANCE = 5e-4  # activations have 16 bits, relative to the largest of 128 neighbours; bf16 ones are wrong by 5e-3


def dequantize(values: np.ndarray, scales: np.ndarray, rows: int, columns: int, bits: int) -> np.ndarray:
    """float64 [rows, columns], from the documented layout."""
    tiles = values.shape[0]
    if bits == 4:
        halves = values.reshape(tiles, -1, 1, 16, 4)
        steps = np.concatenate([halves & 15, halves >> 4], 2).reshape(tiles, -1, 16, 4) - 8.0
    else:
        steps = values.reshape(tiles, -1, 16, 4) - 128.0
    weight = steps.transpose(0, 2, 1, 3).reshape(tiles * 16, -1)
    of_row = scales.transpose(0, 2, 1).reshape(tiles * 16, -1).astype(np.float64)
    of_value = np.repeat(of_row, 128 if bits == 4 else weight.shape[1], 1)[:, : weight.shape[1]]
    return (weight * of_value)[:rows, :columns]


@dataclass
class Linear:
    """One use of an operator with random weights."""

    n: int
    k: int
    bits: int
    activation: str = ""
    norm: str = ""
    offset: float = 0.0
    present: tuple[str, ...] = ()
    extras: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        rng = np.random.default_rng(self.n * 7 + self.k)
        weight = torch.tensor(rng.standard_normal((self.n, self.k)) / np.sqrt(self.k)).bfloat16()
        shapes = quantized.packed_shapes(self.n, self.k, self.bits)
        values, scales = torch.empty(shapes[0], dtype=torch.uint8), torch.empty(shapes[1])
        quantized.quantize(weight, self.bits, values, scales)
        self.values, self.scales = values.numpy(), scales.numpy()
        self.weight = dequantize(self.values, self.scales, self.n, self.k, self.bits)
        for name, size in (("bias", self.n), ("norm_weight", self.k), ("norm_bias", self.k)):
            if name in self.present:
                self.extras[name] = rng.standard_normal(size).astype(np.float32)
        self.op = build(self.bits, self.present, rows=self.n, norm=self.norm, norm_offset=self.offset,
                        activation=self.activation)  # fmt: skip

    @property
    def columns(self) -> int:
        return self.n // 2 if self.activation.endswith("_and_mul") else self.n

    def inputs(self, x, residual=None) -> list[ms.Tensor]:
        given = [tensor(x), ms.Tensor(self.values), ms.Tensor(self.scales)]
        return given + [tensor(residual if name == "residual" else self.extras[name])
                        for name in OPTIONAL if name in self.present]  # fmt: skip

    def expected(self, x, residual=None) -> np.ndarray:
        w = self.extras
        x = normalise(np.asarray(x, np.float64), self.norm, EPS, w.get("norm_weight"), w.get("norm_bias"), self.offset)
        y = activate(x @ self.weight.T + w.get("bias", 0.0), self.activation)
        return y if residual is None else y + residual


def build(bits: int, present=(), **attributes):
    defaults = {"rows": 8, "norm": "", "eps": EPS, "norm_offset": 0.0, "activation": ""}
    return registry.build(f"linear_int{bits}", "cpu", present, **{**defaults, **attributes})


def random_rows(m, k, seed=1):
    return np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)


@pytest.mark.parametrize("bits", quantized.BITS)
def test_odd_shapes_are_right(bits):
    for m, k, n in itertools.product((0, 1, 2, 5, 17, 64, 200), (1, 31, 100, 300), (1, 7, 40)):
        linear = Linear(n, k, bits)
        x = random_rows(m, k)
        assert relative_error(linear.op(*linear.inputs(x)), linear.expected(x)) < TOLERANCE, (m, k, n)


@pytest.mark.parametrize("bits", quantized.BITS)
@pytest.mark.parametrize("norm", ["", "rms", "layer"])
def test_every_fusion_is_right(bits, norm):
    norms = {"": (), "rms": ("norm_weight",), "layer": ("norm_weight", "norm_bias")}[norm]
    for activation, extras in itertools.product(ACTIVATIONS, [(), ("bias",), ("residual",), ("bias", "residual")]):
        for n in (22, 64):
            linear = Linear(n, 75, bits, activation, norm, 1.0, (*extras, *norms))
            x = random_rows(5, 75)
            residual = random_rows(5, linear.columns, 2) if "residual" in extras else None
            error = relative_error(linear.op(*linear.inputs(x, residual)), linear.expected(x, residual))
            assert error < TOLERANCE, (activation, extras, n)


@pytest.mark.parametrize("bits", quantized.BITS)
def test_one_graph_serves_every_token_count(bits):
    linear = Linear(24, 70, bits, "silu_and_mul", "rms", 0.0, ("residual", "norm_weight"))
    graph = None
    for m in (3, 17, 0, 1, 40, 3):
        x, residual = random_rows(m, 70, m), random_rows(m, 12, m + 1)
        inputs = linear.inputs(x, residual)
        if graph is None:
            graph = jit_with_dynamic_tokens(linear.op, inputs, (0, None, None, 0, None))
        got = graph(*inputs)
        assert relative_error(got, linear.expected(x, residual)) < TOLERANCE, m
        assert np.array_equal(got.asnumpy(), linear.op(*inputs).asnumpy()), "graph and PyNative differ"


@pytest.mark.parametrize("bits", quantized.BITS)
def test_a_row_does_not_depend_on_the_batch(bits):
    linear = Linear(50, 1100, bits, "silu_and_mul", "rms", 0.0, ("norm_weight",))
    x = random_rows(31, 1100)
    together = linear.op(*linear.inputs(x)).asnumpy()
    for rows in (slice(0, 1), slice(4, 6), slice(7, 10), slice(11, 15), slice(5, 30)):
        assert np.array_equal(linear.op(*linear.inputs(x[rows])).asnumpy(), together[rows]), rows


def test_leading_dimensions_are_kept():
    linear = Linear(6, 10, 4)
    x = random_rows(12, 10)
    assert relative_error(linear.op(*linear.inputs(x.reshape(3, 4, 10))), linear.expected(x).reshape(3, 4, 6)) < 1e-4


@pytest.mark.parametrize("bits", quantized.BITS)
def test_weights_take_their_bits(bits):
    values, scales = quantized.packed_shapes(4096, 1024, bits)
    assert np.prod(values) == 4096 * 1024 * bits // 8
    assert np.prod(scales) == 4096 * (8 if bits == 4 else 1)


def test_wrong_arguments_are_refused(capfd):
    linear = Linear(40, 300, 8)
    x, values, scales = linear.inputs(random_rows(3, 300))
    with pytest.raises(RuntimeError, match="weight: dimension 1 is 76, expected 72 for 40 rows"):
        linear.op(tensor(random_rows(3, 288)), values, scales)
    with pytest.raises(RuntimeError, match="scale: dimension 1 is 1, expected 3 for 40 rows"):
        build(4, rows=40)(x, ms.Tensor(linear.values[:, :38].copy()), scales)
    with pytest.raises(RuntimeError):
        linear.op(x, values.astype(ms.int8), scales).asnumpy()
    assert "weight: must be uint8" in capfd.readouterr().err
    with pytest.raises(ValueError, match="0 rows"):
        build(8, rows=0)
    with pytest.raises(ValueError, match="norm_bias is for"):
        build(8, ("norm_bias",), norm="rms")


def test_what_cannot_be_quantized_is_refused():
    values, scales = torch.empty((1, 2, 64), dtype=torch.uint8), torch.empty((1, 1, 16))
    quantized.quantize(torch.ones(3, 8), 8, values, scales)
    for weight, expected in (
        (torch.ones(3, 8, dtype=torch.float64), "expected a contiguous float matrix"),
        (torch.ones(8, 3).t(), "expected a contiguous float matrix"),
        (torch.ones(3, 9), r"values: torch.uint8 \(1, 2, 64\), expected"),
    ):
        with pytest.raises(ValueError, match=expected):
            quantized.quantize(weight, 8, values, scales)
    with pytest.raises(ValueError, match="3 bits"):
        quantized.packed_shapes(3, 8, 3)
    with pytest.raises(ValueError, match="scales: torch.float64"):
        quantized.quantize(torch.ones(3, 8), 8, values, scales.double())
