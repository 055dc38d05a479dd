"""What this backend makes of vLLM's configuration: defaults it sets, and what it refuses before a model loads."""

from enum import Enum

from vllm import envs
from vllm.logger import init_logger

from vllm_mindspore import options, quantization
from vllm_mindspore.distributed import hosts

logger = init_logger("vllm.vllm_mindspore.config")

DEFAULT_BLOCK_SIZE = 16
KV_CACHE_LAYOUT = "LBNHC"
ENGINE_EXECUTOR_MODULE = "vllm_mindspore.distributed.ray_engines"  # which needs Ray
# vLLM's models with an indexer (`index_topk`) that are served.
SPARSE_ARCHITECTURES = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
# Those of vLLM's loaders that read a checkpoint tensor by tensor.
QUANTIZABLE_FORMATS = ("auto", "hf", "safetensors", "pt", "npcache", "fastsafetensors", "runai_streamer", "dummy")
FP8_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "dummy")  # those of them that read safetensors files


class UnsupportedOptionError(ValueError):
    """An option, or a model's property, that the MindSpore backend cannot serve."""

    def __init__(self, what: str, found: object, supported: str, advice: str):
        super().__init__(f"{what}: found {found}. The MindSpore backend supports {supported}. {advice}")


def check_and_update(vllm_config) -> None:
    """Refuse what cannot be served, then set what this backend needs. `Platform.check_and_update_config`.

    Raises:
        UnsupportedOptionError: names the option, what was found, what is supported, and what to do.
    """
    from vllm_mindspore import speculation  # which needs the error above

    options.backend_from_environment()
    _refuse_parallelism(vllm_config.parallel_config)
    _refuse_options(vllm_config)
    _refuse_quantized_loading(vllm_config)
    if vllm_config.model_config is not None:
        _refuse_model(vllm_config.model_config)
        _refuse_expert_parallelism(vllm_config.model_config, vllm_config.parallel_config)
    _update(vllm_config)
    speculation.check_and_update(vllm_config)


def _refuse_parallelism(parallel_config) -> None:
    for option, value in (
        ("--decode-context-parallel-size", parallel_config.decode_context_parallel_size),
        ("--prefill-context-parallel-size", parallel_config.prefill_context_parallel_size),
    ):
        if value > 1:
            raise UnsupportedOptionError(option, value, "1", "Use --tensor-parallel-size or --data-parallel-size.")
    for option, value in (("--enable-dbo", parallel_config.enable_dbo), ("--enable-eplb", parallel_config.enable_eplb)):
        if value:
            raise UnsupportedOptionError(option, value, "running without it", "Leave the option out.")
    executor = parallel_config.distributed_executor_backend
    ours = getattr(executor, "__module__", "") == ENGINE_EXECUTOR_MODULE  # of a configuration that was updated before
    if parallel_config.world_size > 1 and executor not in (None, "mp", "ray") and not ours:
        option, supported = "--distributed-executor-backend", "mp, processes on each host, and ray, its actors"
        raise UnsupportedOptionError(option, executor, supported, "Use one of them.")
    if parallel_config.use_ray and not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True):
        supported = "Ray's actors with vLLM's message queues"
        raise UnsupportedOptionError("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", 0, supported, "Leave it unset.")
    if _has_engines_by_ray(parallel_config) and not parallel_config.use_ray:
        option = "--data-parallel-backend ray with --distributed-executor-backend"
        raise UnsupportedOptionError(option, executor, "Ray's actors for both", "Leave the second one out.")


def _has_engines_by_ray(parallel_config) -> bool:
    return parallel_config.data_parallel_size > 1 and parallel_config.data_parallel_backend == "ray"


