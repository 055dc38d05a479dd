"""What model families need beyond vLLM's own definitions; installed as `vllm_mindspore.models`.

`ARCHITECTURES` is the table of what is registered with vLLM: models that vLLM no longer has or never had, written with
vLLM's own layers, so that its loader, scheduler and our capture treat them as any other.
"""

ARCHITECTURES: dict[str, str] = {
    "BaiChuanForCausalLM": "vllm_mindspore.models.baichuan:BaiChuanForCausalLM",
    "BaichuanForCausalLM": "vllm_mindspore.models.baichuan:BaichuanForCausalLM",
}


def register() -> None:
    """Register every architecture that vLLM does not have; the classes are imported when a model asks for them."""
    from vllm.model_executor.models.registry import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture, model_class in ARCHITECTURES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, model_class)
