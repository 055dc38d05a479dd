"""The passes find in every family what they should: a pass that finds nothing where it should is a failing test."""

import pytest

from .checkpoints import checkpoint
from .families import FAMILIES

# family -> matches of (fuse_attention, fuse_activation, fuse_residual, fuse_norm) in its 3 layers (hybrids: 4).
# Gemma, GLM-4 and EXAONE 4 normalize what attention and MLP return, so their residuals are no linear's; Granite and
# MiniCPM scale it first. Post-norm models (OPT-350m, EXAONE 4) have no norm before their linears.
PRE_NORM = (3, 3, 6, 6)
EXPECTED = {
    **dict.fromkeys(["llama2", "llama3", "llama-linear", "llama-yarn", "mistral", "qwen2", "qwen3", "phi3"], PRE_NORM),
    **dict.fromkeys(["stablelm", "opt", "gpt2", "internlm3", "exaone3", "pangu-embedded", "falcon-alibi"], PRE_NORM),
    "glm4": (3, 3, 0, 6),
    "granite": (3, 3, 0, 6),
    "minicpm": (3, 3, 0, 6),
    "gemma2": (4, 4, 0, 8),
    "gemma3": (4, 4, 0, 8),
    "exaone4": (4, 4, 0, 0),
    "opt-postnorm": (3, 3, 7, 1),
    "falcon-7b": (3, 3, 3, 3),
    "falcon-new": (3, 3, 3, 6),
    # q, k and v are interleaved by KV head in one projection: not the row the fused attention reads.
    "internlm2": (0, 3, 6, 6),
    # Hugging Face's rotary embedding, in the graph as arithmetic.
    "phi3-longrope": (0, 3, 6, 6),
    "phi3-longrope-long": (0, 3, 6, 6),
    "olmo2": (0, 0, 0, 0),
}
CLASSES = {"gemma2": 2, "gemma3": 2, "exaone4": 2}


@pytest.fixture(scope="module")
def inspected():
    """name → the model graph of a family, captured and lowered without weights."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_mindspore.worker import inspection

    def inspect(name: str):
        options = {"max_model_len": 256, **FAMILIES[name].llm}
        engine = EngineArgs(model=str(checkpoint(name)), dtype="float32", load_format="dummy", **options)
        return inspection.inspect(engine.create_engine_config())[0]

    return inspect


def test_every_served_family_is_expected_something_of():
    assert set(EXPECTED) == set(FAMILIES)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "olmo2"])
def test_passes_match_as_often_as_the_architecture_says(name, inspected):
    graph = inspected(name)
    matches = {report.name: report.matches for report in graph.passes}
    found = tuple(matches[p] for p in ("fuse_attention", "fuse_activation", "fuse_residual", "fuse_norm"))
    assert found == EXPECTED[name]
    if found == PRE_NORM:
        assert graph.emitted.layer_classes == CLASSES.get(name, 1)
        assert sum(graph.emitted.operators.values()) <= 5 * 3 + 6, "more than five operators a layer"
