"""Attention backend: says in our operators what a layer's attention means, while the model is being captured.

vLLM calls `AttentionImpl` methods directly on this platform (`opaque_attention_op` is False). During capture the
tensors they get are graph inputs, so the calls below become nodes of the captured graph; nothing here runs in a step.
"""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheLayout


@dataclass
class GraphAttentionMetadata:
    """The attention inputs of one layer in the graph being captured.

    block_table: [num_reqs, max_blocks] int32; query_start_loc: [num_reqs + 1] int32; seq_lens: [num_reqs] int32.
    """

    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_size: int


class MetadataBuilder(AttentionMetadataBuilder):
    """The graph takes vLLM's common metadata as it is."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len=0, common_attn_metadata=None, fast_build=False, **kwargs):
        return common_attn_metadata


class MindSporeAttentionImpl(AttentionImpl):
    """Emits `vllm_ms.kv_write` and `vllm_ms.paged_attention` for one attention layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unsupported,
    ):
        unknown = sorted(name for name, value in unsupported.items() if value not in (None, False))
        if unknown:
            raise NotImplementedError(
                f"attention options {unknown} are not supported by the MindSpore backend; supported: sliding window, "
                "logits soft cap, ALiBi slopes, sinks"
            )
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(
                f"attention type {attn_type!r} is not supported by the MindSpore backend; supported: decoder attention"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sinks = sinks
        self.sliding_window = sliding_window or 0
        self.soft_cap = float(logits_soft_cap or 0.0)
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        """key: [num_tokens, num_kv_heads, head_size], value alike of its size; slot_mapping: [num_tokens] int64."""
        torch.ops.vllm_ms.kv_write(kv_cache, key, value, slot_mapping)

    def forward(
        self,
        layer,
        query,
        key,
        value,
        kv_cache,
        attn_metadata: GraphAttentionMetadata,
        output,
        output_scale=None,
        output_block_scale=None,
    ) -> torch.Tensor:
        """query: [num_tokens, num_heads, head_size]. Writes `output`, alike of a value's size, and returns it."""
        result = torch.ops.vllm_ms.paged_attention(
            query,
            kv_cache,
            attn_metadata.block_table,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            self.sinks,
            self.alibi_slopes,
            getattr(layer, "sink_kv", None),
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            self.scale,
            attn_metadata.block_size,
            self.sliding_window,
            self.soft_cap,
        )
        return output.copy_(result.view(output.shape))


class MindSporeAttentionBackend(AttentionBackend):
    """Paged attention of mixed prefill and decode; a slot of the cache is [num_kv_heads, head_size + value_size]."""

    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[MindSporeAttentionImpl]:
        return MindSporeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def is_supported_on_current_device(cls, **attention) -> bool:
        """Asked by models whose values are narrower than their keys, of the backend that vLLM has for that."""
        return True

    @classmethod
    def set_head_size_v(cls, head_size_v: int) -> None:
        """Nothing: a layer's cache says how wide its values are."""


def register() -> None:
    """Models that name vLLM's backend for values narrower than keys get this one."""
    register_backend(
        AttentionBackendEnum.FLASH_ATTN_DIFFKV,
        f"{MindSporeAttentionBackend.__module__}.{MindSporeAttentionBackend.__qualname__}",
    )
