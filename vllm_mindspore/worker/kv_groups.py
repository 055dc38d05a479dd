"""The KV cache groups vLLM will form for a model, known as soon as the model is instantiated."""

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vllm_mindspore import compat
from vllm_mindspore.config import UnsupportedOptionError
from vllm_mindspore.worker.model_capture import attention_layers, cache_owner

SERVED = (FullAttentionSpec, SlidingWindowSpec, MLAAttentionSpec)


def specs_of_model(vllm_config: VllmConfig) -> dict[str, KVCacheSpec]:
    """The KV cache specification of every attention layer that has a cache of its own.

    Raises:
        UnsupportedOptionError: a layer attends in a way that no operator has, and that only its specification shows.
    """
    layers = attention_layers(vllm_config)
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if isinstance(layer, AttentionLayerBase) and name not in layers:
            raise _unsupported(name, f"a layer of type {type(layer).__name__}")
    owners = {name: layer for name, layer in layers.items() if cache_owner(name, layers) == name}
    specs = {name: layer.get_kv_cache_spec(vllm_config) for name, layer in owners.items()}
    for name, spec in specs.items():
        _refuse(name, spec)
    return specs


def _refuse(layer_name: str, spec: KVCacheSpec) -> None:
    found = type(spec).__name__ if type(spec) not in SERVED else ""
    if not found and not isinstance(spec, MLAAttentionSpec) and spec.head_size_v > spec.head_size:
        found = f"values of {spec.head_size_v} with keys of {spec.head_size}"
    if found:
        raise _unsupported(layer_name, found)


def _unsupported(layer_name: str, found: str) -> UnsupportedOptionError:
    supported = (
        "full attention, sliding windows and latent attention (also sparse, as DeepSeek V3.2's), with values that are "
        "not wider than keys"
    )
    return UnsupportedOptionError(f"the attention of {layer_name}", found, supported, "Use another model.")


def of_model(vllm_config: VllmConfig) -> list[KVCacheGroupSpec]:
    """vLLM's groups of layers that share block tables."""
    return compat.kv_cache_groups(vllm_config, specs_of_model(vllm_config))
