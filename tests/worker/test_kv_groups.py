"""Attention that no operator has, and that only a layer's KV cache shows, is refused before weights load."""

import pytest

from tests.support import checkpoints
from vllm_mindspore.config import UnsupportedOptionError

LLAMA4 = dict(
    model_type="llama4_text", architectures=["Llama4ForCausalLM"], hidden_size=64, intermediate_size=96,
    intermediate_size_mlp=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    vocab_size=1000, max_position_embeddings=512, attention_chunk_size=64, num_local_experts=4, num_experts_per_tok=1,
    interleave_moe_layer_step=1, layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0],
    rope_scaling=None, attn_temperature_tuning=False, use_qk_norm=False, torch_dtype="float32",
)  # fmt: skip


def test_attention_in_chunks(tmp_path, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    from vllm_mindspore.worker import inspection

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    folder = checkpoints.configuration(tmp_path / "model", **LLAMA4)
    engine = EngineArgs(model=str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=256)
    with pytest.raises(UnsupportedOptionError, match=r"layers\.0\.self_attn\.attn: found ChunkedLocalAttentionSpec"):
        inspection.inspect(engine.create_engine_config())
