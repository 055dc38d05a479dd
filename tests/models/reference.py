"""What a family's output must equal: greedy tokens and logits of a model that is not vLLM's, on the same weights."""

import contextlib
import hashlib
import json
import math
import os
import random
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.falcon import modeling_falcon

from .checkpoints import SPECIAL_TOKENS, checkpoint
from .families import EVERY_FAMILY
from .family import TOKENIZER_SIZE, Family

PROMPT_LENGTHS = (1, 2, 5, 19, 37, 66, 103, 151)
_random = random.Random(2)
PROMPTS: list[list[int]] = [_random.choices(range(len(SPECIAL_TOKENS), TOKENIZER_SIZE), k=n) for n in PROMPT_LENGTHS]
MAX_TOKENS = 64


class Reference:
    """A family's reference model on the weights of one of its checkpoints, evaluated in float32.

    With a bfloat16 checkpoint the weights are the rounded ones, the arithmetic still float32, unless `logits` is asked
    for bfloat16: that is Hugging Face's own bfloat16 run, against whose error ours is measured.
    """

    attention = "eager"

    def __init__(self, family: Family, folder: Path):
        self.family = family
        self.folder = folder
        self.source = folder if family.hub_format is None else folder / "reference"  # under the reference's names
        self._models: dict[torch.dtype, torch.nn.Module] = {}

    def generate(self, prompts: list[list[int]], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
        """Greedy continuations of `max_tokens` tokens (end-of-text ignored), each prompt alone. Kept on disk."""
        key = hashlib.sha256(json.dumps([prompts, max_tokens]).encode()).hexdigest()[:16]
        kept = self.folder.parent / f"{self.folder.name}.{key}.json"
        if not kept.exists():
            outputs = [self._generate(ids, max_tokens) for ids in prompts]
            partial = kept.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(outputs))
            partial.rename(kept)
        return json.loads(kept.read_text())

    @torch.no_grad()
    def logits(self, ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Next-token logits after every token of `ids`: [len(ids), vocab_size], computed in `dtype`, as float32.

        float64 stays float64, to measure float32 against.
        """
        with self._patched(), one_thread():
            logits = self._forward(self._model(dtype), torch.tensor([ids]))[0]
        return logits.to(torch.promote_types(dtype, torch.float32))

    def config(self) -> PreTrainedConfig:
        """The reference's configuration, of the family's class: vLLM gives the type of DeepSeek V3.2 another."""
        config = type(self.family.config()).from_pretrained(self.source)
        self._adjust(config)
        return config

    def _model(self, dtype: torch.dtype) -> torch.nn.Module:
        if dtype not in self._models:
            config = self.config()
            model = AutoModelForCausalLM.from_pretrained(
                self.source,
                config=config,
                dtype=dtype,
                attn_implementation=self.attention,
                experts_implementation="eager",  # its grouped products want sizes that are multiples of 16 bytes
            )
            model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
            self._models[dtype] = model.eval()
        return self._models[dtype]

    @torch.no_grad()
    def _generate(self, ids: list[int], max_tokens: int) -> list[int]:
        with self._patched(), one_thread():
            output = self._model(torch.float32).generate(torch.tensor([ids]), max_new_tokens=max_tokens)
        return output[0, len(ids) :].tolist()

    def _adjust(self, config) -> None:
        """Changes the configuration of the reference class before it is built."""

    def _forward(self, model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return model(ids, use_cache=False).logits

    def _patched(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class LongFactorsReference(Reference):
    """vLLM rotates every position with LongRoPE's long factors once max_model_len exceeds the original length."""

    def _adjust(self, config) -> None:
        rope, extended = config.rope_parameters, config.max_position_embeddings
        original = rope["original_max_position_embeddings"]
        rope["attention_factor"] = math.sqrt(1 + math.log(extended / original) / math.log(original))
        rope["short_factor"] = rope["long_factor"]
        rope["original_max_position_embeddings"] = config.original_max_position_embeddings = extended


class FalconAlibiReference(Reference):
    """Hugging Face's Falcon with its ALiBi bias in float32: its own code rounds slope * position to bfloat16.

    Its eager attention adds the bias twice (to the scores, and inside the mask), SDPA once, as in the paper and vLLM.
    """

    attention = "sdpa"

    def _patched(self) -> contextlib.AbstractContextManager:
        def build_alibi_tensor(attention_mask, num_heads, dtype):
            positions = (attention_mask.cumsum(dim=-1) - 1) * attention_mask
            bias = alibi_slopes(num_heads)[None, :, None] * positions[:, None, :]
            return bias.flatten(0, 1)[:, None].to(dtype)

        return mock.patch.object(modeling_falcon, "build_alibi_tensor", build_alibi_tensor)


class UncachedReference(Reference):
    """No KV cache: each step runs the whole sequence."""

    def _generate(self, ids: list[int], max_tokens: int) -> list[int]:
        tokens = list(ids)
        for _ in range(max_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(ids) :]


class PaperReference(UncachedReference):
    """A model of `pangu_reference.py`, in float64 unless bfloat16 is asked for."""

    @torch.no_grad()
    def logits(self, ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if dtype == torch.bfloat16:
            return super().logits(ids, dtype)
        return super().logits(ids, torch.float64).to(dtype)


class LlamaAlibiReference(UncachedReference):
    """LlamaForCausalLM with every position 0, so that rotary is the identity, and ALiBi in the attention mask.

    Baichuan 13B.
    """

    def _forward(self, model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        mask = (alibi_slopes(model.config.num_attention_heads)[:, None, None] * distance).to(model.dtype)
        mask = mask.masked_fill(distance > 0, torch.finfo(model.dtype).min)[None]
        return model(ids, attention_mask=mask, position_ids=torch.zeros_like(ids), use_cache=False).logits


@contextlib.contextmanager
def one_thread():
    """The models are far too small for torch's thread pool, which costs seconds a prompt on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """ALiBi's slope of each head, float32 [num_heads] (https://arxiv.org/abs/2108.12409, section 3)."""

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    below = 2 ** math.floor(math.log2(num_heads))
    return torch.tensor(powers(below) + powers(2 * below)[::2][: num_heads - below])


_CLASSES = {
    "falcon-alibi": FalconAlibiReference,
    "baichuan-13b": LlamaAlibiReference,
    "phi3-longrope-long": LongFactorsReference,
    "pangu-pro-moe": PaperReference,
    "parallel-pangu-pro-moe": PaperReference,
}


@cache
def reference(name: str, dtype: str = "float32", folder: Path | None = None) -> Reference:
    """The reference of family `name` on the weights of `checkpoint(name, dtype)`, or of another one of it."""
    return _CLASSES.get(name, Reference)(EVERY_FAMILY[name], folder or checkpoint(name, dtype))
