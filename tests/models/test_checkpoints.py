"""The checkpoints are what they claim: vLLM takes them, their references run, and their text can tell errors apart."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models import checkpoints
from tests.models.families import FAMILIES, WITH_EXPERTS
from tests.models.family import TOKENIZER_SIZE
from tests.models.latent_families import LATENT_FAMILIES
from tests.models.reference import MAX_TOKENS, PROMPTS, one_thread, reference
from tests.models.sparse_families import SPARSE_FAMILIES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model_config(monkeypatch):
    """vLLM's ModelConfig of a family, made without a network and without the inspection subprocess (10 s each)."""

    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    monkeypatch.setattr(socket.socket, "connect", refuse)

    def make(name: str):
        args = EngineArgs(model=str(checkpoints.checkpoint(name)), dtype="float32", **FAMILIES[name].llm)
        return args.create_model_config()

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_resolves_the_family_to_the_class_it_is_served_by(name, model_config):
    from vllm.model_executor.model_loader.utils import get_model_cls

    config = model_config(name)
    assert config.architectures == [FAMILIES[name].architecture]
    assert get_model_cls(config).__name__ == FAMILIES[name].vllm_class
    assert config.max_model_len > max(map(len, PROMPTS)) + MAX_TOKENS


def test_every_family_is_in_the_documentation():
    names = re.findall(r"^\| ([\w, -]+) \| `", (ROOT / "docs" / "models.md").read_text(), re.MULTILINE)
    assert {name for cell in names for name in cell.split(", ")} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_diverse_and_decided(name):
    """Many distinct tokens, and no step so close that rounding in float32 could pick another token."""
    expected = reference(name)
    outputs = expected.generate(PROMPTS)
    assert all(len(output) == MAX_TOKENS for output in outputs)
    assert min(len(set(output)) for output in outputs) >= 12
    tokens = {token for output in outputs for token in output}
    assert len(tokens) >= 200
    assert max(tokens) < TOKENIZER_SIZE and min(tokens) >= len(checkpoints.SPECIAL_TOKENS)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        logits = expected.logits(prompt + output[:-1])[len(prompt) - 1 :]
        assert logits.isfinite().all()
        assert logits.argmax(-1).tolist() == output, "generation with a KV cache differs from one forward pass"
        best, second = logits.topk(2).values.unbind(-1)
        assert (best - second).min() > 5e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_rounding_leaves_room_under_the_tolerance(name):
    """Logits must agree within 1e-4; the reference's own float32 error has to be well below."""
    expected = reference(name)
    ids = PROMPTS[-1] + expected.generate(PROMPTS)[-1]
    exact = expected.logits(ids, torch.float64)
    assert (expected.logits(ids) - exact).abs().max() < 6e-5


def _rope_off(config):
    layers = config.rope_parameters
    for rope in layers.values() if "full_attention" in layers else [layers]:
        rope["rope_type"] = "default"


def _set(**fields):
    return lambda config: [setattr(config, name, value) for name, value in fields.items()]


FEATURES = [
    *((name, "rope scaling", _rope_off) for name in ("llama3", "llama-linear", "llama-yarn", "exaone4", "exaone3")),
    *((name, "longrope", _rope_off) for name in ("phi3-longrope", "phi3-longrope-long")),
    ("gemma3", "rope scaling", _rope_off),
    *((name, "sliding window", _set(sliding_window=4096)) for name in ("mistral", "gemma2", "gemma3", "exaone4")),
    *(
        (name, "window off by one", lambda c: setattr(c, "sliding_window", c.sliding_window + 1))
        for name in ("mistral",)
    ),
    ("gemma2", "attention soft cap", _set(attn_logit_softcapping=None)),
    ("gemma2", "final soft cap", _set(final_logit_softcapping=None)),
    ("gemma2", "attention scale", _set(query_pre_attn_scalar=32)),
    ("glm4", "partial rotary", lambda c: c.rope_parameters.update(partial_rotary_factor=1.0)),
    ("stablelm", "partial rotary", lambda c: c.rope_parameters.update(partial_rotary_factor=0.5)),
    ("granite", "residual multiplier", _set(residual_multiplier=1.0)),
    ("granite", "attention multiplier", _set(attention_multiplier=44**-0.5)),
    ("granite", "logits scaling", _set(logits_scaling=1.0)),
    ("granite", "embedding multiplier", _set(embedding_multiplier=1.0)),
    *(
        ("glm4-moe", field, _set(**{field: value}))
        for field, value in {"routed_scaling_factor": 1.0, "norm_topk_prob": False, "topk_group": 4}.items()
    ),
    ("qwen3-moe", "norm_topk_prob", _set(norm_topk_prob=False)),
    *((name, "rope scaling", _rope_off) for name in ("deepseek-r1", "kimi-k2", "axk1", "deepseek-v32")),
    *((name, "selection", _set(index_topk=512)) for name in ("deepseek-v32", "glm-moe-dsa")),
    *((name, "one position more", _set(index_topk=k)) for name, k in (("deepseek-v32", 34), ("glm-moe-dsa", 21))),
    *((name, "one expert more", _set(num_experts_per_tok=4)) for name in ("kimi-k2", "minimax-m2", "pangu-pro-moe-v2")),
    *((name, "scaling factor", _set(routed_scaling_factor=1.0)) for name in ("pangu-ultra-moe", "glm46-moe", "ling2")),
    ("minimax-m2", "partial rotary", lambda c: c.rope_parameters.update(partial_rotary_factor=1.0)),
    *((name, "sliding window", _set(sliding_window=4096)) for name in ("exaone-moe", "afmoe", "mimo-v2-flash")),
    ("mimo-v2-flash", "scale of values", _set(attention_value_scale=1.0)),
    ("afmoe", "scale of embeddings", _set(mup_enabled=False)),
    ("gpt-oss", "one expert more", _set(num_experts_per_tok=3)),
    ("pangu-pro-moe", "groups", _set(n_group=1)),
    ("pangu-pro-moe", "scale of each expert", _set(scale_experts=False)),
    ("minicpm", "scale_emb", _set(embedding_multiplier=1.0)),
    ("minicpm", "scale_depth", _set(residual_multiplier=1.0)),
]


