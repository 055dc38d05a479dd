"""Activation functions, plain and gated (`*_and_mul`)."""

from __future__ import annotations

from vllm_mindspore.ops.fakes import like_input
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell

ACTIVATIONS = (
    "",
    "relu",
    "silu",
    "gelu",
    "gelu_tanh",
    "relu2",
    "sigmoid",
    "silu_and_mul",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
)


def check_activation(given, activation):
    """Raises ValueError unless `activation` is one of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {ACTIVATIONS}")


def _fake(x, activation):
    if activation.endswith("_and_mul"):
        return like_input(x, (*x.shape[:-1], x.shape[-1] // 2))
    return like_input(x)


OPERATORS = [
    Operator(
        # x [..., width] f32; gated ones take [..., gate || up] and give act(gate) * up, half as wide
        name="activation",
        schema=Schema.parse("(Tensor x, str activation) -> Tensor"),
        fake=_fake,
        cpu="Activation",
        ascend=ascend_cell("Activation"),
        check=check_activation,
    ),
]
