"""Sampling keeps what vLLM's top-k and top-p keep, and draws it as often as the softmax says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vllm_mindspore.ops import build
from vllm_mindspore.ops.sampling import argmax, sample

INF = float("inf")


@pytest.fixture(scope="module", autouse=True)
def built():
    build.build(verbose=False)


def kept_by_vllm(logits: torch.Tensor, k: int | None, p: float | None) -> torch.Tensor:
    """What `apply_top_k_top_p_pytorch` leaves of one row, in float64: [vocab], bool."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    top_k = None if k is None else torch.tensor([k], dtype=torch.int32)
    top_p = None if p is None else torch.tensor([p], dtype=torch.float32).double()
    left = apply_top_k_top_p_pytorch(logits.double()[None].clone(), top_k, top_p)[0]
    return left.softmax(-1) > 0


def tokens_at(logits: torch.Tensor, k: int | None, p: float | None, uniform: torch.Tensor) -> torch.Tensor:
    """The tokens drawn of one row at every value of `uniform`."""
    rows = len(uniform)
    top_k = None if k is None else torch.full((rows,), k, dtype=torch.int32)
    top_p = None if p is None else torch.full((rows,), p, dtype=torch.float32)
    return sample(logits.expand(rows, -1), top_k, top_p, uniform)


def check_kept(logits: torch.Tensor, kept: torch.Tensor, k: int | None = None, p: float | None = None) -> None:
    """A token of `kept` is drawn in the middle of its interval; any other is not, where its interval would be."""
    weights = (logits.double() - logits.max()).exp()
    mass = weights[kept].sum()
    before = (weights * kept).cumsum(-1) - weights * kept
    large = kept & (weights / mass > 1e-5)  # the interval of less is in the rounding of its neighbours' weights
    assert large.any()
    assert tokens_at(logits, k, p, ((before + weights / 2) / mass)[large]).tolist() == large.nonzero()[:, 0].tolist()
    others = ~kept & (weights / mass > 1e-5)
    if others.any():
        drawn = tokens_at(logits, k, p, ((before + weights / 2) / (mass + weights))[others])
        assert (drawn != others.nonzero()[:, 0]).all() and kept[drawn].all()


LIMITS = [
    (None, None), (1, None), (3, None), (50, None), (10**6, None), (0, None), (-1, None),
    (None, 1.0), (None, 0.9), (None, 0.5), (None, 0.999), (None, 1e-6),
    (50, 0.9), (5, 0.3), (2, 1.0), (700, 0.8), (10**6, 0.7),
]  # fmt: skip


@pytest.mark.parametrize("vocab", [1, 2, 33, 128, 1000, 4099])
@pytest.mark.parametrize(("k", "p"), LIMITS)
def test_what_is_kept_is_what_vllm_keeps(vocab, k, p):
    generator = torch.Generator().manual_seed(vocab)
    for scale in (1.0, 4.0):
        logits = scale * torch.randn(vocab, generator=generator)
        limit = (
            min(k, vocab) if k is not None and k > 0 else vocab
        )  # vLLM's batch has vocab where a request has no limit
        check_kept(logits, kept_by_vllm(logits, limit, p), k, p)


def test_masked_logits_are_never_drawn():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(1))
    logits[torch.arange(500) % 10 != 3] = -INF
    for k, p in [(None, None), (20, None), (400, None), (None, 0.8), (20, 0.8)]:
        kept = kept_by_vllm(logits, min(k or 500, 500), p)
        check_kept(logits, kept, k, p)
        assert tokens_at(logits, k, p, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).remainder(10).eq(3).all()


def test_a_single_finite_logit_is_always_drawn():
    logits = torch.full((300,), -INF)
    logits[217] = -5.0
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    for k, p in LIMITS:
        assert tokens_at(logits, k, p, uniform).tolist() == [217] * 3


def test_top_k_keeps_all_that_equal_the_kth_largest():
    logits = torch.zeros(1000)
    logits[::5] = 1.0
    logits[[7, 8]] = 2.0
    logits[1::5] = -0.0  # equal to 0.0
    for k, expected in [(1, logits == 2), (2, logits == 2), (3, logits >= 1), (202, logits >= 1), (203, logits >= 0)]:
        check_kept(logits, expected, k)


def test_top_p_keeps_as_few_equals_as_it_needs_the_first_ones():
    logits = torch.zeros(8)
    for p, count in [(1e-6, 1), (0.125, 1), (0.13, 2), (0.5, 4), (0.51, 5), (0.99, 8)]:
        check_kept(logits, torch.arange(8) < count, p=p)
    logits[5] = 1.0  # probability 0.28, the others 0.10 each
    check_kept(logits, torch.tensor([1, 1, 0, 0, 0, 1, 0, 0]).bool(), p=0.4)
    check_kept(logits, torch.arange(8) == 5, p=0.2)


