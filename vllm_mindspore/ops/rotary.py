"""Rotary position embedding."""

from __future__ import annotations

from vllm_mindspore.ops.fakes import like_input
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell


def check_rotary_dim(head_size: int, rotary_dim: int) -> None:
    """Raise ValueError unless `rotary_dim` is even and within the head."""
    if rotary_dim <= 0 or rotary_dim % 2 or rotary_dim > head_size:
        raise ValueError(f"rotary_dim {rotary_dim}: expected an even number up to head_size {head_size}")


def _rotary_fake(positions, x, cos_sin, head_size, rotary_dim, neox):
    return like_input(x)


def _rotary_check(given, head_size, rotary_dim, neox):
    check_rotary_dim(head_size, rotary_dim)


OPERATORS = [
    Operator(
        # positions [T] int64; x [T, heads * head_size] or [T, heads, head_size] f32; cos_sin [P, rotary_dim]: cosines,
        # then sines. Rotates the first rotary_dim elements of each head, in pairs (i, i + rotary_dim / 2) if neox, else
        # (2i, 2i + 1); the others pass through. A position outside [0, P) is an error.
        name="rotary",
        schema=Schema.parse(
            "(Tensor positions, Tensor x, Tensor cos_sin, int head_size, int rotary_dim, bool neox) -> Tensor"
        ),
        fake=_rotary_fake,
        cpu="Rotary",
        ascend=ascend_cell("Rotary", "attention_ascend"),
        check=_rotary_check,
    ),
]
