"""Weights loaded into a running model take effect, whatever order its operators read them in."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.checkpoints import checkpoint
from tests.models.engine import engine, prompt_logprobs, statistics
from tests.models.reference import PROMPTS, reference
from vllm_mindspore.ops import columns

IDS = max(PROMPTS, key=len)


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """With exponents that are too different to be coded."""
    return tensor * torch.logspace(-30, 0, tensor.shape[-1]).to(tensor.dtype)


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "float32"), ("qwen3", "bfloat16"), ("qwen3-moe", "bfloat16")])
def test_a_running_model_takes_new_weights(family, dtype, tmp_path):
    old = checkpoint(family, dtype)
    vocabulary = reference(family).logits([5]).shape[-1]
    weights = {name: tensor for file in sorted(old.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    changed = {name: spread(tensor) if "o_proj" in name else tensor for name, tensor in weights.items()}
    new = tmp_path / "new"
    shutil.copytree(old, new, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(changed, new / "model.safetensors", {"format": "pt"})
    with engine(family, dtype, new, max_logprobs=-1) as llm:
        expected = prompt_logprobs(llm, IDS, vocabulary)
    with engine(family, dtype, old, max_logprobs=-1) as llm:
        before, coded = prompt_logprobs(llm, IDS, vocabulary), []
        for given, wanted in ((weights, before), (changed, expected), (weights, before)):
            llm.apply_model(lambda model, given=given: model.load_weights(iter(given.items())))
            assert torch.equal(prompt_logprobs(llm, IDS, vocabulary), wanted)
            coded.append(statistics(llm)["model"]["weights_coded"])
        short = {name: tensor[:-1] if "down_proj" in name else tensor for name, tensor in weights.items()}
        with pytest.raises((AssertionError, RuntimeError)):  # as vLLM's loaders refuse a shape
            llm.apply_model(lambda model: model.load_weights(iter(short.items())))
        assert torch.equal(prompt_logprobs(llm, IDS, vocabulary), before)
    assert not torch.equal(before, expected)
    if columns.supported() and dtype == "bfloat16":
        assert 0 < coded[1] < coded[0] == coded[2]
