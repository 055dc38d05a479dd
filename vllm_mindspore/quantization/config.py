"""Which layers of a model are quantized, in the form vLLM's models ask for it, and of which checkpoints."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_mindspore.quantization import BITS, DEQUANTIZE
from vllm_mindspore.quantization.checkpoint import Fp8Checkpoint
from vllm_mindspore.quantization.method import QuantizedLinearMethod

# Layers that stay in the checkpoint's type, by the end of their name: the router of a mixture of experts decides by
# small differences, and multi-head latent attention reads the weight of kv_b_proj by itself.
EXACT_LAYERS = ("gate", "router", "shared_expert_gate", "kv_b_proj")


class LoadTimeConfig(QuantizationConfig):
    """What becomes of weights while they are read, of a checkpoint that is unquantized, or in fp8.

    checkpoint: how the latter is scaled; `dequantize.py` undoes it, so that layers see an unquantized one.
    """

    name: str

    def __init__(self, checkpoint: Fp8Checkpoint | None = None):
        super().__init__()
        self.checkpoint = checkpoint

    def get_name(self) -> str:
        return self.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # of CUDA devices; a host has none

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json has it, or the checkpoint is not quantized

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LoadTimeConfig":
        """From `quantization_config` of a checkpoint that `override_quantization_method` has claimed."""
        return cls(Fp8Checkpoint.of(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claims checkpoints in fp8, where --quantization names this method.

        Raises:
            UnsupportedOptionError: a checkpoint that says fp8 or compressed-tensors, and is not plain fp8.
        """
        return cls.name if cls.is_meant(hf_quant_cfg, user_quant) and Fp8Checkpoint.of(hf_quant_cfg) else None

    @classmethod
    def is_meant(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None) -> bool:
        """Whether --quantization, `user_quant`, asks for this method."""
        return user_quant == cls.name


class DequantizeConfig(LoadTimeConfig):
    """A checkpoint in fp8, and --quantization says nothing, or what the checkpoint is: layers are not quantized."""

    name = DEQUANTIZE

    @classmethod
    def is_meant(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None) -> bool:
        return user_quant in (None, cls.name, hf_quant_cfg.get("quant_method"))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class WeightOnlyConfig(LoadTimeConfig):
    """Linear layers and the output head get weights of `bits` bits; everything else keeps the checkpoint's type."""

    @property
    def bits(self) -> int:
        return BITS[self.name]

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


CONFIGS: dict[str, type[LoadTimeConfig]] = {
    config.name: config for config in (MindSporeInt8Config, MindSporeInt4Config, DequantizeConfig)
}
