"""The shapes that speed is measured on: random bf16 weights in real architectures, written once.

python -m tests.bench.shapes NAME...     prints the folder of each
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_mindspore.demo import model_path

FOLDER = Path(__file__).parents[2] / "build" / "bench"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")

_COMMON = {
    "hidden_size": 1024, "num_attention_heads": 16, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "initializer_range": 0.02,
}  # fmt: skip
_QWEN3 = {**_COMMON, "head_dim": 128, "rope_theta": 1000000.0, "intermediate_size": 3072}
SHAPES = {
    "qwen3-0.6b": {
        **_QWEN3, "model_type": "qwen3", "num_hidden_layers": 28, "num_key_value_heads": 8, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3moe-mini": {
        **_QWEN3, "model_type": "qwen3_moe", "num_hidden_layers": 12, "num_key_value_heads": 4, "vocab_size": 32768,
        "moe_intermediate_size": 384, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
    },
    "dsv3-mini": {
        **_COMMON, "model_type": "deepseek_v3", "num_hidden_layers": 8, "num_key_value_heads": 16, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 4096, "moe_intermediate_size": 256, "n_routed_experts": 64, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "rope_theta": 10000.0, "vocab_size": 32768, "tie_word_embeddings": False, "num_nextn_predict_layers": 0,
    },
}  # fmt: skip


def find(model: str) -> Path:
    """The folder of a shape, or of any other model."""
    return checkpoint(model) if model in SHAPES else Path(model)


def checkpoint(name: str) -> Path:
    """The folder of the checkpoint of a shape, written if it is not there. Raises KeyError for an unknown name."""
    fields = SHAPES[name]
    folder = FOLDER / name
    if folder.exists():
        return folder
    unfinished = FOLDER / f"{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in TOKENIZER_FILES:
        if (model_path() / file).exists():
            shutil.copy(model_path() / file, unfinished)
    (unfinished / "config.json").write_text(json.dumps(fields))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(unfinished), dtype=torch.bfloat16)
    for key, value in model.state_dict().items():
        if key.endswith("e_score_correction_bias"):  # zeros would let all experts of a group be equals
            value.normal_(0.0, 0.02)
    model.save_pretrained(unfinished)
    config = json.loads((unfinished / "config.json").read_text())
    (unfinished / "config.json").write_text(json.dumps(config | fields))
    unfinished.rename(folder)
    return folder


if __name__ == "__main__":
    for shape in sys.argv[1:]:
        print(checkpoint(shape))
