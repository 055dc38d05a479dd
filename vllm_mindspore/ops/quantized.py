"""Linear layers with weights of 8 or 4 bits: `linear` with its prologue and epilogue, and the making of their weights.

The layout of a quantized weight is that of csrc/kernels/quantized_weight.h, one for all instruction sets: tiles of 16
rows, which are a vector's lanes. `packed_shapes` gives its shapes, `quantize` its contents.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from vllm_mindspore.ops import build, linear
from vllm_mindspore.ops.fakes import like_input
from vllm_mindspore.ops.operator import Operator, Schema

if TYPE_CHECKING:
    import torch

TILE_ROWS, GROUP, DEPTH = 16, 128, 8  # kQuantRows, kQuantGroup, kQuantDepth
BITS = (8, 4)


def packed_shapes(rows: int, columns: int, bits: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of the uint8 values and the float32 scales of a weight [rows, columns] of 8 or 4 bits.

    Raises ValueError for other bits, or sizes that are not positive.
    """
    if bits not in BITS or rows < 1 or columns < 1:
        raise ValueError(f"a weight [{rows}, {columns}] of {bits} bits: expected positive sizes and bits in {BITS}")
    tiles, depth = -(-rows // TILE_ROWS), -(-columns // DEPTH) * DEPTH
    groups = -(-columns // GROUP) if bits == 4 else 1
    return (tiles, depth * bits // 32, 4 * TILE_ROWS), (tiles, groups, TILE_ROWS)


def quantize(weight: torch.Tensor, bits: int, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Fill `values` and `scales` (of `packed_shapes`) with `weight` [rows, columns], float32, bfloat16 or float16.

    Symmetric, rounded to nearest. bits=8: one scale a row; bits=4: one scale for 128 columns of a row, chosen for the
    least squared error. A row with a value that is not finite gives results that are not a number.
    Raises ValueError when shapes or types do not fit, build.BuildError when the library cannot be used.
    """
    import torch

    dtypes = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    if weight.dtype not in dtypes or weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError(f"cannot quantize {weight.dtype} {tuple(weight.shape)}: expected a contiguous float matrix")
    expected = packed_shapes(*weight.shape, bits)
    for name, found, shape, dtype in (
        ("values", values, expected[0], torch.uint8),
        ("scales", scales, expected[1], torch.float32),
    ):
        if tuple(found.shape) != shape or found.dtype != dtype or not found.is_contiguous():
            raise ValueError(f"{name}: {found.dtype} {tuple(found.shape)}, expected contiguous {dtype} {shape}")
    function = build.load().vllm_ms_quantize_weight
    function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int] + [
        ctypes.c_void_p
    ] * 2
    function.restype = None
    function(weight.data_ptr(), dtypes[weight.dtype], *weight.shape, bits, values.data_ptr(), scales.data_ptr())


def _fake(x, weight, scale, bias, residual, norm_weight, norm_bias, rows, norm, eps, norm_offset, activation):
    return like_input(x, (*x.shape[:-1], rows // 2 if activation.endswith("_and_mul") else rows))


def _check(given, rows, norm, eps, norm_offset, activation):
    linear.check(given, norm, eps, norm_offset, activation)
    if rows < 1:
        raise ValueError(f"a quantized weight of {rows} rows")


def _operator(name: str, cpu: str) -> Operator:
    return Operator(
        # x [..., K] f32; weight uint8 and scale f32 of packed_shapes(rows, K): everything else as in `linear`.
        name=name,
        schema=Schema.parse(
            "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, Tensor? norm_weight,"
            " Tensor? norm_bias, int rows, str norm, float eps, float norm_offset, str activation) -> Tensor"
        ),
        fake=_fake,
        cpu=cpu,
        check=_check,
    )


OPERATORS = [_operator("linear_int8", "LinearInt8"), _operator("linear_int4", "LinearInt4")]
