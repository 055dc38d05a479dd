"""The KV cache groups vLLM will form for a model, known as soon as the model is instantiated."""

from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vllm_mindspore import compat
from vllm_mindspore.compiler.bind import KVGroup
from vllm_mindspore.config import UnsupportedOptionError
from vllm_mindspore.distributed.gather import of_every_rank
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
    """vLLM's groups of layers that share block tables, each with this pipeline stage's layers, which may be none.

    vLLM forms them for the layers of all stages, so every stage has to call this at the same time.
    """
    own = specs_of_model(vllm_config)
    groups = compat.kv_cache_groups(vllm_config, _specs_of_all_stages(own))
    return compat.kv_cache_groups_of_stage(groups, own)


def _specs_of_all_stages(own: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    stages = of_every_rank(own, get_pp_group().cpu_group)
    return {name: spec for stage in stages for name, spec in stage.items()}


def for_graphs(groups: list[KVCacheGroupSpec], block_sizes: list[int] | None = None) -> list[KVGroup]:
    """The groups of which this stage has layers. block_sizes: of each group's kernels, if other than its blocks."""
    sizes = block_sizes or [group.kv_cache_spec.block_size for group in groups]
    named = zip(groups, sizes, strict=True)
    return [KVGroup(tuple(group.layer_names), size) for group, size in named if group.layer_names]
