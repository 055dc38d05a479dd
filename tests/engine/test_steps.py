"""What a step must not do: take memory from the system, compile, or copy a tensor on its way there or back."""

import ctypes
import random

import mindspore
import numpy as np
import pytest

from tests.models.engine import engine, greedy, statistics
from vllm_mindspore.compiler.program import Program
from vllm_mindspore.ops import build
from vllm_mindspore.ops.cpu import sequence
from vllm_mindspore.worker import facts

NUMBERS = random.Random(0)
PROMPTS = [[NUMBERS.randrange(3, 70) for _ in range(length)] for length in (1, 9, 30, 61)]
FAMILIES = ["qwen3", "gemma3", "deepseek-v3-moe", "qwen3-moe"]


@pytest.fixture
def watched_addresses():
    """watched_addresses(): of the last launch's inputs and, at the end, of its result."""
    library = build.load()
    library.vllm_ms_watch_addresses(1)

    def last() -> list[int]:
        found = (ctypes.c_int64 * 4096)()
        count = library.vllm_ms_launch_addresses(found, len(found))
        assert count <= len(found)
        return list(found[:count])

    yield last
    library.vllm_ms_watch_addresses(0)


def model_runner(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_caches_inputs_and_results_are_never_copied(family, monkeypatch, watched_addresses):
    calls, results, call = [], [], Program.__call__

    def noted_call(self, inputs):
        calls.append([tensor.asnumpy().ctypes.data for tensor in inputs if tensor.dtype != mindspore.bfloat16])
        return call(self, inputs)

    with engine(family) as llm:
        runner = model_runner(llm)
        weights, compute_logits = facts.tensors_of(runner.model), runner.model.compute_logits

        def noted_logits(hidden_states):
            logits = compute_logits(hidden_states)
            results.append((watched_addresses(), logits.untyped_storage().data_ptr()))
            return logits

        monkeypatch.setattr(Program, "__call__", noted_call)
        monkeypatch.setattr(runner.model, "compute_logits", noted_logits)
        expected = {weights[item.name].data_ptr() for item in runner.step.model.emitted.weights}
        greedy(llm, PROMPTS, 5)
        assert len(results) >= 5
        for inputs, (addresses, result) in zip(calls, results, strict=True):
            assert set(addresses[:-1]) == expected | set(inputs)
            assert result == addresses[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_steady_work_takes_no_memory_and_compiles_nothing(family):
    library = build.load()
    library.vllm_ms_scratch_allocations.restype = ctypes.c_int64

    def compiled(llm) -> list[int]:
        return [graph["compiles"] + graph["loads"] for graph in statistics(llm).values()]

    with engine(family, enable_prefix_caching=False) as llm:
        before, taken = compiled(llm), []
        for _ in range(6):  # which thread needs how much at once is not the same every time: it settles
            allocations = library.vllm_ms_scratch_allocations()
            greedy(llm, PROMPTS, 40)
            taken.append(library.vllm_ms_scratch_allocations() - allocations)
            if taken[-1] == 0:
                break
        assert taken[-1] == 0, f"buffers taken in each round of the same requests: {taken}"
        assert compiled(llm) == before


def test_a_copy_would_be_seen(watched_addresses):
    """The two tests above read what a launch notes: a launch on other memory notes other addresses."""
    first, second = np.ones((2, 8), np.float32), np.ones((2, 8), np.float32)
    step = sequence("x", "y = activation x activation=relu")
    for array in (first, second):
        result = step(mindspore.Tensor.from_numpy(array)).asnumpy()
        assert watched_addresses() == [array.ctypes.data, result.ctypes.data]
