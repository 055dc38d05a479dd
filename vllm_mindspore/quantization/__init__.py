"""Weights that are not in memory as the checkpoint has them, through vLLM's own registry.

`--quantization mindspore_int8` and `mindspore_int4` quantize while weights are read; a checkpoint in fp8 is multiplied
out while it is read, which vLLM's configuration calls `mindspore_dequantize`.
"""

BITS = {"mindspore_int8": 8, "mindspore_int4": 4}  # name of the method -> bits of a weight
NAMES = tuple(BITS)
DEQUANTIZE = "mindspore_dequantize"


def register() -> None:
    """Register the methods with vLLM; idempotent, and before a model is configured."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_mindspore.quantization.config import CONFIGS

    for name, config in CONFIGS.items():
        register_quantization_config(name)(config)
