"""RMS norm and layer norm over the last dimension."""

from __future__ import annotations

from vllm_mindspore.ops.fakes import like_input
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell


def _rms_norm_fake(x, weight, eps, offset):
    return like_input(x)


def _layer_norm_fake(x, weight, bias, eps):
    return like_input(x)


OPERATORS = [
    Operator(
        # x [..., width] f32; weight [width]; x / sqrt(mean(x^2) + eps) * (weight + offset)
        name="rms_norm",
        schema=Schema.parse("(Tensor x, Tensor? weight, float eps, float offset) -> Tensor"),
        fake=_rms_norm_fake,
        cpu="RmsNorm",
        ascend=ascend_cell("RmsNorm"),
    ),
    Operator(
        # x [..., width] f32; weight, bias [width]; (x - mean) / sqrt(var + eps) * weight + bias
        name="layer_norm",
        schema=Schema.parse("(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor"),
        fake=_layer_norm_fake,
        cpu="LayerNorm",
        ascend=ascend_cell("LayerNorm"),
    ),
]
