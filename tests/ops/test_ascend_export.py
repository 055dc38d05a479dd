"""The Ascend implementations pass MindSpore's own type and shape inference, by export on this machine.

What has a CPU kernel in MindSpore is also run here against the CPU operator.
"""

from __future__ import annotations

import itertools
import re

import mindspore as ms
import numpy as np
import pytest

from tests.ops.helpers import Call, tensor
from vllm_mindspore.ops import registry
from vllm_mindspore.ops.activation import ACTIVATIONS
from vllm_mindspore.ops.pointwise import BINARY_OPS


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a refused export leaves a dump in the working directory


def export(op, *inputs) -> set[str]:
    """Names of the primitives in the exported graph."""
    ms.export(Call(op), *inputs, file_name="model", file_format="MINDIR")
    with open("model.mindir", "rb") as file:
        return {name.decode() for name in re.findall(rb"REF::(\w+):\d+", file.read())}


def ones(*shape, dtype="float32"):
    return tensor(np.ones(shape, np.float32), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("norm", ["", "rms", "layer"])
def test_linear(norm, dtype):
    shapes = {"bias": (12,), "residual": (4, 6), "norm_weight": (8,), "norm_bias": (8,)}
    norms = {"": (), "rms": ("norm_weight",), "layer": ("norm_weight", "norm_bias")}[norm]
    for present in ((), ("bias", "residual", *norms), norms):
        attributes = {"norm": norm, "eps": 1e-6, "norm_offset": 1.0, "activation": "silu_and_mul"}
        op = registry.build("linear", "ascend", present, **attributes)
        inputs = [ones(4, 8), ones(12, 8, dtype=dtype)]
        for name in shapes:
            if name in present:
                inputs.append(ones(*shapes[name], dtype="float32" if name == "residual" else dtype))
        graph = export(op, *inputs)
        assert {"Dense", "Swiglu"} <= graph
        assert ("RmsNorm" in graph) == (norm == "rms" and "norm_weight" in present)
        assert ("LayerNormExt" in graph) == (norm == "layer")


def test_linear_with_a_wrong_weight_is_refused():
    op = registry.build("linear", "ascend", (), norm="", eps=0.0, norm_offset=0.0, activation="")
    with pytest.raises(ValueError, match="x_col: 8, w_row: 9"):
        export(op, ones(4, 8), ones(12, 9))


def test_norms():
    for weighted, offset in itertools.product((False, True), (0.0, 1.0)):
        op = registry.build("rms_norm", "ascend", ("weight",) if weighted else (), eps=1e-6, offset=offset)
        graph = export(op, ones(4, 8), *([ones(8, dtype="bfloat16")] if weighted else []))
        assert ("RmsNorm" in graph) == weighted
    for present in ((), ("weight",), ("bias",), ("weight", "bias")):
        op = registry.build("layer_norm", "ascend", present, eps=1e-6)
        assert "LayerNormExt" in export(op, ones(2, 4, 8), *(ones(8) for _ in present))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation):
    graph = export(registry.build("activation", "ascend", (), activation=activation), ones(4, 8))
    fused = {"silu_and_mul": "Swiglu", "silu": "SiLU", "relu": "ReLU", "relu2": "ReLU", "sigmoid": "Sigmoid"}
    assert fused.get(activation, "GeluExt") in graph or activation == ""


@pytest.mark.parametrize(("name", "attributes"), [("embedding", {}), ("embedding_shard", {"first": 3})])
def test_embedding_also_runs(name, attributes):
    ids = ms.Tensor(np.array([2, -1, 0, 5, 8], np.int32))
    weight = tensor(np.arange(15).reshape(5, 3).astype(np.float32), "bfloat16")
    op = registry.build(name, "ascend", **attributes)
    assert "Gather" in export(op, ids, weight)
    weight = weight.astype(ms.float32)
    expected = registry.build(name, "cpu", **attributes)(ids, weight).asnumpy()
    assert np.array_equal(op(ids, weight).asnumpy(), expected)


@pytest.mark.parametrize("name", BINARY_OPS)
def test_binary_also_runs(name):
    x, y = tensor(np.linspace(-2, 2, 12).reshape(4, 3)), tensor([1.0, -2.0, 0.5], "bfloat16")
    op = registry.build("binary", "ascend", op=name)
    export(op, x, y)
    assert np.array_equal(op(x, y).asnumpy(), registry.build("binary", "cpu", op=name)(x, y).asnumpy())


@pytest.mark.parametrize("name", BINARY_OPS)
def test_binary_scalar_also_runs(name):
    x = tensor(np.linspace(-2, 2, 12).reshape(4, 3))
    op = registry.build("binary_scalar", "ascend", y=0.3, op=name)
    export(op, x)
    assert np.array_equal(op(x).asnumpy(), registry.build("binary_scalar", "cpu", y=0.3, op=name)(x).asnumpy())


def test_concat_also_runs():
    x, y = ones(4, 3), ones(4, 5)
    op = registry.build("concat", "ascend")
    assert "Concat" in export(op, x, y)
    assert np.array_equal(op(x, y).asnumpy(), registry.build("concat", "cpu")(x, y).asnumpy())


@pytest.mark.parametrize("activation", ["", "relu", "relu2", "silu"])
def test_activation_also_runs(activation):
    x = tensor(np.linspace(-6, 6, 50).reshape(5, 10))
    theirs = registry.build("activation", "ascend", activation=activation)(x).asnumpy()
    ours = registry.build("activation", "cpu", activation=activation)(x).asnumpy()
    assert np.allclose(theirs, ours, rtol=1e-4, atol=1e-4)


class Multiplied(ms.nn.Cell):
    """What `op` returns times a matrix: its inference sees the shape."""

    def __init__(self, op):
        super().__init__()
        self.op = op

    def construct(self, x, matrix):
        return ms.ops.matmul(self.op(x), matrix)


@pytest.mark.parametrize(
    ("name", "primitive", "dim", "width"),
    [
        ("all_gather", "AllGather", 1, 16),
        ("all_gather", "AllGather", 0, 8),
        ("reduce_scatter", "ReduceScatter", 1, 4),
    ],
)
def test_collectives_that_resize(name, primitive, dim, width):
    op = registry.build(name, "ascend", (), dim=dim, size=2, group="tp")
    assert primitive in export(Multiplied(op), ones(4, 8), ones(width, 3))
    with pytest.raises((ValueError, RuntimeError)):
        export(Multiplied(op), ones(4, 8), ones(width + 1, 3))


def test_all_reduce():
    assert "AllReduce" in export(registry.build("all_reduce", "ascend", (), group="tp"), ones(4, 8))
