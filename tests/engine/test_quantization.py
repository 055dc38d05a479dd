"""Weights quantized at load: close to the model's own distributions, smaller in memory, refused where impossible."""

import gc
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear

from tests.models.checkpoints import checkpoint
from tests.models.engine import engine, greedy, prompt_logprobs, statistics
from tests.models.reference import PROMPTS
from tests.support import checkpoints
from vllm_mindspore.demo import model_path
from vllm_mindspore.ops import quantized
from vllm_mindspore.quantization import NAMES
from vllm_mindspore.quantization.config import CONFIGS
from vllm_mindspore.quantization.method import VALUES, QuantizedLinearMethod

# Mean KL divergence of the next token's distribution from that of bfloat16; int4 on a model this small is coarse.
DIVERGENCE = {"mindspore_int8": 0.01, "mindspore_int4": 0.2}
METHODS = pytest.mark.parametrize("method", NAMES)


def texts() -> list[str]:
    """Documentation, which is what the demo model was trained on."""
    return [textwrap.dedent(inspect.getdoc(item)) for item in (str.strip, json.dumps, subprocess.Popen, os.walk, Path)]


@pytest.fixture(scope="module")
def demo():
    """demo(method) → the demo model's distributions over `texts`."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    def distributions(method: str | None) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            llm = LLM(
                str(model_path()), quantization=method, max_model_len=256, max_num_seqs=4, max_logprobs=-1, seed=0
            )
            try:
                tokenizer = llm.get_tokenizer()
                prompts = [tokenizer(text).input_ids[:200] for text in texts()]
                return torch.cat([prompt_logprobs(llm, ids, 4096) for ids in prompts]).double()
            finally:
                llm.llm_engine.engine_core.shutdown()
                cleanup_dist_env_and_memory()

    exact = distributions(None)
    return lambda method: (exact, distributions(method))


@METHODS
def test_the_demo_model_keeps_its_distributions(method, demo):
    exact, found = demo(method)
    divergence = (exact.exp() * (exact - found)).sum(-1).mean().item()
    assert len(exact) > 200
    assert 1e-6 < divergence < DIVERGENCE[method]  # 0 would mean that nothing was quantized


def model_of(llm) -> torch.nn.Module:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()


def parameter_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the memory of each parameter, tied ones once."""
    return {name: value.untyped_storage().nbytes() for name, value in model.named_parameters()}


@METHODS
@pytest.mark.parametrize("family", ["qwen3", "llama2"])  # qwen3: the head is the embedding; llama2: a weight of its own
def test_only_quantized_weights_stay_in_memory(method, family):
    with engine(family, "bfloat16") as llm:
        exact = {name: (value.numel(), value.element_size()) for name, value in model_of(llm).named_parameters()}
        expected = greedy(llm, PROMPTS[:2], 4)
    with engine(family, "bfloat16", quantization=method) as llm:
        model = model_of(llm)
        found, operators = parameter_bytes(model), statistics(llm)
        embedding = [name for name in found if name.endswith("embed_tokens.weight")]
        assert len(greedy(llm, PROMPTS[:2], 4)) == len(expected)
    linears = [name for name in exact if name.endswith("_proj.weight") or name == "lm_head.weight"]
    assert len(linears) >= 12 and not set(linears) & set(found)
    bits = 4 if method.endswith("4") else 8
    for name in linears:
        values = found[name.replace(".weight", ".weight_values")]
        elements = exact[name][0]
        assert elements * bits / 8 <= values <= elements * bits / 8 * 1.5, "padding of a small odd shape at most"
    assert "lm_head.weight_values" in found and len(embedding) == 1
    assert found[embedding[0]] == exact[embedding[0]][0] * 2, "looked up rows stay exact"
    for graph in operators.values():
        assert graph["weights_shared"] == graph["weights"]
        assert "vllm_ms.linear.default" not in graph["operators"]
        assert graph["operators"][f"vllm_ms.linear_int{bits}.default"] >= 1


def test_original_weights_pass_through_one_layer_at_a_time(monkeypatch):
    """When a layer is quantized, no other layer's original weight is in memory."""
    held = []

    def count(weight, *arguments):
        # by type(): isinstance would ask what a weak proxy stands for, which may be gone
        objects = [item for item in gc.get_objects() if issubclass(type(item), LinearBase)]
        layers = [item for item in objects if hasattr(item, VALUES)]
        held.append(sum("weight" in layer._parameters and not layer.weight.is_meta for layer in layers))
        quantize(weight, *arguments)

    quantize = quantized.quantize
    monkeypatch.setattr(quantized, "quantize", count)
    with engine("qwen3", quantization="mindspore_int8") as llm:
        layers = sum(hasattr(module, VALUES) for module in model_of(llm).modules())
    assert layers == len(held) >= 12
    assert max(held) == 1


