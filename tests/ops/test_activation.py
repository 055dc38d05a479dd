"""activation on CPU through MindSpore."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.helpers import activate, jit_with_dynamic_tokens, relative_error, tensor
from vllm_mindspore.ops import registry
from vllm_mindspore.ops.activation import ACTIVATIONS


def random(*shape):
    return (np.random.default_rng(0).standard_normal(shape) * 3).astype(np.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_over_shapes(name):
    op = registry.build("activation", "cpu", activation=name)
    for shape in ((2,), (0, 6), (1, 2), (3, 70), (2, 3, 34), (5, 4096)):
        x = random(*shape)
        assert relative_error(op(tensor(x)), activate(x.astype(np.float64), name)) < 2e-6, shape


def test_one_graph_serves_every_token_count():
    op = registry.build("activation", "cpu", activation="silu_and_mul")
    graph = jit_with_dynamic_tokens(op, (tensor(random(2, 20)),), (0,))
    for rows in (2, 9, 0, 1):
        x = random(rows, 20)
        assert relative_error(graph(tensor(x)), activate(x.astype(np.float64), "silu_and_mul")) < 2e-6


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="'mish' is not one of"):
        registry.build("activation", "cpu", activation="mish")
    with pytest.raises(RuntimeError, match="3 is odd"):
        registry.build("activation", "cpu", activation="gelu_and_mul")(tensor(random(2, 3)))
