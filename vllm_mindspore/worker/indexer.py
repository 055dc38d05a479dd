"""Sparse attention of DeepSeek V3.2: says in our operators what an indexer does, while the model is captured.

vLLM's indexer rounds queries and keys to fp8, with a Hadamard rotation before it, because its kernels and its cache are
made for that. Here keys are cached in the type of other KV caches, and one operator normalizes, rotates, caches and
compares them; see `ops/indexer.py`.
"""

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.deepseek_v2 import DeepseekV32IndexerCache, Indexer
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from vllm_mindspore.worker.mla import SELECTED, IndexerKeys, MindSporeSparseMLABackend


class MindSporeIndexerCache(DeepseekV32IndexerCache, IndexerKeys):
    """vLLM's layer with keys as they are instead of fp8 and scales; has no state of its own."""

    @property
    def head_size(self) -> int:
        return self.head_dim

    def get_attn_backend(self) -> type[MindSporeSparseMLABackend]:
        return MindSporeSparseMLABackend


class MindSporeIndexer(Indexer):
    """vLLM's indexer in one operator, `vllm_ms.lightning_indexer`."""

    def forward(self, hidden_states: torch.Tensor, qr: torch.Tensor, positions, rotary_emb) -> torch.Tensor:
        """hidden_states: [num_tokens, hidden], normed; qr: [num_tokens, q_lora_rank], normed.

        Returns [num_tokens, top_k] float32, which the layer's attention and those after it read.
        """
        query, _ = self.wq_b(qr)
        key_weights, _ = self.wk_weights_proj(hidden_states)
        context, name = get_forward_context(), self.k_cache.prefix
        metadata = context.attn_metadata[name]
        selected = torch.ops.vllm_ms.lightning_indexer(
            query,
            key_weights,
            positions,
            rotary_emb.cos_sin_cache,
            self.k_norm.weight,
            self.k_norm.bias,
            self.k_cache.kv_cache,
            context.slot_mapping[name],
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            self.n_head,
            self.head_dim,
            self.rope_dim,
            self.topk_tokens,
            rotary_emb.is_neox_style,
            self.k_norm.eps,
            metadata.block_size,
        )
        context.additional_kwargs[SELECTED] = selected
        return selected


def adopt(model: torch.nn.Module) -> None:
    """Make every indexer of a model ours."""
    for module in model.modules():
        if type(module) is Indexer:
            module.__class__ = MindSporeIndexer
            cache = module.k_cache
            cache.__class__ = MindSporeIndexerCache
            cache.head_dim = module.head_dim
            cache.dtype = kv_cache_dtype_str_to_dtype(cache.cache_config.cache_dtype, module.vllm_config.model_config)
