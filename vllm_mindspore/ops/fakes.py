"""Helpers for the torch fakes of operators; torch is imported when they are called."""

from __future__ import annotations


def like_input(x, *shape):
    """An empty float32 tensor on x's device: of x's shape, or of `shape` where that is given."""
    import torch

    return x.new_empty(shape[0] if shape else x.shape, dtype=torch.float32)