@pytest.mark.parametrize("name,feature,change", FEATURES, ids=[f"{name}-{feature}" for name, feature, _ in FEATURES])
def test_leaving_a_feature_out_is_visible(name, feature, change):
    """A backend that ignored the feature would miss the logits by far more than the tolerance."""
    expected = reference(name)
    config = expected.config()
    change(config)
    options = dict(dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(expected.source, config=config, **options)
    with torch.no_grad(), one_thread():
        logits = model.eval()(torch.tensor([PROMPTS[-1]]), use_cache=False).logits[0]
    assert (logits - expected.logits(PROMPTS[-1])).abs().max() > 1e-2, feature


@pytest.mark.parametrize("part", ["param_sink_key", "param_sink_value"])
def test_learned_keys_and_values_are_visible(part):
    expected = reference("pangu-pro-moe-v2")
    with_sinks, model = expected.logits(PROMPTS[-1]), expected._model(torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            getattr(layer.self_attn, part).mul_(-1)
    changed = expected.logits(PROMPTS[-1], torch.float64)
    expected._models.pop(torch.float64)
    assert (changed - with_sinks).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama2", "internlm2", "gpt2"])
def test_bfloat16_checkpoint_is_the_rounded_float32_one(name):
    exact, rounded = (load_file(checkpoints.checkpoint(name, d) / "model.safetensors") for d in ("float32", "bfloat16"))
    assert exact.keys() == rounded.keys()
    for tensor in exact:
        assert exact[tensor].dtype == torch.float32 and rounded[tensor].dtype == torch.bfloat16
        assert torch.equal(exact[tensor].bfloat16(), rounded[tensor])


def test_chat_template_and_tokenizer_round_trip():
    tokenizer = checkpoints.tokenizer()
    text = "def f(x):\n    return 'grün' + x  # ∑"
    assert len(tokenizer) == TOKENIZER_SIZE and tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_processes_that_write_at_once_share_one_whole_checkpoint(tmp_path):
    script = (
        "import os\nfrom tests.models.checkpoints import checkpoint\nprint(sorted(os.listdir(checkpoint('internlm2'))))"
    )
    environment = {**os.environ, "VLLM_MS_TEST_CACHE": str(tmp_path)}
    writers = [
        subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    listings = [writer.communicate(timeout=200)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert len(set(listings)) == 1 and "tokenizer.json" in listings[0] and "model.safetensors" in listings[0]
    assert not list(tmp_path.glob("*/.*-*")), "a temporary folder was left behind"


@pytest.mark.slow
def test_model_classes_in_plain_pytorch_equal_the_references():
    """Every tensor name, configuration field and formula, before any MindSpore is involved."""
    # vLLM's layers of experts and of latent attention have no plain PyTorch form
    others = {family.name for family in (*LATENT_FAMILIES, *SPARSE_FAMILIES, *WITH_EXPERTS)}
    dense = [name for name in FAMILIES if name not in others]
    run = subprocess.run(
        [sys.executable, "-m", "tests.models.eager", *dense], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = {r["name"]: r for r in (json.loads(line) for line in run.stdout.splitlines() if line.startswith("{"))}
    assert results.keys() == set(dense)
    for name, result in results.items():
        assert result["class"] == FAMILIES[name].vllm_class
        assert result["module"].startswith(("vllm.", "vllm_mindspore.models."))
        assert math.isfinite(result["error"]) and result["error"] < 5e-5, result
        assert result["greedy"], result
