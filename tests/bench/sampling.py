"""Milliseconds of sampling for one row of logits, by our kernels and by torch's way; run by `make bench-kernels`."""

from __future__ import annotations

import time

import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch, random_sample

from vllm_mindspore.ops import build
from vllm_mindspore.ops.sampling import argmax, sample

VOCAB = 151936
REPEATS = 7
SETTINGS = {
    "no limit": (None, None),
    "top-k 50": (50, None),
    "top-p 0.9": (None, 0.9),
    "top-k 50, top-p 0.9": (50, 0.9),
}


def best_milliseconds(function, logits: torch.Tensor) -> float:
    """The shortest of a few runs over all rows, per row; each on a copy, since torch's way writes to its input."""
    seconds = []
    for _ in range(REPEATS):
        rows = logits.clone()
        begin = time.perf_counter()
        function(rows)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * min(seconds) / len(logits)


def report(name: str, ours, torchs, logits: torch.Tensor) -> None:
    times = [best_milliseconds(function, logits) for function in (ours, torchs)]
    print(f"{name:40} {len(logits):4} rows {times[0]:9.3f} ms a row, torch {times[1]:9.3f}", flush=True)


def measure(kind: str, logits: torch.Tensor) -> None:
    rows = len(logits)
    report(f"argmax, {kind}", argmax, lambda x: x.argmax(-1), logits)
    for name, (k, p) in SETTINGS.items():
        top_k = None if k is None else torch.full((rows,), k, dtype=torch.int32)
        top_p = None if p is None else torch.full((rows,), p)
        report(
            f"{name}, {kind}",
            lambda x, k=top_k, p=top_p: sample(x, k, p, torch.rand(rows, dtype=torch.float64)),
            lambda x, k=top_k, p=top_p: random_sample(apply_top_k_top_p_pytorch(x, k, p).softmax(-1), {}),
            logits,
        )


def main() -> None:
    build.build(verbose=False)
    torch.set_num_threads(1)  # as the worker does
    torch.manual_seed(0)
    for rows in (1, 8):
        flat = torch.randn(rows, VOCAB)
        peaked = 2 * flat
        peaked[:, :64] += torch.linspace(18, 4, 64)  # what a trained model's logits look like
        measure("peaked", peaked)
        measure("flat", flat)


if __name__ == "__main__":
    main()
