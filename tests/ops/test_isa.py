"""The operators' tests again with each slower instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.ops.helpers import lower_instruction_sets

FILES = ["test_linear.py", "test_quantized.py", "test_norm.py", "test_activation.py", "test_embedding.py"]
FILES += ["test_pointwise.py", "test_moe.py", "test_moe_route.py", "test_indexer.py", "test_sampling.py"]


@pytest.mark.slow  # tests/ops/native tests the kernels of all instruction sets
@pytest.mark.skipif("VLLM_MS_CPU_ISA" in os.environ, reason="an instruction set is chosen already")
@pytest.mark.parametrize("isa", lower_instruction_sets())
def test_operators_with(isa):
    folder = os.path.dirname(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [os.path.join(folder, name) for name in FILES]
    env = {**os.environ, "VLLM_MS_CPU_ISA": isa}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
