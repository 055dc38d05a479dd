"""vLLM's sampler with its passes over the vocabulary done by our kernels.

Penalties, bias, masks, temperature, min_p and logprobs stay vLLM's. Top-k, top-p and the random draw, which sort the
vocabulary there, are one call of `ops/sampling.py`, and the argmax another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.sample.sampler import Sampler

from vllm_mindspore.ops.sampling import argmax, sample


def uniforms(rows: int, generators: dict[int, torch.Generator]) -> torch.Tensor:
    """One number in [0, 1) a row, float64; of the row's own generator where it has one, so that its seed decides."""
    if len(generators) == rows:
        values = torch.empty(rows, dtype=torch.float64)
    else:
        values = torch.rand(rows, dtype=torch.float64)
    for row, generator in generators.items():
        values[row] = torch.rand((), dtype=torch.float64, generator=generator)
    return values


@contextlib.contextmanager
def set_aside(generators: dict[int, torch.Generator], rows: Iterable[int]) -> Iterator[None]:
    """Take the generators of `rows` out of the batch and put them back: what these rows draw meanwhile is not theirs.

    For rows whose token is thrown away because their prompt is not complete. vLLM lets them draw and then moves the
    generator's offset back, which raises for a generator of the host.
    """
    aside = {row: generators.pop(row) for row in rows if row in generators}
    try:
        yield
    finally:
        generators.update(aside)


def _top_k_top_p(
    logits: torch.Tensor,
    generators: dict[int, torch.Generator],
    k: torch.Tensor | None,
    p: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """`TopKTopPSampler.forward` where no processed logits or logprobs are to be returned."""
    return sample(logits, k, p, uniforms(logits.shape[0], generators)), None


def draws_by_kernel(sampler: Sampler) -> bool:
    """Whether random tokens of this `sampler` are our kernel's: see `use_kernels`."""
    return sampler.logprobs_mode not in PROCESSED_LOGPROBS_MODES and not sampler.use_fp64_gumbel


def use_kernels(sampler: Sampler) -> None:
    """Make this `sampler`, and whatever else holds it, call our kernels.

    Random draws stay vLLM's where it must return logits or logprobs after top-k and top-p (`logprobs_mode`), or is
    asked for its own float64 noise (`use_fp64_gumbel`).
    """
    sampler.greedy_sample = argmax
    if draws_by_kernel(sampler):
        sampler.topk_topp_sampler.forward = _top_k_top_p