def _refuse_options(vllm_config) -> None:
    cache, offload, attention = vllm_config.cache_config, vllm_config.offload_config, vllm_config.attention_config
    own_attention = attention.backend is None or attention.backend.name == "CUSTOM"
    leave_out = "Leave the option out."
    # not in every version of vLLM
    indexer_dtype = getattr(attention, "indexer_kv_dtype", "auto")
    indexer_kernel = getattr(vllm_config.kernel_config, "sparse_indexer_topk_backend", "auto")
    gathers_always = getattr(attention, "sparse_mla_force_mqa", False)
    refused = (
        ("--enable-lora", vllm_config.lora_config, "merged weights only", "Merge the adapter into the checkpoint."),
        ("--kv-transfer-config", vllm_config.kv_transfer_config, "one engine per model", leave_out),
        ("--ec-transfer-config", vllm_config.ec_transfer_config, "text models", leave_out),
        ("--weight-transfer-config", vllm_config.weight_transfer_config, "weights from a checkpoint", leave_out),
        ("--kv-offloading-size", cache.kv_offloading_size, "a KV cache in memory", leave_out),
        ("--kv-sharing-fast-prefill", cache.kv_sharing_fast_prefill, "running without it", leave_out),
        ("--cpu-offload-gb", offload.uva.cpu_offload_gb, "weights in memory", leave_out),
        ("--offload-group-size", offload.prefetch.offload_group_size, "weights in memory", leave_out),
        ("--attention-config.indexer_kv_dtype", _unless_auto(indexer_dtype), "the KV cache's type", leave_out),
        ("--attention-config.sparse_mla_force_mqa", gathers_always, "its own choice for each request", leave_out),
        ("--sparse-indexer-topk-backend", _unless_auto(indexer_kernel), "its own selection", leave_out),
        ("--attention-backend", None if own_attention else attention.backend, "its own paged attention", leave_out),
    )
    for option, value, supported, advice in refused:
        if value:
            shown = isinstance(value, (Enum, int, float, str))
            found = getattr(value, "name", value) if shown else type(value).__name__
            raise UnsupportedOptionError(option, found, supported, advice)
    if cache.cache_dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise UnsupportedOptionError("--kv-cache-dtype", cache.cache_dtype, "auto, float16 and bfloat16", leave_out)


def _unless_auto(value: str) -> str | None:
    return None if value == "auto" else value


def verify_quantization(method: str) -> None:
    """Refuse a quantization method, of the command line or of the checkpoint, that is not ours.

    Raises:
        UnsupportedOptionError: names what is supported.
    """
    if method not in (*quantization.NAMES, quantization.DEQUANTIZE):
        names = " and ".join(quantization.NAMES)
        supported = f"{names}, which quantize bf16, fp16, fp32 and fp8 checkpoints as they load, and checkpoints in fp8"
        advice = "Leave the option out, and use a checkpoint that is unquantized or in fp8."
        raise UnsupportedOptionError("--quantization", method, supported, advice)


def _refuse_quantized_loading(vllm_config) -> None:
    """What cannot be combined with a quantization method of ours."""
    model, loading = vllm_config.model_config, vllm_config.load_config
    if vllm_config.quant_config is None:
        return
    verify_quantization(model.quantization)
    in_fp8 = vllm_config.quant_config.checkpoint is not None
    if model.quantization == quantization.DEQUANTIZE and not in_fp8:
        found = f"{model.quantization} with an unquantized checkpoint"
        raise UnsupportedOptionError("--quantization", found, "it for checkpoints in fp8", "Leave the option out.")
    option = f"{'a checkpoint in fp8' if in_fp8 else f'--quantization {model.quantization}'} with "
    if model.quantization_config is not None:
        found, advice = "a configuration", "Leave the option out."
        raise UnsupportedOptionError(f"{option}--quantization-config", found, "the method's name alone", advice)
    formats = FP8_FORMATS if in_fp8 else QUANTIZABLE_FORMATS
    if loading.load_format not in formats:
        supported = f"the formats {', '.join(formats)}"
        raise UnsupportedOptionError(f"{option}--load-format", loading.load_format, supported, "Use one of them.")


