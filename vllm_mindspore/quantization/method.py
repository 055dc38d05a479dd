"""A linear layer, or an output head, whose weight is quantized while the checkpoint is read.

vLLM's layer-wise loading does the bookkeeping: the checkpoint's weight exists on the meta device only, until all its
shards (q, k, v; gate, up) have been read; then it is assembled, quantized and dropped. So beside the quantized weights
no more than a layer or two of the original ones is in memory. The quantized weight has its memory from the beginning:
graphs are captured with it before anything is read.
"""

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from vllm_mindspore.ops import quantized

VALUES, SCALES = "weight_values", "weight_scales"  # parameters of a layer; shapes: ops/quantized.py


class MissingWeightError(ValueError):
    """The checkpoint lacks a layer's weight, or a shard of it."""


class QuantizedLinearMethod(LinearMethodBase):
    """act(x @ W^T + bias) with W of `bits` bits. One object a layer."""

    uses_meta_device = True

    def __init__(self, bits: int, prefix: str):
        self.bits, self.prefix = bits, prefix
        self.random_weights = get_current_vllm_config().load_config.load_format == "dummy"
        self.embedding: VocabParallelEmbedding | None = None  # an output head's, when tied

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        weight_loader = extra_weight_attrs.pop("weight_loader")
        original = torch.empty(rows, columns, dtype=params_dtype, device="meta")
        weight = ModelWeightParameter(data=original, input_dim=1, output_dim=0, weight_loader=weight_loader)
        layer.register_parameter("weight", weight)
        for name, value in extra_weight_attrs.items():
            setattr(weight, name, value)
        shapes = quantized.packed_shapes(rows, columns, self.bits)
        for name, shape, dtype in zip((VALUES, SCALES), shapes, (torch.uint8, torch.float32), strict=True):
            parameter = Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            parameter.weight_loader_numel = 0  # not in the checkpoint
            layer.register_parameter(name, parameter)
        layer.quantized_rows = rows
        initialize_online_processing(layer)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: VocabParallelEmbedding) -> torch.nn.Module:
        """The head is a quantized copy of the embedding, whose rows stay exact; made once everything is read."""
        self.embedding = embed_tokens
        del layer.weight
        get_layerwise_info(layer).reset()
        return layer

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        weight = layer.weight if self.embedding is None else self.embedding.weight
        if self.embedding is None:
            self._require_loaded(layer)
        quantized.quantize(
            weight.detach().as_subclass(torch.Tensor), self.bits, getattr(layer, VALUES), getattr(layer, SCALES)
        )
        if self.embedding is None:
            del layer.weight
        layer._already_called_process_weights_after_loading = True

    def _require_loaded(self, layer: torch.nn.Module) -> None:
        """Raises MissingWeightError: nothing else would notice."""
        info = get_layerwise_info(layer)
        vocabulary = getattr(layer, "org_vocab_size", layer.weight.shape[0])  # rows beyond it are padding
        expected = min(vocabulary, layer.weight.shape[0]) * layer.weight.shape[1]
        if not self.random_weights and info.load_numel < expected:
            raise MissingWeightError(
                f"{self.prefix}: found {info.load_numel} values in the checkpoint, the layer has {expected}. "
                "Quantization needs the whole weight: use a complete checkpoint."
            )

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        operator = torch.ops.vllm_ms.linear_int4 if self.bits == 4 else torch.ops.vllm_ms.linear_int8
        values, scales, rows = getattr(layer, VALUES), getattr(layer, SCALES), layer.quantized_rows
        return operator(x, values, scales, bias, None, None, None, rows, "", 0.0, 0.0, "")