@pytest.mark.parametrize("offset", [1e30, -1e30, 1e7, -1e7])
def test_size_of_the_logits_does_not_matter(offset):
    logits = torch.full((400,), -abs(offset) * 2)
    logits[[3, 77, 300]] = offset
    kept = logits == offset
    for k, p in [(None, None), (2, None), (3, None), (None, 0.99), (3, 0.99)]:
        check_kept(logits, kept, k, p)


def test_a_row_without_a_softmax_gives_its_argmax():
    rows = torch.randn(4, 1000)
    rows[0, 500] = float("nan")
    rows[1, 600] = INF
    rows[2] = -INF
    rows[3] = float("nan")
    for k, p in LIMITS:
        top_k = None if k is None else torch.full((4,), k, dtype=torch.int32)
        top_p = None if p is None else torch.full((4,), p)
        assert sample(rows, top_k, top_p, torch.rand(4, dtype=torch.float64)).tolist() == [500, 600, 0, 0]


def test_no_rows_give_no_tokens():
    nothing = torch.empty(0, 100)
    assert sample(nothing, None, None, torch.empty(0, dtype=torch.float64)).shape == (0,)
    assert argmax(nothing).shape == (0,)


def test_wrong_arguments_are_refused():
    logits, uniform = torch.zeros(3, 5), torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"top_k has shape \(2,\), one value for each of the 3 rows"):
        sample(logits, torch.ones(2, dtype=torch.int32), None, uniform)
    with pytest.raises(ValueError, match="uniform is torch.float32"):
        sample(logits, None, None, uniform.float())


@pytest.mark.parametrize(("k", "p"), [(None, None), (12, None), (None, 0.85), (12, 0.85)])
def test_frequencies_follow_the_softmax(k, p):
    """Chi-square over 50,000 draws: below the 99.9 % quantile (Wilson-Hilferty)."""
    generator = torch.Generator().manual_seed(5)
    logits, count = torch.randn(40, generator=generator), 50000
    kept = kept_by_vllm(logits, k, p)
    probabilities = logits.double().masked_fill(~kept, -INF).softmax(-1)
    drawn = tokens_at(logits, k, p, torch.rand(count, dtype=torch.float64, generator=generator)).bincount(minlength=40)
    assert drawn[~kept].sum() == 0
    expected = (probabilities * count)[kept]
    statistic = ((drawn[kept] - expected) ** 2 / expected).sum().item()
    freedom = int(kept.sum()) - 1
    assert freedom > 5
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("vocab", [1, 100, 151936])
def test_argmax_is_torchs(vocab):
    logits = torch.randn(5, vocab + 9)[:, :vocab]
    logits[1, vocab // 2 :] = 9.0
    logits[2] = -INF
    logits[3, vocab // 3 :] = float("nan")
    assert argmax(logits).tolist() == logits.argmax(-1).tolist()
    assert argmax(logits.T.contiguous().T).tolist() == logits.argmax(-1).tolist()
    assert argmax(logits.bfloat16()).tolist() == logits.bfloat16().float().argmax(-1).tolist()


def test_one_row_in_a_batch_is_the_row_alone():
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(6, 20011, generator=generator)
    top_k = torch.tensor([50, 20011, 1, 3000, 20011, 7], dtype=torch.int32)
    top_p = torch.tensor([0.9, 0.9, 1.0, 0.5, 1.0, 1.0])
    uniform = torch.rand(6, dtype=torch.float64, generator=generator)
    together = sample(logits, top_k, top_p, uniform).tolist()
    alone = [sample(*(values[r : r + 1] for values in (logits, top_k, top_p, uniform))).item() for r in range(6)]
    assert together == alone


DRAW = """
import torch
from vllm_mindspore.ops.sampling import argmax, sample
generator = torch.Generator().manual_seed(4)
for rows in (1, 2, 5):
    logits = 2 * torch.randn(rows, 50001, generator=generator)
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
    for k, p in ((None, None), (40, None), (None, 0.95), (40, 0.9), (30000, 0.9)):
        top_k = None if k is None else torch.full((rows,), k)
        top_p = None if p is None else torch.full((rows,), p)
        print(sample(logits, top_k, top_p, uniform).tolist(), argmax(logits).tolist())
"""


def test_threads_do_not_change_a_token():
    def output(threads: int) -> str:
        env = {**os.environ, "VLLM_MS_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, "-c", DRAW], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    one = output(1)
    assert one.count("\n") == 15
    assert output(2) == one and output(3) == one
