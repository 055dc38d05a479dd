"""Weights in columns: the order in which the CPU's products of bf16 pairs read them (`csrc/columns.h`).

They can be coded in 12 bits, so that less is read (`csrc/coded.h`).
"""

from __future__ import annotations

import ctypes

GROUP = 16  # rows of a weight that keep their place together


def supported() -> bool:
    """Whether this process's kernels read weights in columns, and are faster so."""
    from vllm_mindspore.ops import build

    return bool(build.load().vllm_ms_columns_supported())


def fits(shape: tuple[int, ...], parts: int = 1) -> bool:
    """Whether a weight [n, k] or weights [..., n, k] can be in columns, cut into `parts` of equally many rows.

    k is in pairs; groups of rows must not cross from one part, or from one weight, to the next.
    """
    *several, n, k = shape
    return k % 2 == 0 and (n % (parts * GROUP) == 0 if several or parts > 1 else n > 0)


def arrange(weight, back: bool = False) -> None:
    """Put a contiguous bf16 torch tensor [..., n, k] into columns, in place; or `back` into rows.

    Raises:
        ValueError: the tensor is of another type, not contiguous, or does not fit.
    """
    function = _function("vllm_ms_arrange_columns", 4)
    function(*_matrices(weight), back)


def encode(weight) -> bool:
    """Code the upper bytes of a bf16 torch tensor that is in columns, in place: its values stay, in three quarters of
    its memory.

    Returns False, and leaves it, where it is not of whole groups, or too many elements have an upper byte that few
    others of their group have: more than have a place, or than it pays for (coded.h).

    Raises:
        ValueError: the tensor cannot be in columns.
    """
    return bool(_function("vllm_ms_encode_columns", 3)(*_matrices(weight)))


def decode(weight) -> None:
    """Take an encoded weight back to columns, in place."""
    _function("vllm_ms_decode_columns", 3)(*_matrices(weight))


def _function(name: str, integers: int):
    from vllm_mindspore.ops import build

    function = getattr(build.load(), name)
    function.argtypes, function.restype = [ctypes.c_void_p, *[ctypes.c_int64] * integers], ctypes.c_int
    return function


def _matrices(weight) -> tuple[int, int, int, int]:
    """(address, matrices, n, k)."""
    import torch

    if weight.dtype != torch.bfloat16 or not weight.is_contiguous() or not fits(tuple(weight.shape)):
        raise ValueError(
            f"a {weight.dtype} weight of shape {tuple(weight.shape)} and stride {weight.stride()} cannot be in columns"
        )
    *several, n, k = weight.shape
    return weight.data_ptr(), weight.numel() // (n * k) if several else 1, n, k
