"""rms_norm and layer_norm on CPU through MindSpore."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.ops.helpers import DTYPES, jit_with_dynamic_tokens, normalise, relative_error, stored, tensor
from vllm_mindspore.ops import registry

EPS = 1e-5


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    for width, rows, weighted, offset in itertools.product((1, 7, 16, 65, 900), (0, 1, 6), (False, True), (0.0, 1.0)):
        op = registry.build("rms_norm", "cpu", ("weight",) if weighted else (), eps=EPS, offset=offset)
        x, weight = random(rows, width), random(width, seed=1)
        got = op(tensor(x), tensor(weight, dtype)) if weighted else op(tensor(x))
        expected = normalise(
            x.astype(np.float64), "rms", EPS, stored(weight, dtype) if weighted else None, None, offset
        )
        assert relative_error(got, expected) < 2e-6, (width, rows, weighted, offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype):
    for width, rows, present in itertools.product(
        (1, 7, 16, 65, 900), (0, 1, 6), ((), ("weight",), ("bias",), ("weight", "bias"))
    ):
        op = registry.build("layer_norm", "cpu", present, eps=EPS)
        x = random(rows, width) + 3.0
        weights = {name: random(width, seed=i) for i, name in enumerate(present, 1)}
        got = op(tensor(x), *(tensor(weights[name], dtype) for name in present))
        values = {name: stored(value, dtype) for name, value in weights.items()}
        expected = normalise(x.astype(np.float64), "layer", EPS, values.get("weight"), values.get("bias"))
        assert relative_error(got, expected) < 3e-6, (width, rows, present)


def test_any_rank():
    op = registry.build("rms_norm", "cpu", (), eps=EPS, offset=0.0)
    for shape in ((9,), (2, 9), (2, 3, 9), (2, 1, 3, 9)):
        x = random(*shape)
        assert relative_error(op(tensor(x)), normalise(x.astype(np.float64), "rms", EPS)) < 2e-6


def test_one_graph_serves_every_token_count():
    op = registry.build("rms_norm", "cpu", ("weight",), eps=EPS, offset=1.0)
    weight = random(48)
    graph = jit_with_dynamic_tokens(op, (tensor(random(2, 48)), tensor(weight, "bfloat16")), (0, None))
    for rows in (2, 30, 0, 1, 300):
        x = random(rows, 48, seed=rows)
        expected = normalise(x.astype(np.float64), "rms", EPS, stored(weight, "bfloat16"), None, 1.0)
        assert relative_error(graph(tensor(x), tensor(weight, "bfloat16")), expected) < 2e-6


def test_views_are_read_as_what_they_show():
    op = registry.build("rms_norm", "cpu", (), eps=EPS, offset=0.0)
    x = random(6, 10)
    for view in (lambda t: t[:, 3:9], lambda t: t.T, lambda t: t[::2]):
        assert relative_error(op(view(tensor(x))), normalise(view(x).astype(np.float64), "rms", EPS)) < 2e-6


def test_primitives_of_one_operator_keep_their_own_attributes():
    x = tensor(random(2, 8))
    first = registry.build("rms_norm", "cpu", (), eps=1e-6, offset=0.0)
    second = registry.build("rms_norm", "cpu", (), eps=10.0, offset=0.0)
    for _ in range(2):
        assert np.abs(first(x).asnumpy()).max() > 1.5 * np.abs(second(x).asnumpy()).max()


def test_wrong_width_is_refused():
    op = registry.build("rms_norm", "cpu", ("weight",), eps=EPS, offset=0.0)
    with pytest.raises(RuntimeError, match="weight: 7 against 8"):
        op(tensor(random(2, 8)), tensor(random(7)))