def _refuse_model(model_config) -> None:
    name = model_config.model
    if model_config.runner_type != "generate":
        raise UnsupportedOptionError(
            f"--runner ({name})", model_config.runner_type, "generation", "Use a text generation model."
        )
    if model_config.is_encoder_decoder:
        raise UnsupportedOptionError(name, "an encoder-decoder model", "decoder-only models", "Use another model.")
    if model_config.is_multimodal_model:
        raise UnsupportedOptionError(
            name, f"a multimodal model ({model_config.architecture})", "text models", "Use the text-only checkpoint."
        )
    indexed = getattr(model_config.hf_text_config, "index_topk", None) is not None
    if indexed and model_config.architecture not in SPARSE_ARCHITECTURES:
        raise UnsupportedOptionError(
            name,
            f"sparse attention (an indexer of the top tokens) of {model_config.architecture}",
            f"it for {' and '.join(SPARSE_ARCHITECTURES)}",
            "Use another model.",
        )
    if model_config.is_hybrid or model_config.is_attention_free:
        raise UnsupportedOptionError(
            name, f"state-space layers ({model_config.architecture})", "attention models", "Use another model."
        )
    if model_config.enable_prompt_embeds:
        raise UnsupportedOptionError(
            "--enable-prompt-embeds", True, "prompts of text or token ids", "Leave the option out."
        )
    if model_config.enable_sleep_mode:
        raise UnsupportedOptionError("--enable-sleep-mode", True, "an engine that stays awake", "Leave it out.")


def _refuse_expert_parallelism(model_config, parallel_config) -> None:
    if not parallel_config.enable_expert_parallel or model_config.architecture != "GptOssForCausalLM":
        return
    experts = model_config.hf_text_config.num_local_experts
    ranks = parallel_config.tensor_parallel_size * parallel_config.data_parallel_size
    if experts % ranks:  # vLLM's loader of this model gives every rank as many
        raise UnsupportedOptionError(
            f"--enable-expert-parallel ({model_config.model})", f"{experts} experts on {ranks} ranks",
            f"for {model_config.architecture} a number of experts that the ranks divide",
            "Leave the option out, or use other numbers of ranks.",
        )  # fmt: skip


def _update(vllm_config) -> None:
    from vllm.config import CompilationMode, CUDAGraphMode

    if vllm_config.parallel_config.worker_cls == "auto":
        vllm_config.parallel_config.worker_cls = "vllm_mindspore.worker.worker.MindSporeWorker"
    vllm_config.parallel_config.disable_custom_all_reduce = True
    # Our own exchange of tokens, and none of vLLM's, for which models would cut tokens into parts ("sequence
    # parallel"): each rank would then read all weights of the shared experts.
    vllm_config.parallel_config.all2all_backend = "naive"
    if _has_engines_by_ray(vllm_config.parallel_config):
        from vllm_mindspore.distributed.ray_engines import EngineExecutor

        vllm_config.parallel_config.distributed_executor_backend = EngineExecutor
    hosts.note_engines(vllm_config)
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        # The first stage takes sampled tokens from the scheduler, which has them in time only without it.
        vllm_config.scheduler_config.async_scheduling = False
    compilation = vllm_config.compilation_config
    if compilation.mode not in (None, CompilationMode.NONE):
        logger.debug(
            "compilation mode %s: torch.compile is replaced by the capture of one MindSpore graph", compilation.mode
        )
    compilation.mode = CompilationMode.NONE
    compilation.cudagraph_mode = CUDAGraphMode.NONE
    compilation.cudagraph_capture_sizes = []
    compilation.max_cudagraph_capture_size = 0
    compilation.compile_sizes = []
    compilation.splitting_ops = []
    compilation.ir_enable_torch_wrap = True  # norms reach the capture as single nodes
    # Layers with a forward of ours (rotary embedding, activations) must use it.
    compilation.custom_ops = [op for op in compilation.custom_ops if op != "none"]
    if "all" not in compilation.custom_ops:
        compilation.custom_ops.append("all")
    structured_outputs = vllm_config.structured_outputs_config
    if structured_outputs.backend == "auto":
        # "auto" accepts what any library can do, but the engine keeps the first request's library: later requests that
        # need another fail with an internal error, or ignore parts of a schema.
        structured_outputs.backend = "xgrammar"
    cache = vllm_config.cache_config
    if not cache.user_specified_block_size:
        cache.block_size = DEFAULT_BLOCK_SIZE
    # The only layout of the attention operators; known here so that KV cache groups can be formed before weights load.
    cache.kv_cache_layout = KV_CACHE_LAYOUT


def validate_request(params) -> None:
    """Refuse a request this backend cannot serve (`Platform.validate_request`): every sampling option is served."""
    from vllm.pooling_params import PoolingParams

    if isinstance(params, PoolingParams):
        raise ValueError("The MindSpore backend serves text generation; pooling requests are not supported.")
