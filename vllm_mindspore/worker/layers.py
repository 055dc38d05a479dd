"""vLLM layers whose forward is replaced by one operator of ours, through `CustomOp.register_oot`.

vLLM looks a replacement up by the layer's class name, so each class that shares a forward is registered by itself.
Norms need nothing here: they reach the capture as `vllm_ir` operators. Mixtures of experts are in `moe.py`, attention
with learned keys and values in `sink_attention.py`.
"""

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers import activation, rotary_embedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.deepseek_scaling_rope import DeepseekScalingRotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_mindspore.worker import attention, moe, sink_attention


def _rotary(self, positions, query, key=None, offsets=None):
    if offsets is not None:
        positions = positions + offsets
    positions = positions.flatten()

    def rotate(x):
        if x is None:
            return None
        return torch.ops.vllm_ms.rotary(
            positions, x, self.cos_sin_cache, self.head_size, self.rotary_dim, self.is_neox_style
        ).view(x.shape)

    return rotate(query), rotate(key)


def _activation(name: str):
    def forward(self, x):
        return torch.ops.vllm_ms.activation(x, name)

    return forward


def _gelu_and_mul(self, x):
    return torch.ops.vllm_ms.activation(x, "gelu_tanh_and_mul" if self.approximate == "tanh" else "gelu_and_mul")


ACTIVATIONS = {
    "SiluAndMul": _activation("silu_and_mul"),
    "GeluAndMul": _gelu_and_mul,
    "NewGELU": _activation("gelu_tanh"),
    "ReLUSquaredActivation": _activation("relu2"),
}


class MindSporeVocabParallelEmbedding(VocabParallelEmbedding):
    """vLLM's embedding, of which each rank has some rows: an operator looks up its own, and ranks add what they found.

    vLLM masks the ids of other ranks in a function that it compiles, which a capture cannot go through.
    """

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        if self.tp_size == 1:
            return super().forward(input_)
        first = self.shard_indices.org_vocab_start_index
        rows = torch.ops.vllm_ms.embedding_shard(input_.reshape(-1), self.weight, first).to(self.weight.dtype)
        rows = rows.view(*input_.shape, self.embedding_dim)
        return tensor_model_parallel_all_reduce(rows) if self.reduce_results else rows


REPLACEMENTS = {
    **moe.REPLACEMENTS,
    **sink_attention.REPLACEMENTS,
    "VocabParallelEmbedding": MindSporeVocabParallelEmbedding,
}


def _rotary_classes() -> list[type]:
    """vLLM's rotary embeddings that differ only in their table: `RotaryEmbedding`'s forward, inherited or repeated."""
    classes = {RotaryEmbedding, DeepseekScalingRotaryEmbedding}
    for value in vars(rotary_embedding).values():
        if isinstance(value, type) and issubclass(value, RotaryEmbedding):
            if value.forward_native is RotaryEmbedding.forward_native and value.forward is RotaryEmbedding.forward:
                classes.add(value)
    return sorted(classes, key=lambda cls: cls.__name__)


def register() -> None:
    """Register every replacement; idempotent, and before vLLM instantiates a model."""
    attention.register()
    for cls in _rotary_classes():
        _register(cls, _rotary)
    for name, forward in ACTIVATIONS.items():
        _register(getattr(activation, name), forward)
    for name, cls in REPLACEMENTS.items():
        if name not in op_registry_oot:
            CustomOp.register_oot(cls, name=name)


def _register(cls: type, forward) -> None:
    if cls.__name__ not in op_registry_oot:
        replacement = type(f"MindSpore{cls.__name__}", (cls,), {"forward_oot": forward, "__doc__": cls.__doc__})
        CustomOp.register_oot(name=cls.__name__)(replacement)
