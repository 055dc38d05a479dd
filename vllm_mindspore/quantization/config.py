"""Which layers of a model are quantized, in the form vLLM's models ask for it."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_mindspore.quantization import BITS
from vllm_mindspore.quantization.method import QuantizedLinearMethod

# Layers that stay in the checkpoint's type, by the end of their name: the router of a mixture of experts decides by
# small differences, and multi-head latent attention reads the weight of kv_b_proj by itself.
EXACT_LAYERS = ("gate", "router", "shared_expert_gate", "kv_b_proj")


class WeightOnlyConfig(QuantizationConfig):
    """Linear layers and the output head get weights of `bits` bits; everything else keeps the checkpoint's type."""

    name: str

    @property
    def bits(self) -> int:
        return BITS[self.name]

    def get_name(self) -> str:
        return self.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # of CUDA devices; a host has none

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # the checkpoint is not quantized

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WeightOnlyConfig":
        """Raises ValueError: only called for a checkpoint that says it is quantized."""
        raise ValueError(
            f"--quantization {cls.name}: found a quantized checkpoint ({config}). It quantizes bfloat16, float16 and "
            "float32 checkpoints while they load. Use the original checkpoint."
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            exact = prefix.rpartition(".")[2] in EXACT_LAYERS
            return UnquantizedLinearMethod() if exact else QuantizedLinearMethod(self.bits, prefix)
        return QuantizedLinearMethod(self.bits, prefix) if isinstance(layer, ParallelLMHead) else None


class MindSporeInt8Config(WeightOnlyConfig):
    """`--quantization mindspore_int8`."""

    name = "mindspore_int8"


class MindSporeInt4Config(WeightOnlyConfig):
    """`--quantization mindspore_int4`."""

    name = "mindspore_int4"


CONFIGS: dict[str, type[WeightOnlyConfig]] = {
    config.name: config for config in (MindSporeInt8Config, MindSporeInt4Config)
}
