"""concat on CPU through MindSpore."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.helpers import jit_with_dynamic_tokens, tensor
from vllm_mindspore.ops import registry


def rows(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "shapes", [((1, 1), (1, 1)), ((3, 5), (3, 17)), ((2, 3, 600), (2, 3, 9)), ((700, 33), (700, 1))]
)
def test_rows_side_by_side(shapes):
    x, y = rows(*shapes[0]), rows(*shapes[1], seed=1)
    got = registry.build("concat", "cpu")(tensor(x), tensor(y)).asnumpy()
    assert np.array_equal(got, np.concatenate([x, y], axis=-1))


def test_one_graph_serves_every_token_count():
    op = registry.build("concat", "cpu")
    graph = jit_with_dynamic_tokens(op, (tensor(rows(3, 8)), tensor(rows(3, 5))), (0, 0))
    for count in (3, 40, 0, 1):
        x, y = rows(count, 8), rows(count, 5, seed=1)
        assert np.array_equal(graph(tensor(x), tensor(y)).asnumpy(), np.concatenate([x, y], axis=-1))


def test_different_numbers_of_rows_are_refused():
    with pytest.raises(RuntimeError, match="rows of x and y: 2 against 3"):
        registry.build("concat", "cpu")(tensor(rows(2, 3)), tensor(rows(3, 3)))
