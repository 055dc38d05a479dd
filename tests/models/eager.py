"""Runs families through the classes that serve them in plain PyTorch and prints how far they are from the reference.

    python -m tests.models.eager FAMILY...        one JSON object per line: name, class, module, error, greedy

Dense families only: vLLM has no experts in plain PyTorch. No MindSpore, no KV cache, no compilation: a platform that
only exists here, and attention written out. It proves the checkpoints and references of this package (tensor names,
configuration fields, formulas), independently of the backend under test. It must own its process, because vLLM has one
platform per process.

Both sides run torch's kernels, so an error of exactly 0 is possible and means no more than 1e-5 does: it happens where
Hugging Face, like vLLM, applies SiLU to a strided half of a packed gate_up (Phi-3, GLM-4) or has no gate (GPT-2); the
other classes apply it to a contiguous tensor, which rounds differently. Numerical room is measured against float64.
"""

import json
import os
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_PLUGINS"] = ""

import torch
import vllm.platforms
from vllm.platforms.interface import Platform, PlatformEnum
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl


class EagerImpl(AttentionImpl):
    """Keeps the attributes of a layer's attention; `attention` below computes it."""

    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads,
        alibi_slopes,
        sliding_window,
        kv_cache_dtype,
        soft_cap=None,
        *_,
        **__,
    ):  # noqa: E501
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.alibi_slopes, self.sliding_window, self.soft_cap = alibi_slopes, sliding_window, soft_cap

    def forward(self, *args, **kwargs):
        raise NotImplementedError


class EagerBackend(AttentionBackend):
    supported_dtypes = [torch.float32, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls():
        return EagerImpl

    @staticmethod
    def get_builder_cls():
        raise NotImplementedError

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []


class EagerPlatform(Platform):
    _enum = PlatformEnum.OOT
    device_name = device_type = "cpu"
    dispatch_key = "CPU"
    simple_compile_backend = "eager"
    dist_backend = "gloo"

    @classmethod
    def import_kernels(cls) -> None:
        pass

    @classmethod
    def import_ir_kernels(cls) -> None:
        pass

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "cpu"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return True

    @classmethod
    def get_attn_backend_cls(cls, *args, **kwargs) -> str:
        return f"{EagerBackend.__module__}.{EagerBackend.__name__}"

    @classmethod
    def update_block_size_for_backend(cls, vllm_config) -> None:
        pass


def attention(layer, query, key, value, output_shape=None, **_):
    """Causal attention of one sequence with everything a layer can ask for; [tokens, heads * head_size] in and out."""
    impl, tokens = layer.impl, query.shape[0]
    q = query.view(tokens, layer.num_heads, layer.head_size).transpose(0, 1)
    k, v = (t.view(tokens, layer.num_kv_heads, layer.head_size).transpose(0, 1) for t in (key, value))
    k, v = (t.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=0) for t in (k, v))
    scores = (q @ k.transpose(1, 2)) * impl.scale
    if impl.soft_cap:
        scores = torch.tanh(scores / impl.soft_cap) * impl.soft_cap
    distance = torch.arange(tokens)[None, :] - torch.arange(tokens)[:, None]
    if impl.alibi_slopes is not None:
        scores = scores + torch.tensor(impl.alibi_slopes)[:, None, None] * distance
    hidden = distance > 0
    if layer.sliding_window:
        hidden |= distance <= -layer.sliding_window
    weights = scores.masked_fill(hidden, float("-inf")).float().softmax(-1).to(v.dtype)
    return (weights @ v).transpose(0, 1).reshape(tokens, -1)


@torch.no_grad()
def compare(name: str) -> dict:
    """Loads family `name` into vLLM's class; its largest logit error over PROMPTS and their greedy text."""
    from vllm.config import CompilationMode, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    from .checkpoints import checkpoint
    from .families import FAMILIES
    from .reference import PROMPTS, reference

    args = EngineArgs(model=str(checkpoint(name)), dtype="float32", enforce_eager=True, **FAMILIES[name].llm)
    config = args.create_engine_config()
    config.compilation_config.mode = CompilationMode.NONE
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        model = get_model(vllm_config=config)
        expected = reference(name)
        error, greedy = 0.0, True
        for prompt, output in zip(PROMPTS, expected.generate(PROMPTS), strict=True):
            ids = prompt + output[:-1]
            logits = model.compute_logits(model(torch.tensor(ids), torch.arange(len(ids)), None, None)).float()
            difference = (logits - expected.logits(ids)).abs().max().item()
            error = difference if not difference <= error else error  # a NaN stays: max() would drop it
            greedy &= logits[len(prompt) - 1 :].argmax(-1).tolist() == output
    return {
        "name": name,
        "class": type(model).__name__,
        "module": type(model).__module__,
        "error": error,
        "greedy": greedy,
    }


def main() -> None:
    vllm.platforms._current_platform = EagerPlatform()
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models import registry

    from vllm_mindspore import models

    models.register()
    registry._run_in_subprocess = lambda inspect: inspect()
    Attention.forward = attention
    torch.accelerator.empty_cache = lambda: None  # the loader calls it on every platform; it raises without a device
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        print(json.dumps(compare(name)), flush=True)


if __name__ == "__main__":
    main()
