"""Weight-only quantization at load: `--quantization mindspore_int8` and `mindspore_int4`, in vLLM's own registry."""

BITS = {"mindspore_int8": 8, "mindspore_int4": 4}  # name of the method -> bits of a weight
NAMES = tuple(BITS)


def register() -> None:
    """Register the methods with vLLM; idempotent, and before a model is configured."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_mindspore.quantization.config import CONFIGS

    for name, config in CONFIGS.items():
        register_quantization_config(name)(config)