def test_layers_that_stay_exact():
    config = CONFIGS["mindspore_int4"]()
    with set_current_vllm_config(VllmConfig()):
        for name, quantizes in (("mlp.gate", False), ("attn.kv_b_proj", False), ("mlp.gate_up_proj", True)):
            method = config.get_quant_method(ReplicatedLinear.__new__(ReplicatedLinear), f"layers.0.{name}")
            assert isinstance(method, QuantizedLinearMethod) == quantizes, name
        assert config.get_quant_method(torch.nn.Embedding(2, 2), "embed_tokens") is None


@METHODS
def test_the_passes_find_what_they_find_in_other_models(method):
    with engine("qwen3") as llm:
        expected = statistics(llm)["model"]["passes"]
    with engine("qwen3", quantization=method) as llm:
        assert statistics(llm)["model"]["passes"] == expected
    assert expected["fuse_norm"] and expected["fuse_residual"] and expected["fuse_activation"]


@METHODS
def test_a_request_alone_gives_what_it_gives_in_a_batch(method):
    with engine("qwen3", quantization=method, enable_prefix_caching=False) as llm:
        together = greedy(llm, PROMPTS, 24)
        alone = [greedy(llm, [ids], 24)[0] for ids in PROMPTS]
    with engine("qwen3", quantization=method, max_num_batched_tokens=23, enable_prefix_caching=False) as llm:
        chunked = greedy(llm, PROMPTS, 24)
    assert alone == together == chunked


def test_a_model_whose_head_is_its_embedding_module():
    """Gemma 2 has no output head of its own: its embedding, which stays exact, computes the logits."""
    with engine("gemma2", quantization="mindspore_int8") as llm:
        graphs = statistics(llm)
        assert len(greedy(llm, PROMPTS[:2], 8)[0]) == 8
    assert "vllm_ms.linear_int8.default" in graphs["model"]["operators"]
    assert "vllm_ms.linear.default" in graphs["logits"]["operators"]


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_other_bits_are_another_entry(tmp_path):
    probe = Path(__file__).with_name("start_probe.py")

    def start(*arguments: str) -> dict:
        environment = {**os.environ, "VLLM_MS_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, str(probe), str(checkpoint("qwen3")), *arguments]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert finished.returncode == 0, finished.stderr[-3000:]
        return json.loads(finished.stdout.splitlines()[-1])

    first, second = start("mindspore_int8"), start("mindspore_int8")
    assert [(graph["compiles"], graph["loads"]) for graph in second["graphs"].values()] == [(0, 1), (0, 1)]
    assert second["tokens"] == first["tokens"]
    other = start("mindspore_int4")
    assert Path(other["sources"][0]).parent != Path(first["sources"][0]).parent


def test_a_checkpoint_without_a_weight_is_refused(tmp_path):
    folder = tmp_path / "incomplete"
    folder.mkdir()
    for path in checkpoint("qwen3").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        tensors = {key: value for key, value in load_file(path).items() if "layers.1.self_attn.k_proj" not in key}
        save_file(tensors, folder / path.name, {"format": "pt"})
    probe = Path(__file__).with_name("start_probe.py")
    command = [sys.executable, str(probe), str(folder), "mindspore_int8"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode != 0
    assert "layers.1.self_attn.qkv_proj: found" in finished.stderr + finished.stdout
    assert "use a complete checkpoint" in finished.stderr + finished.stdout


@pytest.fixture
def configure(monkeypatch):
    """configure(model, **options): vLLM's configuration of an engine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    return lambda model, **options: EngineArgs(model=str(model), **options).create_engine_config()


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
def test_other_methods_are_refused(method, configure):
    expected = rf"--quantization: found {method}. The MindSpore backend supports mindspore_int8 and mindspore_int4"
    with pytest.raises(ValueError, match=expected):
        configure(checkpoint("qwen3"), quantization=method)


def test_a_quantized_checkpoint_is_refused_with_and_without_the_option(configure, tmp_path):
    config = json.loads((checkpoint("qwen3") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    folder = checkpoints.configuration(tmp_path / "awq", **config)
    with pytest.raises(ValueError, match="--quantization: found auto_awq"):
        configure(folder, skip_tokenizer_init=True)
    with pytest.raises(ValueError, match="awq.*does not.*match.*mindspore_int8"):
        configure(folder, skip_tokenizer_init=True, quantization="mindspore_int8")


def test_loaders_that_expect_quantized_tensors_are_refused(configure):
    with pytest.raises(ValueError, match="--load-format: found sharded_state.*supports the formats auto"):
        configure(checkpoint("qwen3"), quantization="mindspore_int8", load_format="sharded_state")


@METHODS
def test_supported_methods_are_accepted(method, configure):
    config = configure(checkpoint("qwen3"), quantization=method)
    assert config.quant_config.get_name() == method
