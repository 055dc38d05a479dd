"""What a model's graphs depend on: its configuration, its class, its weights' shapes, and the versions underneath."""

import inspect
import platform
from importlib import metadata
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

from vllm_mindspore.compiler import cache

DISTRIBUTIONS = ("vllm", "torch", "mindspore", "numpy", "transformers")


def of_model(model: torch.nn.Module, vllm_config: VllmConfig) -> dict[str, object]:
    """Facts for the cache key; see `Compiler`."""
    return {
        "versions": {name: metadata.version(name) for name in DISTRIBUTIONS},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "package": cache.source_hash(),
        **of_class(model),
        "hf_config": vllm_config.model_config.hf_config.to_dict(),
        "max_model_len": vllm_config.model_config.max_model_len,
        "dtype": str(vllm_config.model_config.dtype),
        "cache_dtype": vllm_config.cache_config.cache_dtype,
        "quantization": vllm_config.model_config.quantization,
        "parallel": of_rank(vllm_config.parallel_config),
    }


def of_class(model: torch.nn.Module) -> dict[str, str]:
    """The model's class and the file that it is written in."""
    source = inspect.getsourcefile(type(model))
    return {
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "model_source": cache.file_hash(Path(source)) if source else "",
    }


def of_rank(parallel_config) -> dict[str, int]:
    """The sizes of the engine's groups and this rank's places: its graphs have its part of the weights."""
    return {
        "tp_size": parallel_config.tensor_parallel_size,
        "pp_size": parallel_config.pipeline_parallel_size,
        "dp_size": parallel_config.data_parallel_size,
        "dp_rank": parallel_config.data_parallel_rank,
        "expert_parallel": int(parallel_config.enable_expert_parallel),
        "tp_rank": get_tensor_model_parallel_rank(),
        "pp_rank": get_pp_group().rank_in_group,
    }


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by qualified name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def weights_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and storage type of every tensor."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
