"""Multi-head latent attention: says in our operators what a layer's attention means, while the model is captured.

vLLM's own layer calls one implementation for decode tokens and another for prefill tokens, on weights that it has taken
apart. Here one operator reads `kv_b_proj` where it is and serves a step of both.
"""

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import MLAAttentionImpl
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

from vllm_mindspore.worker.attention import GraphAttentionMetadata, MindSporeAttentionBackend

SELECTED = "selected_positions"  # in the forward context: what the last indexer has selected


class MindSporeMLAImpl(MLAAttentionImpl):
    """Emits `vllm_ms.mla_kv_write` and `vllm_ms.mla_attention` for one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        kv_lora_rank: int,
        kv_b_proj: torch.nn.Module,
        sliding_window: int | None = None,
        **same_for_all,
    ):
        if sliding_window:
            raise NotImplementedError(
                f"multi-head latent attention with a sliding window ({sliding_window}) is not supported by the "
                "MindSpore backend; supported: full attention"
            )
        if getattr(kv_b_proj, "bias", None) is not None:
            raise NotImplementedError("a bias of kv_b_proj is not supported by the MindSpore backend")
        self.num_heads, self.scale = num_heads, float(scale)
        self.nope_dim, self.rope_dim, self.v_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.kv_lora_rank, self.kv_b_proj = kv_lora_rank, kv_b_proj

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale) -> None:
        """kv_c_normed: [num_tokens, kv_lora_rank]; k_pe: [num_tokens, 1, rope_dim]; slot_mapping: int64."""
        torch.ops.vllm_ms.mla_kv_write(kv_cache, kv_c_normed, k_pe, slot_mapping)

    def attend(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: GraphAttentionMetadata) -> torch.Tensor:
        """query: [num_tokens, num_heads, nope_dim + rope_dim] → [num_tokens, num_heads * v_dim]."""
        return torch.ops.vllm_ms.mla_attention(
            query,
            self.kv_b_proj.weight,
            kv_cache,
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            self.selected_positions(),
            self.num_heads,
            self.nope_dim,
            self.rope_dim,
            self.v_dim,
            self.kv_lora_rank,
            self.scale,
            metadata.block_size,
        )

    def selected_positions(self) -> torch.Tensor | None:
        """[num_tokens, top_k] float32 where tokens with more than top_k keys attend to these alone; None: to all."""
        return None

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        raise NotImplementedError("MindSporeMLAAttention.forward_impl does not divide a step into forward_mqa and _mha")


class MindSporeMLABackend(MindSporeAttentionBackend):
    """Attention to a paged cache of latents; a slot is one row [1, kv_lora_rank + qk_rope_head_dim]."""

    @staticmethod
    def get_impl_cls() -> type[MindSporeMLAImpl]:
        return MindSporeMLAImpl

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False


class MindSporeSparseMLAImpl(MindSporeMLAImpl):
    """As MindSporeMLAImpl, attending to what an indexer has selected (`worker/indexer.py`).

    A layer without an indexer of its own attends to what one before it has selected.
    """

    is_sparse = True

    def record_logical_topk_ready(self) -> None:
        """There are no streams to wait for each other."""

    def selected_positions(self) -> torch.Tensor:
        """Raises NotImplementedError when the layer that selects is in another pipeline stage."""
        positions = get_forward_context().additional_kwargs.get(SELECTED)
        if positions is None:
            raise NotImplementedError(
                "sparse attention: the first layer of a pipeline stage has no indexer of its own, and what the stage "
                "before has selected is not passed on; supported: stages that begin with an indexer. Use another "
                "--pipeline-parallel-size."
            )
        return positions


class MindSporeSparseMLABackend(MindSporeMLABackend):
    """Attention to the positions of a paged cache of latents that an indexer selects."""

    @staticmethod
    def get_impl_cls() -> type[MindSporeSparseMLAImpl]:
        return MindSporeSparseMLAImpl

    @classmethod
    def is_sparse(cls) -> bool:
        return True


class IndexerKeys(AttentionLayerBase):
    """A layer whose KV cache holds the keys of an indexer: a slot is one row [1, head_size]."""

    head_size: int


class MindSporeMLAPrefill(MLAPrefillBackend):
    """vLLM's layer asks for a prefill backend; ours never calls it."""

    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        return "MINDSPORE"

    def run_prefill_new_tokens(self, *args, **kwargs):
        raise NotImplementedError("prefill runs in vllm_ms.mla_attention")

    def run_prefill_context_chunk(self, *args, **kwargs):
        raise NotImplementedError("prefill runs in vllm_ms.mla_attention")


class MindSporeMLAAttention(MLAAttention):
    """vLLM's layer without what divides a step into decode and prefill tokens; has no state of its own."""

    def update_kv_cache(
        self, kv_c_normed, k_pe, kv_cache, slot_mapping, attn_metadata, kv_cache_dtype, k_scale
    ) -> None:
        self.impl.do_kv_cache_update(kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale)

    def forward_impl(self, q, k_c_normed, k_pe, kv_cache, attn_metadata, output, **unused) -> torch.Tensor:
        """q: [num_tokens, num_heads, nope_dim + rope_dim]. Writes `output` and returns it."""
        result = self.impl.attend(q, kv_cache, attn_metadata)
        return output.copy_(result.view(output.shape))

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The operator reads kv_b_proj as it was loaded: nothing is taken apart."""


def adopt(model: torch.nn.Module) -> None:
    """Make every latent attention layer of a model ours, before it is captured and its weights are loaded.

    vLLM has a hook for the wrapper around this layer, which not every model uses, and none for the layer.
    """
    layers = [module for module in model.modules() if type(module) is MLAAttention]
    for layer in layers:
        layer.__class__ = MindSporeMLAAttention
    if any(isinstance(layer.impl, MindSporeSparseMLAImpl) for layer in layers):
        from vllm_mindspore.worker import indexer  # imports the models that have one

        indexer.adopt(model)
