"""Weights and KV cache are held once, activations are reused across layers and steps, and a long run does not grow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Qwen3Config

GIB = 1 << 30


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """(rounds) → what memory_probe.py printed for the Qwen3-0.6B shape."""
    folder = tmp_path_factory.mktemp("qwen3-0.6b")
    config = Qwen3Config(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=3072, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=40960,
        architectures=["Qwen3ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)

    def run(rounds: int) -> dict:
        command = [sys.executable, str(Path(__file__).with_name("memory_probe.py")), str(folder), str(rounds)]
        return json.loads(subprocess.check_output(command, text=True, timeout=1800).splitlines()[-1])

    return run


@pytest.mark.slow
def test_the_process_stays_under_weights_kv_cache_and_the_stated_margins(probe):
    found = probe(3)
    peak = max(found["measured"])
    assert peak < found["weights"] + found["kv_cache"] + 1.5 * GIB
    assert peak - found["libraries"] - found["weights"] - found["kv_cache"] < 1 * GIB


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_long_run_does_not_grow(probe):
    measured = probe(40)["measured"]
    assert max(measured[20:]) - max(measured[5:20]) < 8 << 20
