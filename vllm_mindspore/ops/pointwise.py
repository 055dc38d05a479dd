"""Broadcasting arithmetic. MindSpore's own on CPU keeps some 20 bytes per output element in every instance for ever."""

from __future__ import annotations

from vllm_mindspore.ops.fakes import like_input
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell

BINARY_OPS = ("add", "sub", "mul", "div", "maximum", "minimum")


def _binary_fake(x, y, op):
    import torch

    return like_input(x, torch.broadcast_shapes(x.shape, y.shape))


def _binary_scalar_fake(x, y, op):
    return like_input(x)


def _check_binary(given, op, **_):
    if op not in BINARY_OPS:
        raise ValueError(f"binary: op {op!r} is not one of {BINARY_OPS}")


OPERATORS = [
    Operator(
        # x, y f32, bf16 or fp16, rank at most 5, broadcast against each other; result f32
        name="binary",
        schema=Schema.parse("(Tensor x, Tensor y, str op) -> Tensor"),
        fake=_binary_fake,
        cpu="Binary",
        ascend=ascend_cell("Binary"),
        check=_check_binary,
    ),
    Operator(
        # x f32, bf16 or fp16, any rank; x op y in float32
        name="binary_scalar",
        schema=Schema.parse("(Tensor x, float y, str op) -> Tensor"),
        fake=_binary_scalar_fake,
        cpu="BinaryScalar",
        ascend=ascend_cell("BinaryScalar"),
        check=_check_binary,
    ),
]
