"""Writes the checkpoints of `families.py` to disk, once: random weights, configuration, and a tokenizer.

The cache is `$VLLM_MS_TEST_CACHE` (set by tests/conftest.py) or the user's cache directory; a checkpoint's folder is
keyed by the source of this package and the library versions, so an edited family is written anew.
"""

import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .families import EVERY_FAMILY
from .family import EOS_TOKEN_ID, TOKENIZER_SIZE, Family, Scales

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZERO_CENTRED_NORMS = ("gemma",)
QUERY_KEY = ("q_proj", "k_proj", "qkv_proj", "c_attn", "query_key_value")
OUTPUT = ("o_proj", "down_proj", "out_proj", "fc2", "c_proj", ".dense.", "dense_4h_to_h")
UNGATED_DOWN = ("fc2", "mlp.c_proj", "dense_4h_to_h")
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings")
POSITIONS = ("embed_positions", "wpe")
CORRECTION_BIAS = ("e_score_correction_bias", "expert_bias")  # of a router: a buffer, or an untrained parameter
EXPERT_SCALE = "router_scale"
MAX_PROMPT = 151


def checkpoint(name: str, dtype: str = "float32") -> Path:
    """The folder of the checkpoint of family `name`, written if it is not there yet.

    dtype: "float32" or "bfloat16" of the tensors on disk; bfloat16 ones are the float32 ones rounded.
    Safe to call from several processes at once. Raises KeyError for an unknown family or dtype.
    """
    family, torch_dtype = EVERY_FAMILY[name], DTYPES[dtype]
    with _written_once(f"{name}-{dtype}") as folder:
        if folder is not None:
            _write(family, torch_dtype, folder)
    return _cache_folder() / f"{name}-{dtype}"


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `TOKENIZER_SIZE` tokens trained on Python's library, with a chat template."""
    with _written_once("tokenizer") as folder:
        if folder is not None:
            _train_tokenizer().save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(_cache_folder() / "tokenizer")


def random_weights(family: Family) -> PreTrainedModel:
    """The reference class of `family`, float32, every parameter drawn from a generator seeded by the family."""
    config = family.config()
    config.architectures = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(family.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = _distribution(name, parameter, family.scales, config)
            parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))
            if any(part in name for part in UNGATED_DOWN) and parameter.dim() == 2:
                # ReLU and GELU have a positive mean, which would add the same vector to every token
                parameter -= parameter.mean(dim=0 if config.model_type == "gpt2" else 1, keepdim=True)
        for name, buffer in model.named_buffers():
            if name.endswith(CORRECTION_BIAS):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        _damp_unused_rows(model.get_output_embeddings().weight)
    return model


def _distribution(name: str, parameter: torch.Tensor, scales: Scales, config) -> tuple[float, float]:
    """Mean and standard deviation of the parameter called `name`."""
    if name.endswith(CORRECTION_BIAS):
        return 0.0, 0.3
    if name.endswith("bias"):
        return 0.0, 0.05
    if name.endswith(EXPERT_SCALE):
        return 2.0, 0.5
    if parameter.dim() == 1:
        mean = next((mean for part, mean in scales.norm.items() if part in name), 1.0)
        return mean - config.model_type.startswith(ZERO_CENTRED_NORMS), 0.2 * mean
    if any(part in name for part in POSITIONS):
        return 0.0, 0.1
    transposed = config.model_type == "gpt2" or (config.model_type == "gpt_oss" and parameter.dim() == 3)
    fan_in = parameter.shape[-2 if transposed else -1]
    if any(part in name for part in EMBEDDINGS):
        width = parameter.shape[1]
        is_input = "lm_head" not in name
        if is_input and not config.tie_word_embeddings:
            return 0.0, 1.0
        return 0.0, scales.logits / math.sqrt(width)
    gain = scales.linear
    if any(part in name for part in QUERY_KEY):
        gain = scales.qk
    elif any(part in name for part in OUTPUT):
        gain = scales.out
    return 0.0, gain / math.sqrt(fan_in)


def _damp_unused_rows(lm_head: torch.Tensor) -> None:
    """Keeps greedy text away from special tokens and from ids the tokenizer does not have."""
    lm_head[: len(SPECIAL_TOKENS)] *= 0.1
    lm_head[TOKENIZER_SIZE:] *= 0.1


def _write(family: Family, dtype: torch.dtype, folder: Path) -> None:
    model = random_weights(family).to(dtype)
    if family.hub_format is None:
        model.config.architectures = [family.architecture]
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder / "reference")
        _write_hub_format(family, model, folder)
    tokenizer().save_pretrained(folder)
    generation = {"eos_token_id": EOS_TOKEN_ID, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _write_hub_format(family: Family, model: PreTrainedModel, folder: Path) -> None:
    config, hub = model.config, family.hub_format
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    tensors = {name: tensor.contiguous() for name, tensor in hub.tensors(state, config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = hub.config_json(config, family.architecture, str(model.dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    (folder / f"{hub.module}.py").write_text(hub.configuration_file(config))


def _train_tokenizer() -> PreTrainedTokenizerFast:
    files = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "[a-g]*.py")))
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train(files, trainer)
    assert tok.get_vocab_size() == TOKENIZER_SIZE, tok.get_vocab_size()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[EOS_TOKEN_ID],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@cache
def _content_key() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources if not p.name.startswith("test_")))
    digest.update(f"{torch.__version__} {transformers.__version__} {tokenizers.__version__}".encode())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm_mindspore" / "tests"
    folder = Path(os.environ.get("VLLM_MS_TEST_CACHE", default)) / _content_key()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _written_once(name: str) -> Iterator[Path | None]:
    """Yields a folder to fill, which becomes `name` in the cache when the block ends, or None when it is there."""
    final = _cache_folder() / name
    if final.exists():
        yield None
        return
    with open(final.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if final.exists():
            yield None
            return
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
        try:
            yield temporary
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
