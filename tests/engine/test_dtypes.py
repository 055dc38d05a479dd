"""float16 weights and caches are served like bfloat16 ones, and a cache may have another type than the weights."""

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from tests.models.engine import engine, greedy, prompt_logprobs
from tests.models.reference import PROMPTS, reference

IDS = PROMPTS[5]
another_cache = pytest.mark.skipif(
    Version(version("vllm")) >= Version("0.33"), reason="vLLM refuses caches of another float type from 0.33 on"
)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param("float16", {}, id="float16"),
        pytest.param("float32", {"kv_cache_dtype": "bfloat16"}, id="bfloat16 cache of float32", marks=another_cache),
        pytest.param("bfloat16", {"kv_cache_dtype": "float16"}, id="float16 cache of bfloat16", marks=another_cache),
    ],
)
def test_other_types_stay_close_to_float32(dtype, options):
    stored = "bfloat16" if dtype == "bfloat16" else "float32"
    expected = reference("qwen3", stored).logits(IDS)[:-1].log_softmax(-1)
    with engine("qwen3", dtype, max_logprobs=-1, **options) as llm:
        found = prompt_logprobs(llm, IDS, expected.shape[-1])
        assert len(greedy(llm, [IDS], 8)[0]) == 8
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert divergence < 1e-3
    assert torch.isfinite(found).all()
