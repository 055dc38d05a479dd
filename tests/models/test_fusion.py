"""The passes find in every family what they should: a pass that finds nothing where it should is a failing test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .checkpoints import checkpoint
from .families import FAMILIES

# family -> matches of (fuse_attention, fuse_activation, fuse_residual, fuse_norm) in its 3 layers (hybrids: 4).
# Gemma, GLM-4, OLMo 2 and EXAONE 4 normalize what attention and MLP return, so their residuals are no linear's; Granite
# and MiniCPM scale it first. Post-norm models (OPT-350m, OLMo 2, EXAONE 4) have no norm before their linears.
PRE_NORM = (3, 3, 6, 6)
EXPECTED = {
    **dict.fromkeys(["llama2", "llama3", "llama-linear", "llama-yarn", "mistral", "qwen2", "qwen3", "phi3"], PRE_NORM),
    **dict.fromkeys(["stablelm", "opt", "gpt2", "internlm3", "exaone3", "pangu-embedded", "falcon-alibi"], PRE_NORM),
    **dict.fromkeys(["phi3-longrope", "phi3-longrope-long", "baichuan-7b", "baichuan-13b"], PRE_NORM),
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
    "olmo2": (3, 3, 0, 0),
    # Experts write their residuals themselves (MOE), and activations are theirs; a shared expert has its own.
    **dict.fromkeys(["mixtral", "olmoe"], (3, 0, 3, 6)),
    "qwen3-moe": (3, 1, 4, 6),
    "qwen2-moe": (3, 6, 3, 6),
    **dict.fromkeys(["glm4-moe", "ernie-moe", "pangu-pro-moe"], (3, 3, 6, 6)),
    "granite-moe": (3, 0, 0, 6),
    "gpt-oss": (4, 0, 4, 8),
    # Their attention is fuse_mla's; a norm of the queries' own latent comes on top.
    "deepseek-v2-lite": (0, 3, 6, 6),
    "deepseek-v2": (0, 3, 6, 9),
    "deepseek-v3": (0, 3, 6, 9),
    "deepseek-v2-moe": (0, 3, 6, 6),
    "deepseek-v3-moe": (0, 3, 6, 9),
    **dict.fromkeys(["deepseek-r1", "kimi-k2", "glm4-moe-lite", "deepseek-v32", "glm-moe-dsa"], (0, 3, 6, 9)),
    "axk1": (0, 3, 4, 9),  # a norm stands between experts and their residual
    "pangu-ultra-moe": (0, 3, 0, 9),
    "pangu-pro-moe-v2": (3, 3, 0, 6),
    **dict.fromkeys(["glm46-moe", "ling2", "hy-v3"], (3, 3, 6, 6)),
    "minimax-m2": (3, 0, 3, 6),
    "exaone-moe": (4, 4, 8, 8),
    "afmoe": (4, 8, 0, 8),
    "mimo-v2-flash": (0, 1, 5, 8),  # its values are scaled before attention
    "granite-moe-shared": (3, 3, 0, 6),
}
LATENT_MOE = ["kimi-k2", "glm-moe-dsa", "glm4-moe-lite", "axk1", "pangu-ultra-moe"]
NORMS = {"minimax-m2": 6}  # written as arithmetic: q and k of each layer
# family -> matches of fuse_moe: a residual for each layer of experts, and a factor where the model itself scales their
# result (vLLM's routed_scaling_factor is part of the routing from the start).
MOE = {"mixtral": 3, "olmoe": 3, "qwen3-moe": 2, "qwen2-moe": 3, "glm4-moe": 2, "ernie-moe": 2, "granite-moe": 6,
       "gpt-oss": 4, "deepseek-v2-moe": 2, "deepseek-v3-moe": 2, "pangu-pro-moe": 3, "deepseek-r1": 2, "kimi-k2": 2,
       "glm4-moe-lite": 2, "axk1": 2, "pangu-ultra-moe": 2, "pangu-pro-moe-v2": 2, "glm46-moe": 1, "ling2": 2,
       "hy-v3": 2, "minimax-m2": 3, "exaone-moe": 3, "afmoe": 3, "mimo-v2-flash": 3,
       "granite-moe-shared": 3, "deepseek-v32": 2, "glm-moe-dsa": 2}  # fmt: skip
LATENT = {name: 3 for name in (*(name for name in EXPECTED if name.startswith("deepseek")), *LATENT_MOE)}
# Families whose rotary embedding is arithmetic in the graph: q and k of each layer.
ROTARY = {"phi3-longrope": 6, "phi3-longrope-long": 6, "olmo2": 6}
# family -> matches of take_columns besides the padding of the vocabulary: the latent of the queries, or queries, keys
# and values of each layer; and of take_scalars: embedding, residuals and logits, or values.
COLUMNS = {**{name: 3 for name in LATENT if EXPECTED[name][3] == 9}, "internlm2": 9, "mimo-v2-flash": 12}
SCALARS = {"granite": 8, "minicpm": 8, "granite-moe": 5, "granite-moe-shared": 8, "mimo-v2-flash": 4, "gemma2": 1,
           "afmoe": 1}  # fmt: skip
# Operators of MindSpore's own, all of them before the layers (positions) or after (the soft cap of logits).
MINDSPORES = {
    **dict.fromkeys(["opt", "opt-postnorm"], {"aten.add.Tensor"}),
    "phi3-longrope-long": {"aten.full_like.default", "aten.add.Tensor"},
    "gemma2": {"aten.tanh.default", "aten.mul.Tensor"},
}
REWRITTEN = [name for name, family in FAMILIES.items() if family.vllm_class.startswith("Transformers")]


def inspect(name: str, **more) -> tuple[dict[str, int], int, dict[str, int], bool]:
    """Of a family's model graph, lowered without weights: (matches of each pass, layer classes, counts of operators,
    whether one operator gives the hidden states and the logits)."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_mindspore.worker import inspection

    options = {"max_model_len": 256, **FAMILIES[name].llm, **more}
    engine = EngineArgs(model=str(checkpoint(name)), dtype="float32", load_format="dummy", **options)
    graph = inspection.inspect(engine.create_engine_config())[0]
    matches = {report.name: report.matches for report in graph.passes}
    return matches, graph.emitted.layer_classes, graph.emitted.operators, graph.emitted.packed


