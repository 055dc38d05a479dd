"""Rows of two tensors side by side, between operators of ours, which then stay one sequence."""

from __future__ import annotations

from vllm_mindspore.ops.fakes import like_input
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell


def _fake(x, y):
    return like_input(x, (*x.shape[:-1], x.shape[-1] + y.shape[-1]))


OPERATORS = [
    Operator(
        # x [..., N], y [..., M] f32, alike but for their last sizes; [..., N + M]
        name="concat",
        schema=Schema.parse("(Tensor x, Tensor y) -> Tensor"),
        fake=_fake,
        cpu="Concat",
        ascend=ascend_cell("Concat"),
    ),
]
