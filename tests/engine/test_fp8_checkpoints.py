"""A checkpoint in fp8 is served as the unquantized one that it means, and what is not plain fp8 is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.checkpoints import checkpoint
from tests.models.engine import engine, greedy, prompt_logprobs, statistics
from tests.models.reference import MAX_TOKENS, PROMPTS, reference
from tests.support import checkpoints, fp8
from vllm_mindspore.quantization import DEQUANTIZE

PROBE = Path(__file__).with_name("start_probe.py")
IDS = max(PROMPTS, key=len)
DEEPSEEK = "deepseek-v3-moe"
SPARSE = "parallel-deepseek-v32"
EXPERT = "layers.2.mlp.experts.3.up_proj.weight"
# DeepSeek's with all its matrices but routers in fp8, and one that config.json lists as not converted; V3.2's with one
# of the two that the indexer's weight is put together of.
CASES = {
    DEEPSEEK: (fp8.BLOCKS, ("mlp.gate.", "layers.1.self_attn.o_proj")),
    SPARSE: (fp8.BLOCKS, ("mlp.gate.", "weights_proj")),
    "qwen2": (fp8.TENSORS, ("lm_head", "embed_tokens")),
    "qwen3": (fp8.ROWS, ("lm_head", "embed_tokens")),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(family) → (its checkpoint in fp8, what that means as float32)."""
    made = {}

    def write(name: str) -> tuple[Path, Path]:
        if name not in made:
            scaling, kept = CASES[name]
            made[name] = fp8.write(tmp_path_factory.mktemp(name), checkpoint(name), scaling, kept)
        return made[name]

    return write


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == SPARSE else name for name in CASES]
)
def test_float32_tokens_and_logits_equal_hugging_faces_of_the_multiplied_weights(name, written):
    in_fp8, exact = written(name)
    expected = reference(name, folder=exact)
    with engine(name, folder=in_fp8, max_logprobs=-1) as llm:
        assert llm.llm_engine.vllm_config.model_config.quantization == DEQUANTIZE
        tokens = greedy(llm, PROMPTS, MAX_TOKENS)
        logprobs = prompt_logprobs(llm, IDS, expected.logits([5]).shape[-1])
        graphs = statistics(llm)
    assert tokens == expected.generate(PROMPTS)
    assert (logprobs - expected.logits(IDS)[:-1].log_softmax(-1)).abs().max() < 1e-4
    assert all(graph["weights_shared"] == graph["weights"] for graph in graphs.values())


def served(name: str, folder: Path, **options) -> tuple[torch.Tensor, dict[str, tuple], dict]:
    """(log probabilities after the tokens of IDS, shapes and types of all parameters, operators of the model)."""
    with engine(name, folder=folder, max_logprobs=-1, **options) as llm:
        vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()
        parameters = {key: (tuple(value.shape), value.dtype) for key, value in model.named_parameters()}
        return prompt_logprobs(llm, IDS, vocabulary), parameters, statistics(llm)["model"]["operators"]


@pytest.mark.parametrize(
    "options",
    [dict(dtype="bfloat16"), dict(quantization="mindspore_int8"), dict(quantization="mindspore_int4")],
    ids=lambda options: "-".join(options.values()),
)
def test_what_is_served_is_the_unquantized_checkpoint_to_the_last_bit(options, written):
    """In bfloat16, and quantized again: the same weights, nothing of the scales, the same operators."""
    in_fp8, exact = written(DEEPSEEK)
    logprobs, parameters, operators = served(DEEPSEEK, in_fp8, **options)
    expected = served(DEEPSEEK, exact, **options)
    assert torch.equal(logprobs, expected[0])
    assert parameters == expected[1]
    assert operators == expected[2]


def start(*arguments: object) -> tuple[int, str]:
    """(exit code, all it said) of start_probe.py."""
    finished = subprocess.run(
        [sys.executable, str(PROBE), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    return finished.returncode, finished.stdout + finished.stderr


@pytest.mark.slow
def test_a_second_start_compiles_nothing(written, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MS_CACHE_DIR", str(tmp_path))
    found = []
    for _ in range(2):
        code, output = start(written(DEEPSEEK)[0])
        assert code == 0, output[-3000:]
        found.append(json.loads(next(line for line in output.splitlines() if line.startswith('{"graphs"'))))
    first, second = found
    assert [(graph["compiles"], graph["loads"]) for graph in first["graphs"].values()] == [(1, 0), (1, 0)]
    assert [(graph["compiles"], graph["loads"]) for graph in second["graphs"].values()] == [(0, 1), (0, 1)]
    assert second["tokens"] == first["tokens"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (f"{EXPERT}_scale_inv", f"{EXPERT}: found values in fp8"),
        ("model.norm.weight", "not initialized from checkpoint: {'model.norm.weight'}"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(missing, message, written, tmp_path):
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(missing)}

    code, output = start(fp8.change(written(DEEPSEEK)[0], tmp_path / "incomplete", edit))
    assert code != 0
    assert message in output


@pytest.fixture
def configure(monkeypatch):
    """configure(model, **options): vLLM's configuration of an engine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    return lambda model, **options: EngineArgs(
        model=str(model), skip_tokenizer_init=True, **options
    ).create_engine_config()


@pytest.fixture
def quantized(tmp_path):
    """quantized(quantization_config) → a folder with such a config.json."""
    config = json.loads((checkpoint("qwen3") / "config.json").read_text())
    return lambda described: checkpoints.configuration(tmp_path / "model", **config, quantization_config=described)


@pytest.mark.parametrize("quantization", [None, "fp8", DEQUANTIZE])
def test_the_option_may_say_what_the_checkpoint_is(quantization, configure, quantized):
    config = configure(quantized(fp8.BLOCKS.config), quantization=quantization)
    assert config.model_config.quantization == DEQUANTIZE
    assert config.quant_config.checkpoint.block == (16, 24)


REFUSED = {
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        {},
        r"--quantization: found auto_awq\. .* supports mindspore_int8 .* and checkpoints in fp8\. Leave the option out",
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
        {},
        r"--quantization: found auto_gptq\. .* and checkpoints in fp8",
    ),
    "int8": (
        fp8.compressed_tensors("channel", type="int"),
        {},
        r"the checkpoint's quantization_config \(compressed-tensors\): found symmetric weights of 8 bits, int",
    ),
    "other option": (fp8.BLOCKS.config, dict(quantization="awq"), r"\(fp8\) does not match .*\(awq\)"),
    "format": (
        fp8.BLOCKS.config,
        dict(load_format="sharded_state"),
        "a checkpoint in fp8 with --load-format: found sharded_state.*supports the formats auto, hf, safetensors",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_quantized_checkpoints_are_refused(kind, configure, quantized):
    described, options, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        configure(quantized(described), **options)


def test_there_must_be_fp8_to_multiply_out(configure):
    message = f"--quantization: found {DEQUANTIZE} with an unquantized checkpoint.*Leave the option out"
    with pytest.raises(ValueError, match=message):
        configure(checkpoint("qwen3"), quantization=DEQUANTIZE)
