"""Every family with int8 weights gives nearly Hugging Face's distributions: each way of loading a weight is covered.

Where there are experts, tokens go to all of them: random routers choose between near equals, and where rounding makes
one choose another expert, that token and all that attend to it are another text.
"""

import json
from pathlib import Path

import pytest

from .checkpoints import checkpoint
from .engine import engine, prompt_logprobs, statistics
from .families import FAMILIES
from .reference import PROMPTS, reference

IDS = PROMPTS[5]
# vLLM's models that compute logits with the embedding itself (gemma2), or make a head without a quantization method.
EXACT_HEADS = ("gemma2", "opt", "opt-postnorm", "gpt-oss")
# What the configurations call the experts of a token (or their groups), and how many there are.
CHOICES = {
    "num_experts_per_tok": ("num_experts", "num_local_experts", "n_routed_experts"),
    "moe_k": ("moe_num_experts",),
    "topk_group": ("n_group",),
}


def without_choice(folder: Path, copy: Path) -> bool:
    """Write the checkpoint in `folder` to `copy`, every token going to all experts; False if it has none."""
    if (folder / "reference").is_dir():
        (copy / "reference").mkdir()
        without_choice(folder / "reference", copy / "reference")
    config, chosen = json.loads((folder / "config.json").read_text()), False
    for choice, names in CHOICES.items():
        for name in names:
            if config.get(choice) and config.get(name):
                config[choice], chosen = config[name], True
    for file in folder.iterdir():
        if file.is_file():
            (copy / file.name).symlink_to(file)
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config))
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_int8_stays_close_to_hugging_face(name, tmp_path):
    routed = without_choice(checkpoint(name), tmp_path)
    expected = reference(name, folder=tmp_path).logits(IDS)[:-1].log_softmax(-1)
    with engine(name, folder=tmp_path, max_logprobs=-1, quantization="mindspore_int8") as llm:
        found = prompt_logprobs(llm, IDS, expected.shape[-1])
        operators = [graph["operators"] for graph in statistics(llm).values()]
    divergence = (expected.exp() * (expected - found)).sum(-1)
    assert divergence.mean() < 0.01
    assert "vllm_ms.linear_int8.default" in operators[0]
    assert ("vllm_ms.moe_route.default" in operators[0]) == routed
    exact = name in EXACT_HEADS or routed  # routers stay exact
    assert ["vllm_ms.linear.default" in graph for graph in operators] == [exact, name in EXACT_HEADS]
