"""Checkpoints that the families' tests do not have: other shapes of the demo model, and configurations alone."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def write(folder: Path, like: Path, weights: bool = True, **changes) -> Path:
    """A checkpoint as `like`, with its tokenizer, some fields of its configuration changed, and random bf16 weights."""
    folder.mkdir()
    for file in like.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    fields = json.loads((like / "config.json").read_text()) | changes
    if "num_hidden_layers" in changes:
        fields["layer_types"] = ["full_attention"] * changes["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(fields))
    if weights:
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(folder)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def configuration(folder: Path, **fields) -> Path:
    """A folder with nothing but config.json: enough for whatever must be refused before weights load."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder
