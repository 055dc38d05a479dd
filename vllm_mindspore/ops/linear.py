"""The fused linear layer: norm, matrix product, bias, activation and residual in one operator."""

from __future__ import annotations

from vllm_mindspore.ops import columns
from vllm_mindspore.ops.activation import check_activation
from vllm_mindspore.ops.fakes import like_input
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell

NORMS = ("", "rms", "layer")


def _fake(x, weight, bias, residual, norm_weight, norm_bias, norm, eps, norm_offset, activation):
    columns = weight.shape[0] // 2 if activation.endswith("_and_mul") else weight.shape[0]
    return like_input(x, (*x.shape[:-1], columns))


def check(given, norm, eps, norm_offset, activation):
    """Raises ValueError for a norm or an activation that no linear operator has."""
    check_activation(given, activation)
    if norm not in NORMS:
        raise ValueError(f"linear: norm {norm!r} is not one of {NORMS}")
    if "norm_bias" in given and norm != "layer":
        raise ValueError("linear: norm_bias is for norm='layer' only")
    if "norm_weight" in given and not norm:
        raise ValueError("linear: norm_weight given without a norm")


def _columns(shapes, attributes):
    parts = 2 if attributes["activation"].endswith("_and_mul") else 1
    return {"weight"} if columns.fits(shapes["weight"], parts) else set()


OPERATORS = [
    Operator(
        # x [..., K] f32, weight [N, K]; act(norm(x) @ weight^T + bias) + residual, [..., N]. *_and_mul: weight rows are
        # [gate; up], result [..., N / 2]. rms norm multiplies by (norm_weight + norm_offset).
        name="linear",
        schema=Schema.parse(
            "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias,"
            " str norm, float eps, float norm_offset, str activation) -> Tensor"
        ),
        fake=_fake,
        cpu="Linear",
        ascend=ascend_cell("Linear"),
        check=check,
        columns=_columns,
    ),
]
