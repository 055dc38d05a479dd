"""What model families need beyond vLLM's own definitions; installed as `vllm_mindspore.models`.

`ARCHITECTURES` is the table of what is registered with vLLM: models that vLLM no longer has or never had, written with
vLLM's own layers, so that its loader, scheduler and our capture treat them as any other. `CONFIGURATIONS` is that of
what is registered with Transformers: model types whose configuration would otherwise need code of the checkpoint.
"""

import importlib

ARCHITECTURES: dict[str, str] = {
    "BaiChuanForCausalLM": "vllm_mindspore.models.baichuan:BaiChuanForCausalLM",
    "BaichuanForCausalLM": "vllm_mindspore.models.baichuan:BaichuanForCausalLM",
    "PanguProMoEForCausalLM": "vllm_mindspore.models.pangu_pro_moe:PanguProMoEForCausalLM",
}
CONFIGURATIONS: dict[str, str] = {
    "PanguProMoE": "vllm_mindspore.models.pangu_pro_moe_config:PanguProMoEConfig",
}


def register() -> None:
    """Register every architecture that vLLM does not have, and every configuration that Transformers does not.

    The classes of models are imported when one asks for them, those of configurations here.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from vllm.model_executor.models.registry import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture, model_class in ARCHITECTURES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, model_class)
    for model_type, config_class in CONFIGURATIONS.items():
        if model_type not in CONFIG_MAPPING:
            module, _, name = config_class.partition(":")
            AutoConfig.register(model_type, getattr(importlib.import_module(module), name))
