"""What this backend cannot do is one clear error, before an engine starts and before any weight is read."""

import pytest

from tests.models.checkpoints import checkpoint
from tests.support import checkpoints, commands
from vllm_mindspore.demo import model_path

LLAMA = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=1000, max_position_embeddings=512,
)  # fmt: skip
MLA = dict(
    kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, num_key_value_heads=4,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
    topk_method="greedy",
)  # fmt: skip
INDEXER = dict(index_topk=16, index_n_heads=2, index_head_dim=16)
PALIGEMMA = dict(
    model_type="paligemma", architectures=["PaliGemmaForConditionalGeneration"], image_token_index=5,
    text_config=dict(LLAMA, model_type="gemma"), projection_dim=64, hidden_size=64,
    vision_config=dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                       num_attention_heads=2, image_size=28, patch_size=14),
)  # fmt: skip
MODELS = {
    "another indexer": ({**LLAMA, **MLA, **INDEXER, "model_type": "deepseek_v3",
                         "architectures": ["DeepseekV3ForCausalLM"]},
                        r"sparse attention \(an indexer of the top tokens\) of DeepseekV3ForCausalLM"),
    "multimodal": (PALIGEMMA, "a multimodal model"),
    "pooling": ({**LLAMA, "model_type": "bert", "architectures": ["BertModel"], "num_key_value_heads": 4}, "pooling"),
    "state space": (dict(model_type="mamba", architectures=["MambaForCausalLM"], hidden_size=64, state_size=8,
                         num_hidden_layers=2, vocab_size=1000, intermediate_size=128, conv_kernel=4, expand=2,
                         time_step_rank=4), "state-space layers"),
}  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
OPTIONS = {
    "--decode-context-parallel-size": dict(tensor_parallel_size=3, decode_context_parallel_size=3),
    "--distributed-executor-backend": dict(tensor_parallel_size=3, distributed_executor_backend="uni"),
    "--data-parallel-backend ray with --distributed-executor-backend": dict(
        data_parallel_size=2, data_parallel_backend="ray", distributed_executor_backend="mp"
    ),
    "--enable-lora": dict(enable_lora=True),
    "--quantization": dict(quantization="fp8"),
    "--speculative-config method": dict(speculative_config={**NGRAM, "method": "ngram_gpu"}),
    "--speculative-config rejection_sample_method": dict(
        speculative_config={**NGRAM, "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0}
    ),
    "--speculative-config use_local_argmax_reduction": dict(
        speculative_config={**NGRAM, "use_local_argmax_reduction": True}
    ),
    "--speculative-config with --pipeline-parallel-size": dict(speculative_config=NGRAM, pipeline_parallel_size=2),
    "--kv-cache-dtype": dict(kv_cache_dtype="fp8"),
    "--kv-offloading-size": dict(kv_offloading_size=1.0),
    "--kv-sharing-fast-prefill": dict(kv_sharing_fast_prefill=True),
    "--cpu-offload-gb": dict(cpu_offload_gb=1.0),
    "--attention-config.indexer_kv_dtype": dict(attention_config={"indexer_kv_dtype": "fp8"}),
    "--attention-config.sparse_mla_force_mqa": dict(attention_config={"sparse_mla_force_mqa": True}),
    "--sparse-indexer-topk-backend": dict(sparse_indexer_topk_backend="flashinfer"),
    "--attention-backend": dict(attention_backend="FLASH_ATTN"),
    "--enable-dbo": dict(enable_dbo=True, all2all_backend="deepep_low_latency"),
    "--enable-prompt-embeds": dict(enable_prompt_embeds=True),
    "--runner": dict(runner="pooling", convert="embed"),
}


@pytest.fixture
def configure(monkeypatch):
    """configure(model, **options): vLLM's configuration of an engine, as `LLM` and `vllm serve` make it first."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    # vLLM inspects model classes in a subprocess, 10 s each.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    return lambda model, **options: EngineArgs(model=str(model), **options).create_engine_config()


@pytest.mark.parametrize("option", OPTIONS)
def test_unsupported_option(option, configure):
    with pytest.raises(ValueError, match=rf"{option}.*The MindSpore backend supports .+\. [A-Z].+"):
        configure(checkpoint("qwen3"), **OPTIONS[option])


@pytest.mark.parametrize("kind", MODELS)
def test_unsupported_model(kind, configure, tmp_path):
    config, reason = MODELS[kind]
    folder = checkpoints.configuration(tmp_path / "model", **config)
    with pytest.raises(ValueError, match=rf"{reason}.*The MindSpore backend supports .+\. [A-Z].+"):
        configure(folder, skip_tokenizer_init=True)


def test_experts_that_a_loader_cannot_spread(configure):
    """gpt-oss with seven experts: its loader gives every rank as many."""
    model, options = checkpoint("parallel-gpt-oss"), dict(tensor_parallel_size=2)
    assert configure(model, **options).parallel_config.tensor_parallel_size == 2
    with pytest.raises(ValueError, match=r"--enable-expert-parallel .*found 7 experts on 2 ranks"):
        configure(model, **options, enable_expert_parallel=True)


@pytest.mark.parametrize(
    ("architecture", "found"),
    [
        (dict(model_type="qwen2", architectures=["MiMoForCausalLM"]), "no num_nextn_predict_layers"),
        (dict(model_type="exaone_moe", architectures=["ExaoneMoeForCausalLM"]), "found ExaoneMoeMTP"),
    ],
    ids=["no layer", "another class"],
)
def test_drafts_that_are_not_there(architecture, found, configure, tmp_path):
    folder = checkpoints.configuration(tmp_path / "model", **{**LLAMA, **architecture})
    with pytest.raises(ValueError, match=rf"--speculative-config.*{found}.*The MindSpore backend supports .+"):
        configure(folder, skip_tokenizer_init=True, speculative_config={"method": "mtp", "num_speculative_tokens": 1})


def test_a_draft_selects_keys_anew_in_each_of_its_steps(configure, tmp_path):
    sparse = dict(MLA, **INDEXER, model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"])
    folder = checkpoints.configuration(tmp_path / "model", **{**LLAMA, **sparse, "num_nextn_predict_layers": 1})
    drafts = {"method": "mtp", "num_speculative_tokens": 2}
    config = configure(folder, skip_tokenizer_init=True, speculative_config=drafts)
    assert config.speculative_config.draft_model_config.architectures == ["DeepseekV32MTPModel"]
    with pytest.raises(ValueError, match="--speculative-config index_share_for_mtp_iteration: found True"):
        drafts["index_share_for_mtp_iteration"] = True
        configure(folder, skip_tokenizer_init=True, speculative_config=drafts)


def test_speculative_decoding_decides_how_drafts_are_made(configure):
    config = configure(checkpoint("qwen3"), speculative_config=NGRAM)
    assert config.speculative_config.disable_padded_drafter_batch
    assert not config.scheduler_config.async_scheduling


def test_supported_configuration_is_accepted(configure):
    """The tests above would also pass if everything were refused."""
    config = configure(checkpoint("qwen3"))
    assert config.parallel_config.worker_cls == "vllm_mindspore.worker.worker.MindSporeWorker"
    assert config.structured_outputs_config.backend == "xgrammar"


def test_a_chosen_grammar_library_stays_chosen(configure):
    config = configure(checkpoint("qwen3"), structured_outputs_config={"backend": "guidance"})
    assert config.structured_outputs_config.backend == "guidance"


def test_the_command_line_ends_with_the_reason():
    options = ["--backend", "mindspore", "--kv-offloading-size", "1"]
    result = commands.run(["vllm", "serve", str(model_path()), *options])
    output = result.stdout + result.stderr
    assert result.returncode == 1
    assert output.count("--kv-offloading-size: found 1.0. The MindSpore backend supports a KV cache in memory.") == 1
    assert "EngineCore" not in output and "Loading" not in output
