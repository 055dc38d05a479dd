"""embedding on CPU through MindSpore."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from tests.ops.helpers import DTYPES, jit_with_dynamic_tokens, relative_error, stored, tensor
from vllm_mindspore.ops import registry


def table(rows, width):
    return np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)


def lookup(ids, weight):
    inside = (ids >= 0) & (ids < len(weight))
    return np.where(inside[..., None], weight[np.where(inside, ids, 0)], 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [np.int32, np.int64])
def test_rows_of_any_ids(dtype, id_dtype):
    op = registry.build("embedding", "cpu")
    for width in (1, 16, 37):
        weight = table(11, width)
        ids = np.array([0, 10, -1, 11, 5, 2**31 - 1, -(2**31), 5], id_dtype)
        expected = lookup(ids.astype(np.int64), stored(weight, dtype))
        got = op(ms.Tensor(ids), tensor(weight, dtype))
        assert relative_error(got, expected) == 0.0


def test_one_graph_serves_every_token_count():
    op = registry.build("embedding", "cpu")
    weight = tensor(table(50, 24), "bfloat16")
    graph = jit_with_dynamic_tokens(op, (ms.Tensor(np.zeros(3, np.int64)), weight), (0, None))
    for count in (3, 70, 0, 1):
        ids = np.arange(count, dtype=np.int64) % 50
        expected = lookup(ids, stored(table(50, 24), "bfloat16"))
        assert relative_error(graph(tensor(ids), weight), expected) == 0.0


def test_float_ids_are_refused(capfd):
    with pytest.raises(RuntimeError):
        registry.build("embedding", "cpu")(tensor(np.zeros(3)), tensor(table(5, 4))).asnumpy()
    assert "ids: must be int32 or int64" in capfd.readouterr().err
