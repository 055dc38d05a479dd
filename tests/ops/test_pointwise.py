"""binary on CPU through MindSpore."""

from __future__ import annotations

import itertools

import mindspore as ms
import numpy as np
import pytest

from tests.ops.helpers import DTYPES, jit_with_dynamic_tokens, relative_error, stored, tensor
from vllm_mindspore.ops import registry
from vllm_mindspore.ops.pointwise import BINARY_OPS

NUMPY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
NUMPY |= {"maximum": np.maximum, "minimum": np.minimum}
SHAPES = [((), ()), ((5,), ()), ((3, 4), (4,)), ((3, 1), (1, 7)), ((2, 3, 600), (3, 1)), ((0, 4), (4,))]
SHAPES += [((2, 1, 3, 1, 5), (4, 1, 2, 5)), ((9, 700), (9, 700)), ((1,), (2, 2, 2, 2, 2))]


def random(shape, seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


@pytest.mark.parametrize("op", BINARY_OPS)
def test_broadcasting(op):
    primitive = registry.build("binary", "cpu", op=op)
    for x_shape, y_shape in SHAPES:
        x, y = random(x_shape), random(y_shape, 1)
        for a, b in ((x, y), (y, x)):
            expected = NUMPY[op](a.astype(np.float64), b.astype(np.float64))
            assert relative_error(primitive(tensor(a), tensor(b)), expected) < 1e-6, (a.shape, b.shape)


def test_storage_types_mix():
    primitive = registry.build("binary", "cpu", op="mul")
    for x_dtype, y_dtype in itertools.product(DTYPES, DTYPES):
        x, y = random((3, 50)), random((50,), 1)
        expected = stored(x, x_dtype) * stored(y, y_dtype)
        assert relative_error(primitive(tensor(x, x_dtype), tensor(y, y_dtype)), expected) < 1e-6


def test_one_graph_serves_every_token_count():
    primitive = registry.build("binary", "cpu", op="mul")
    scale = random((1, 6, 1), 1)
    graph = jit_with_dynamic_tokens(primitive, (tensor(random((2, 6, 8))), tensor(scale)), (0, None))
    for tokens in (2, 13, 0, 1):
        x = random((tokens, 6, 8), tokens)
        assert relative_error(graph(tensor(x), tensor(scale)), x.astype(np.float64) * scale) < 1e-6


def test_both_operands_with_dynamic_tokens():
    primitive = registry.build("binary", "cpu", op="add")
    graph = jit_with_dynamic_tokens(primitive, (tensor(random((2, 8))), tensor(random((2, 1)))), (0, 0))
    for tokens in (2, 5, 0, 1):
        x, y = random((tokens, 8)), random((tokens, 1), 1)
        assert relative_error(graph(tensor(x), tensor(y)), x.astype(np.float64) + y) < 1e-6


@pytest.mark.parametrize("op", BINARY_OPS)
def test_with_a_constant(op):
    primitive = registry.build("binary_scalar", "cpu", y=0.3, op=op)
    assert registry.build("binary_scalar", "cpu", y=1, op=op)(tensor(random((2,)))).shape == (2,)
    graph = jit_with_dynamic_tokens(primitive, (tensor(random((2, 3, 700))),), (0,))
    for tokens in (2, 13, 0, 1):
        x = random((tokens, 3, 700), tokens)
        both = registry.build("binary", "cpu", op=op)(tensor(x), tensor(np.float32(0.3))).asnumpy()
        assert np.array_equal(graph(tensor(x)).asnumpy(), both)
        assert relative_error(graph(tensor(x)), NUMPY[op](x.astype(np.float64), np.float32(0.3))) < 1e-6
    with pytest.raises(ValueError, match="op 'pow' is not one of"):
        registry.build("binary_scalar", "cpu", y=0.3, op="pow")


def test_wrong_arguments_are_refused(capfd):
    with pytest.raises(ValueError, match="op 'pow' is not one of"):
        registry.build("binary", "cpu", op="pow")
    add = registry.build("binary", "cpu", op="add")
    with pytest.raises(RuntimeError, match="cannot broadcast 3 with 4"):
        add(tensor(random((2, 3))), tensor(random((2, 4))))
    with pytest.raises(RuntimeError, match="rank 6 above 5"):
        add(tensor(random((1,) * 6)), tensor(random((1,))))
    with pytest.raises(RuntimeError):
        add(ms.Tensor(np.zeros(3, np.int32)), tensor(random((3,)))).asnumpy()
    assert "x: must be float32, bfloat16 or float16" in capfd.readouterr().err
