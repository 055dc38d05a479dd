"""Speculative decoding: what of `--speculative-config` is served, and how vLLM has to go about it here."""

from importlib.util import find_spec

from vllm_mindspore.config import UnsupportedOptionError

OPTION = "--speculative-config"
METHODS = ("ngram", "mtp")
# Classes of vLLM that draft from the target's hidden states with a layer trained for it, as their checkpoints have it.
DRAFTS = (
    "DeepSeekMTPModel",
    "DeepseekV32MTPModel",
    "ErnieMTPModel",
    "Glm4MoeLiteMTPModel",
    "Glm4MoeMTPModel",
    "HYV3MTPModel",
    "MiMoMTPModel",
    "OpenPanguMTPModel",
)
# Settings that change how vLLM drafts or what it accepts, and that nothing here reads.
LEFT_OUT = (
    "attention_backend",
    "draft_load_config",
    "enable_adaptive_verification",
    "enforce_eager",
    "index_share_for_mtp_iteration",
    "kv_cache_dtype",
    "moe_backend",
    "num_speculative_tokens_per_batch_size",
    "parallel_drafting",
    "use_heterogeneous_vocab",
    "use_local_argmax_reduction",
)


def check_and_update(vllm_config) -> None:
    """Refuse what cannot be served of `--speculative-config`, then set what this backend needs.

    Raises:
        UnsupportedOptionError: names the setting, what was found, what is supported, and what to do.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    _refuse(speculative, vllm_config.parallel_config)
    if speculative.method == "mtp":
        _refuse_draft(speculative, vllm_config)
    # Drafts are made of the accepted tokens alone: nothing is computed for those that were rejected.
    speculative.disable_padded_drafter_batch = True
    # The next step's drafts depend on what this one accepts, which the scheduler has in time only without it.
    vllm_config.scheduler_config.async_scheduling = False


def _refuse(speculative, parallel) -> None:
    if speculative.method not in METHODS:
        advice = "Leave the option out, or use one of them."
        raise UnsupportedOptionError(f"{OPTION} method", speculative.method, " and ".join(METHODS), advice)
    if speculative.method == "ngram" and find_spec("numba") is None:
        raise UnsupportedOptionError(f"{OPTION} method", "ngram", "it with numba", "pip install 'numba'")
    for name in LEFT_OUT:
        if value := getattr(speculative, name, None):
            raise UnsupportedOptionError(f"{OPTION} {name}", value, "its default", "Leave it out.")
    if speculative.rejection_sample_method != "standard":
        found, advice = speculative.rejection_sample_method, "Leave it out."
        raise UnsupportedOptionError(f"{OPTION} rejection_sample_method", found, "standard", advice)
    if (size := parallel.pipeline_parallel_size) > 1:
        # vLLM's scheduler sends the first stage one token of a request a step, not all that were accepted, and takes a
        # step's drafts before its tokens: https://github.com/vllm-project/vllm/issues/44697
        supported = "1, because vLLM serves drafts over pipeline stages with another model runner only"
        advice = "Use --tensor-parallel-size or --data-parallel-size, or leave one of the two out."
        raise UnsupportedOptionError(f"{OPTION} with --pipeline-parallel-size", size, supported, advice)


def _refuse_draft(speculative, vllm_config) -> None:
    draft, model, ranks = speculative.draft_model_config, vllm_config.model_config, vllm_config.parallel_config
    found = (draft.hf_config.architectures or [None])[0]
    advice = f'Use {{"method": "ngram"}}, or leave {OPTION} out.'
    if found not in DRAFTS:
        raise UnsupportedOptionError(f"the draft of {OPTION}", found, ", ".join(DRAFTS), advice)
    if not getattr(draft.hf_config, "num_nextn_predict_layers", None):
        found, supported = "no num_nextn_predict_layers", "checkpoints that have layers for it"
        raise UnsupportedOptionError(f"{OPTION} method mtp ({model.model})", found, supported, advice)
    if draft.model != model.model:
        supported = "a draft in the model's own checkpoint"
        raise UnsupportedOptionError(f"{OPTION} model", draft.model, supported, "Leave it out.")
    size = speculative.draft_parallel_config.tensor_parallel_size
    if size != ranks.tensor_parallel_size:
        supported = f"as many ranks as the model has, {ranks.tensor_parallel_size}"
        raise UnsupportedOptionError(f"{OPTION} draft_tensor_parallel_size", size, supported, "Leave it out.")
