"""The KV cache groups vLLM will form for a model, known as soon as the model is instantiated."""

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec

from vllm_mindspore import compat
from vllm_mindspore.worker.model_capture import attention_layers, cache_owner


def specs_of_model(vllm_config: VllmConfig) -> dict[str, KVCacheSpec]:
    """The KV cache specification of every attention layer that has a cache of its own."""
    layers = attention_layers(vllm_config)
    owners: dict[str, AttentionLayerBase] = {
        name: layer for name, layer in layers.items() if cache_owner(name, layers) == name
    }
    return {name: layer.get_kv_cache_spec(vllm_config) for name, layer in owners.items()}


def of_model(vllm_config: VllmConfig) -> list[KVCacheGroupSpec]:
    """vLLM's groups of layers that share block tables."""
    return compat.kv_cache_groups(vllm_config, specs_of_model(vllm_config))
