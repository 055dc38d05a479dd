"""The Ascend implementations of collectives in two operators, and of send and receive, pass MindSpore's inference."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from tests.ops.test_ascend_export import export, in_scratch_folder, ones  # noqa: F401  a fixture
from vllm_mindspore.ops import registry

TOKEN_RANKS = ms.Tensor(np.array([0, 0, 1, 1, 1], np.int32))
COUNTS = ms.Tensor(np.array([[1, 2], [3, 0]], np.int32))
ALONG, OF_ROWS = dict(dim=1, size=2), dict(rank=0, size=2)


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "primitive", "tensors", "attributes"),
    [
        ("all_reduce_start", "AllReduce", (ones(4, 8),), {}),
        ("all_gather_start", "AllGather", (ones(4, 8),), ALONG),
        ("reduce_scatter_start", "ReduceScatter", (ones(4, 8),), ALONG),
        ("reduce_scatter_rows_start", "ReduceScatterV", (ones(5, 8), TOKEN_RANKS), OF_ROWS),
        ("all_to_all_start", "AlltoAllVC", (ones(3, 8), COUNTS), OF_ROWS),
        ("send", "InnerCommIsend", (ones(4, 8),), dict(target=1)),
        ("receive", "InnerCommIrecv", (ones(4, 3),), dict(width=8, source=0)),
    ],
)
def test_what_begins_one_is_the_collective(name, primitive, tensors, attributes, wire):
    assert primitive in export(registry.build(name, "ascend", (), wire=wire, group="tp", **attributes), *tensors)


@pytest.mark.parametrize(
    ("name", "others", "attributes"),
    [
        ("all_reduce_wait", (ones(4, 8),), {}),
        ("all_gather_wait", (ones(4, 8),), ALONG),
        ("reduce_scatter_wait", (ones(4, 8),), ALONG),
        ("reduce_scatter_rows_wait", (ones(5, 8), TOKEN_RANKS, ones(2, 1)), OF_ROWS),
        ("all_to_all_wait", (ones(3, 8), COUNTS, ones(4, 1)), OF_ROWS),
    ],
)
def test_what_ends_one_is_its_result(name, others, attributes):
    export(registry.build(name, "ascend", (), wire="float32", group="tp", **attributes), ones(4, 8), *others)


def test_values_that_would_go_in_another_type_are_refused():
    with pytest.raises(ValueError, match="wire 'float16' in group 'tp': expected float32 or bfloat16"):
        registry.build("all_reduce_start", "ascend", (), wire="float16", group="tp")
