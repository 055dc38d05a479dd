"""Sampling from logits on torch's memory: argmax, and a draw restricted by top-k and top-p (`kernels/sample.h`).

A step's last part, outside MindSpore's graph: the C++ library is called directly.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from vllm_mindspore.ops import build

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.load()
    library.vllm_ms_argmax_rows.argtypes = [_POINTER, _SIZE, _SIZE, _SIZE, _POINTER]
    library.vllm_ms_argmax_rows.restype = None
    library.vllm_ms_sample_rows.argtypes = [_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER]
    library.vllm_ms_sample_rows.restype = None
    return library


def _rows(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The index of the largest logit of each row, the lowest among equals; of the first NaN where there is one.

    logits: [rows, vocab], on the host. Returns [rows], int64.
    """
    logits = _rows(logits)
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    _library().vllm_ms_argmax_rows(logits.data_ptr(), rows, vocab, logits.stride(0), tokens.data_ptr())
    return tokens


def sample(
    logits: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, uniform: torch.Tensor
) -> torch.Tensor:
    """A token of each row, drawn from its softmax restricted by top-k, then by top-p.

    top-k keeps every logit that is not below the k-th largest; top-p keeps the fewest most probable tokens that sum to
    p or more, at least one, the lower index first among equals. The draw inverts the distribution function over the
    kept tokens, in the order of the vocabulary, at `uniform`. A row that has no softmax (NaN, +inf, nothing but -inf)
    gives its argmax.

    logits: [rows, vocab], on the host; unchanged.
    top_k: [rows], integers, below 1 or at least vocab for all; top_p: [rows], floats, 1 for all.
    uniform: [rows], float64 in [0, 1).
    Returns [rows], int64.
    """
    logits, uniform = _rows(logits), uniform.contiguous()
    rows, vocab = logits.shape
    for name, values in (("top_k", top_k), ("top_p", top_p), ("uniform", uniform)):
        if values is not None and values.shape != (rows,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}, one value for each of the {rows} rows is needed")
    if uniform.dtype != torch.float64:
        raise ValueError(f"uniform is {uniform.dtype}, torch.float64 is needed")
    top_k = None if top_k is None else top_k.to(torch.int32).contiguous()
    top_p = None if top_p is None else top_p.to(torch.float32).contiguous()
    tokens = torch.empty(rows, dtype=torch.int64)
    _library().vllm_ms_sample_rows(
        logits.data_ptr(),
        rows,
        vocab,
        logits.stride(0),
        None if top_k is None else top_k.data_ptr(),
        None if top_p is None else top_p.data_ptr(),
        uniform.data_ptr(),
        tokens.data_ptr(),
    )
    return tokens
