"""What the operator tests share: MindSpore tensors of a storage type, and calls in each of MindSpore's modes."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from vllm_mindspore.ops import build

DTYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16}


def tensor(array, dtype: str | None = None) -> ms.Tensor:
    """A tensor of `array`, float arrays as `dtype`; also for empty arrays, which Tensor() refuses."""
    array = np.asarray(array, order="C")
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.size == 0:
        return ops.zeros(array.shape, DTYPES[dtype or "float32"] if array.dtype.kind == "f" else ms.int64)
    made = ms.Tensor(array)
    return made if dtype is None else made.astype(DTYPES[dtype])


def stored(array, dtype: str) -> np.ndarray:
    """float64 values of `array` after rounding to `dtype`."""
    return tensor(array, dtype).astype(ms.float32).asnumpy().astype(np.float64)


def current_isa() -> str:
    return build.kernel_info()["isa"]


def lower_instruction_sets() -> list[str]:
    """Those of the library that this machine has and that the tests do not use anyway, the slowest first."""
    variants, current = build.read_build_info().get("isa_variants", []), current_isa()
    return variants[: variants.index(current)] if current in variants else []


class Call(nn.Cell):
    """One operator as a network."""

    def __init__(self, op):
        super().__init__()
        self.op = op

    def construct(self, *tensors):
        return self.op(*tensors)


def jit_with_dynamic_tokens(op, example, token_axes):
    """A compiled graph of `op` in which axis `token_axes[i]` of input i has any size (None: all axes fixed)."""
    net = Call(op)
    signature = []
    for value, axis in zip(example, token_axes, strict=True):
        shape = [None if i == axis else n for i, n in enumerate(value.shape)]
        signature.append(ms.Tensor(shape=shape, dtype=value.dtype) if axis is not None else value)
    net.set_inputs(*signature)
    return ms.jit(net, capture_mode="ast", jit_level="O0")


def relative_error(actual: ms.Tensor, expected: np.ndarray) -> float:
    """Largest |actual - expected| / (1 + |expected|); shapes and dtype float32 are checked."""
    assert actual.dtype == ms.float32
    assert tuple(actual.shape) == expected.shape
    if expected.size == 0:
        return 0.0
    values = actual.asnumpy().astype(np.float64)
    assert np.isfinite(values).all()
    return float((np.abs(values - expected) / (1.0 + np.abs(expected))).max())


_ERF = np.vectorize(math.erf, otypes=[float])

ACTIVATIONS = {
    "": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _ERF(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def activate(x: np.ndarray, name: str) -> np.ndarray:
    """The contract's activations in float64."""
    if name.endswith("_and_mul"):
        gate, up = np.split(x, 2, axis=-1)
        return ACTIVATIONS[name.removesuffix("_and_mul")](gate) * up
    return ACTIVATIONS[name](x)


def normalise(x: np.ndarray, norm: str, eps: float, weight=None, bias=None, offset=0.0) -> np.ndarray:
    """RMS ("rms"), layer ("layer") or no ("") norm over the last axis in float64."""
    if norm == "rms":
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    if norm == "layer":
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    if weight is not None:
        x = x * (weight + (offset if norm == "rms" else 0.0))
    return x if bias is None else x + bias
