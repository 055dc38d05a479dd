"""One step of the model: vLLM's inputs of a batch → the two compiled graphs → torch tensors, nothing copied."""

from collections.abc import Callable

import numpy as np
import torch
from vllm.forward_context import get_forward_context

from vllm_mindspore.compiler.bind import KVGroup
from vllm_mindspore.compiler.capture import GraphInput
from vllm_mindspore.compiler.program import Program
from vllm_mindspore.compiler.tensors import array_to_mindspore, to_mindspore, to_torch


class ModelStep:
    """Stands in for the model's `forward` and `compute_logits`.

    KV caches are graph inputs of any size, so a cache of another size needs no other graph.
    """

    def __init__(
        self,
        model: Program,
        logits: Program,
        groups: list[KVGroup],
        cached_files: Callable[[], object | None],
    ):
        """groups: the KV cache groups in vLLM's order; any layer of a group carries the group's metadata."""
        self.model, self.logits, self.groups = model, logits, groups
        self._cached_files = cached_files
        self.kv_caches: dict[str, object] = {}
        (hidden_states,) = model.emitted.outputs
        logits.compile([(hidden_states, torch.float32)], cached_files)

    def bind_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take vLLM's caches, [blocks, heads, block_size, row] views of [blocks, block_size, heads, row] memory.

        MindSpore sees each as [slots, heads, row]: the same memory.
        """
        self.kv_caches = {}
        for name, cache in kv_caches.items():
            rows = cache.permute(0, 2, 1, 3)
            if not rows.is_contiguous():
                raise ValueError(
                    f"KV cache of layer {name}: shape {tuple(cache.shape)}, stride {cache.stride()} is not LBNHC "
                    "in one piece"
                )
            self.kv_caches[name] = to_mindspore(rows.view(-1, *rows.shape[2:]))
        if self.model.counters.calls == 0:
            types = {name: cache.dtype for name, cache in kv_caches.items()}
            self.model.compile(
                [self._input_signature(item, types) for item in self.model.emitted.inputs], self._cached_files
            )

    def _input_signature(self, item: GraphInput, types: dict[str, torch.dtype]):
        if item.kind == "kv_cache":
            return (None, *self.kv_caches[item.name].shape[1:]), types[item.name]
        if item.kind == "block_table":
            return (None, None), torch.int32
        if item.kind == "slot_mapping" or item.name == "positions":
            return (None,), torch.int64
        return (None,), torch.int32

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None) -> torch.Tensor:
        """input_ids [num_tokens] int32, positions [num_tokens] int64 → hidden states [num_tokens, hidden] float32."""
        context = get_forward_context()
        metadata = context.attn_metadata
        if not isinstance(metadata, dict):
            raise RuntimeError("the model was called without attention metadata: nothing of this backend does that")
        common = next(iter(metadata.values()))
        values = {
            "input_ids": input_ids,
            "positions": positions,
            "query_start_loc": common.query_start_loc,
            "seq_lens": common.seq_lens,
        }
        inputs = [
            self._input(item, values, metadata, context.slot_mapping, common) for item in self.model.emitted.inputs
        ]
        return to_torch(self.model(inputs))

    def _input(self, item: GraphInput, values, metadata, slots, common):
        if item.kind == "kv_cache":
            return self.kv_caches[item.name]
        if item.kind == "tensor":
            return to_mindspore(values[item.name])
        group = self.groups[int(item.name)]
        if item.kind == "slot_mapping":
            return to_mindspore(slots[group.layers[0]])
        return _used_blocks(metadata[group.layers[0]].block_table_tensor, common, group.block_size)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden] float32 → [num_rows, vocabulary] float32."""
        return to_torch(self.logits([to_mindspore(hidden_states.contiguous())]))


def _used_blocks(block_table: torch.Tensor, common, block_size: int):
    """The columns of the block table that this step's longest context uses, contiguous."""
    blocks = max(-(-common.max_seq_len // block_size), 1)
    return array_to_mindspore(np.ascontiguousarray(block_table[: common.num_reqs, :blocks].numpy()))
