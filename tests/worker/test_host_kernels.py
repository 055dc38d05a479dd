"""vLLM's dispatcher takes our kernels whatever else is loaded."""

import sys

from vllm_mindspore.worker import rejection_kernels
from vllm_mindspore.worker.host_kernels import hand_over


def test_after_numba_was_imported():
    import llvmlite.binding  # as numba does
    from vllm.v1.sample import rejection_sampler

    hand_over(rejection_kernels.KERNELS)
    assert rejection_sampler.expand_kernel.func is rejection_kernels.expand
    assert sys.modules["llvmlite.binding"] is llvmlite.binding