def inspect_alone(name: str, **more) -> tuple[dict[str, int], int, dict[str, int], bool]:
    """The same in a process of its own: vLLM's Transformers backend rewrites Hugging Face's classes."""
    call = f"inspect({name!r}, **{more!r})"
    code = f"import json; from tests.models.test_fusion import inspect; print(json.dumps({call}))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    return tuple(json.loads(result.stdout.splitlines()[-1]))


def main_fusions(matches: dict[str, int]) -> tuple[int, ...]:
    return tuple(matches[name] for name in ("fuse_attention", "fuse_activation", "fuse_residual", "fuse_norm"))


def test_every_served_family_is_expected_something_of():
    assert set(EXPECTED) == set(FAMILIES)


@pytest.mark.parametrize("name", EXPECTED)
def test_passes_match_as_often_as_the_architecture_says(name):
    matches, layer_classes, operators, one = inspect_alone(name) if name in REWRITTEN else inspect(name)
    assert main_fusions(matches) == EXPECTED[name]
    assert matches["fuse_rotary"] == ROTARY.get(name, 0)
    assert matches["fuse_rms_norm"] == NORMS.get(name, 0)
    assert matches["fuse_moe"] == MOE.get(name, 0)
    assert matches["fuse_mla"] == LATENT.get(name, 0)
    assert (matches["drop_batch"] > 0) == (name in REWRITTEN)
    assert matches["take_columns"] == 1 + COLUMNS.get(name, 0)
    assert matches["take_scalars"] == SCALARS.get(name, 0)
    assert one == (name != "gemma2"), "the soft cap of its logits comes after that operator"
    if name not in REWRITTEN:  # rotary embedding's arithmetic is before their layers
        assert {operator for operator in operators if "vllm_ms" not in operator} == MINDSPORES.get(name, set())
    if (EXPECTED[name] == PRE_NORM or name in LATENT) and name not in MOE:
        most = 7 if name in LATENT else 5  # the queries' latent is cut out, and expanded by a linear of its own
        assert layer_classes == 2, "the last layer selects the rows that are sampled"
        assert sum(operators.values()) <= most * 3 + 10, f"more than {most} operators a layer"
        assert matches["select_rows"] >= 4, "the last layer's output projection, gate and up, down, final norm"


@pytest.mark.parametrize("name", ["llama2", "qwen3"])
def test_hugging_faces_own_code_is_fused_like_vllms(name):
    """vLLM's Transformers backend: a batch dimension everywhere, rotary embedding as arithmetic."""
    matches, layer_classes, _, _ = inspect_alone(name, model_impl="transformers")
    assert main_fusions(matches) == PRE_NORM
    assert matches["fuse_rotary"] == 6
    assert layer_classes == 2
