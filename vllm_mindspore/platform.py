"""The hooks vLLM asks a hardware platform for. MindSpore itself is imported only in the worker."""

import torch
from vllm.logger import init_logger
from vllm.platforms.interface import Platform, PlatformEnum

from vllm_mindspore import options, patches, quantization

logger = init_logger("vllm.vllm_mindspore.platform")


class MindSporePlatform(Platform):
    """vLLM on MindSpore. `device_type` is "cpu" for torch, which is only the front end."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"  # vLLM builds torch.device(f"{device_name}:{rank}")
    device_type = "cpu"
    dispatch_key = "CPU"
    simple_compile_backend = "eager"
    dist_backend = "gloo"
    ray_device_key = "NPU"  # Ray's name for Ascend's devices; on CPU a node says with it how many ranks it takes
    ray_noset_device_env_vars: list[str] = ["RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"]
    device_control_env_var = "MS_VISIBLE_DEVICES"
    supported_quantization: list[str] = [*quantization.NAMES, quantization.DEQUANTIZE]

    def __init__(self) -> None:
        super().__init__()
        patches.apply_all()

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"--dtype {dtype}: not supported by the MindSpore backend. Supported: bfloat16, float16, float32."
            )

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        from vllm_mindspore import config

        config.verify_quantization(quant)

    @classmethod
    def import_kernels(cls) -> None:
        """vLLM's compiled kernels are not part of this build."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        """vLLM's IR operators are lowered to MindSpore; no vLLM implementation is needed."""

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "mindspore-cpu"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        from vllm_mindspore.worker import memory

        return memory.total_memory()

    @classmethod
    def get_current_memory_usage(cls, device: torch.types.Device | None = None) -> float:
        from vllm_mindspore.worker import memory

        return float(memory.resident_memory())

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """One device a process: the host."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        torch.manual_seed(seed)

    @classmethod
    def inference_mode(cls):
        return torch.no_grad()

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return True

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        return False

    @classmethod
    def check_runner_kv_caches_multi_layer(cls) -> None:
        """Several attention layers may share a layer index: caches are bound by layer name here."""

    @classmethod
    def get_pass_manager_cls(cls) -> str:
        return "vllm_mindspore.compiler.vllm_hooks.NoInductorPasses"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm_mindspore.distributed.communicator.MindSporeCommunicator"

    @classmethod
    def use_custom_op_collectives(cls) -> bool:
        return True  # so that the capture sees them

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None) -> str:
        if selected_backend is not None and selected_backend.name != "CUSTOM":
            raise ValueError(
                f"--attention-backend {selected_backend.name}: the MindSpore backend runs its own paged attention; "
                "leave the option out."
            )
        if attn_selector_config.use_sparse:
            if not attn_selector_config.use_mla:
                raise ValueError(
                    "sparse attention to keys and values is not supported by the MindSpore backend; supported: full "
                    "attention, and sparse attention to latents. Use another model."
                )
            return "vllm_mindspore.worker.mla.MindSporeSparseMLABackend"
        if attn_selector_config.use_mla:
            return "vllm_mindspore.worker.mla.MindSporeMLABackend"
        return "vllm_mindspore.worker.attention.MindSporeAttentionBackend"

    @classmethod
    def get_mla_prefill_backend_cls(cls, selector_config):
        from vllm_mindspore.worker.mla import MindSporeMLAPrefill

        return MindSporeMLAPrefill

    @classmethod
    def update_block_size_for_backend(cls, vllm_config) -> None:
        """Any block size works; `check_and_update_config` has set the default."""

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        from vllm_mindspore.worker import host_kernels

        host_kernels.register()

    @classmethod
    def pre_register_and_update(cls, parser=None) -> None:
        if parser is not None:
            options.add_arguments(parser)

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        from vllm_mindspore import config

        config.check_and_update(vllm_config)

    @classmethod
    def validate_request(cls, processed_inputs, params) -> None:
        from vllm_mindspore import config

        config.validate_request(params)
