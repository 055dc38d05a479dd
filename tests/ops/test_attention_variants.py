"""Attention for every instruction set and number of threads; each needs a process of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.helpers import lower_instruction_sets

ROOT = Path(__file__).parents[2]
TESTS = ["test_attention.py", "test_attention_qkv.py", "test_rotary.py", "test_kv_cache.py", "test_mla.py"]


def subprocess_with(arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow  # tests/ops/native tests the kernels of all instruction sets
@pytest.mark.parametrize("isa", lower_instruction_sets())
def test_lower_instruction_sets(isa):
    files = [str(ROOT / "tests" / "ops" / name) for name in TESTS]
    selection = "float64 or bits or trace or rounds or long"
    out = subprocess_with(["-m", "pytest", "-q", "-x", "-k", selection, *files], VLLM_MS_CPU_ISA=isa)
    assert " passed" in out


def test_bits_do_not_depend_on_threads():
    digests = {n: subprocess_with(["-m", "tests.ops.test_attention_variants"], VLLM_MS_NUM_THREADS=str(n)).split()
               for n in (1, 2, 7)}  # fmt: skip
    assert len(digests[1]) == 9
    assert digests[1] == digests[2] == digests[7]


def print_digests():
    """Prints a hash of the result for steps that are divided differently for different numbers of threads."""
    import numpy as np

    from tests.ops.mla_reference import FusedCase, Sizes
    from tests.ops.test_attention import FEATURES, make, run
    from tests.ops.test_attention_qkv import Case

    rng = np.random.default_rng(0)
    for requests, heads in (
        ([(1, 9000)], (4, 1)),  # one request: its splits are shared out
        ([(300, 3000)], (4, 2)),
        ([(1, 600 + 40 * i) for i in range(9)], (8, 8)),
    ):
        step, query = make(rng, requests, *heads, 64, 16, "bfloat16")
        features = FEATURES["all"] if heads[0] == 4 else {}
        print(hashlib.sha256(run(query, step, heads[0], "bfloat16", **features).tobytes()).hexdigest())
    for norm in ("", "head", "full"):
        case = Case(norm=norm, dtype="bfloat16", requests=[(200, 260), (1, 690)])
        print(hashlib.sha256(case.run().tobytes() + case.cache.tobytes()).hexdigest())
    for requests in ([(1, 3900)], [(40, 3900), (1, 700)], [(300, 900), (70, 70), *[(1, 90)] * 70]):
        case = FusedCase(Sizes(40, 64, 32, 64, 128), requests, cache="bfloat16", weights="bfloat16")
        print(hashlib.sha256(case.run().tobytes()).hexdigest())


if __name__ == "__main__":
    print_digests()
