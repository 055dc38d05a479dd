"""Tiny checkpoints with a layer that drafts (multi-token prediction), which is right often but not always.

The text of a model whose layers add little to the embedding follows mostly from its last token, so a draft that passes
the next token's embedding on, with little added, says mostly what the model will. No reference class has such layers;
`DraftReference` computes one with the decoder layer of Hugging Face's classes.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.checkpoints import checkpoint

LITTLE = 0.1  # of what layers add
ADDED = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
ADDED_BY_NORMS = ("post_attention_layernorm.weight", "post_mlp_layernorm.weight")  # with norms after attention and MLP


def checkpoint_with_draft(name: str, folder: Path, dtype: str = "float32") -> Path:
    """The checkpoint of family `name` with little added by its layers, and a draft's layer after the last.

    "mimo" is not among the families: the model is a Qwen 2, and the names of its draft are others.
    """
    source = checkpoint("qwen2" if name == "mimo" else name, dtype)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for path in {folder, folder / "reference"}:
        if path.exists():
            _write(path, with_draft=path == folder, mimo=name == "mimo")
    return folder


def _write(folder: Path, with_draft: bool, mimo: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = {}
    for file in folder.glob("*.safetensors*"):
        if file.suffix == ".safetensors":
            tensors.update(load_file(file))
        file.unlink()
    layers = config["num_hidden_layers"]
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"model.layers.{layers}.")}
    added = ADDED_BY_NORMS if any(ADDED_BY_NORMS[1] in name for name in tensors) else ADDED
    tensors = {name: LITTLE * tensor if name.endswith(added) else tensor for name, tensor in tensors.items()}
    if with_draft:
        if mimo:
            config.update(architectures=["MiMoForCausalLM"], tie_word_embeddings=False)
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        made = draft_tensors(tensors, layers)
        if mimo:
            made = as_mimo(made, f"model.layers.{layers}.")
        tensors.update(made)
        config["num_nextn_predict_layers"] = 1
        (folder / "config.json").write_text(json.dumps(config))
        for file in folder.glob("configuration_*.py"):  # names the fields that it takes
            if "num_nextn_predict_layers" not in file.read_text():
                file.write_text(file.read_text().replace("fields = [", "fields = ['num_nextn_predict_layers', "))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def draft_tensors(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """What a checkpoint has for a draft's layer: the last layer's tensors with noise, and those of its own."""
    generator = torch.Generator().manual_seed(7)
    last, draft = f"model.layers.{layers - 1}.", f"model.layers.{layers}."

    def noisy(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        return (tensor.float() + scale * noise).to(tensor.dtype)

    made = {
        name.replace(last, draft): noisy(tensor, 0.2 * float(tensor.float().std()))
        if tensor.dim() > 1
        else tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    embedding, head, norm = (tensors[f"{name}.weight"] for name in ("model.embed_tokens", "lm_head", "model.norm"))
    width = embedding.shape[1]
    ones = norm.new_ones(width)
    own = {
        "enorm": noisy(ones, 0.05),
        "hnorm": noisy(ones, 0.2),
        "eh_proj": noisy(torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1), 0.1 / width**0.5).to(
            embedding.dtype
        ),
        "shared_head.norm": noisy(norm, 0.05),
        "shared_head.head": head,
        "embed_tokens": embedding,
    }
    return {**made, **{f"{draft}{name}.weight": tensor.clone() for name, tensor in own.items()}}


MIMO_NAMES = {
    "enorm.weight": "token_layernorm.weight",
    "hnorm.weight": "hidden_layernorm.weight",
    "eh_proj.weight": "input_proj.weight",
    "shared_head.norm.weight": "final_layernorm.weight",
    "shared_head.head.weight": "",
    "embed_tokens.weight": "",
}


def as_mimo(made: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """MiMo's names for a draft's tensors; it has the hidden state before the embedding."""
    named = {}
    for name, tensor in made.items():
        own = name.removeprefix(prefix)
        if own == "eh_proj.weight":
            tensor = torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1)
        if own := MIMO_NAMES.get(own, own):
            named[f"model.mtp_layers.0.{own}"] = tensor
    return named


class DraftReference:
    """A model with its draft, DeepSeek V3's layers, from Hugging Face's: float32, whole sequences, no KV cache."""

    def __init__(self, folder: Path):
        """folder: from `checkpoint_with_draft`, of a family that has Hugging Face's format."""
        options = dict(dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
        config = AutoConfig.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, config=config, **options).eval()
        number = config.num_hidden_layers
        config = AutoConfig.from_pretrained(folder, num_hidden_layers=number + 1)
        extended = AutoModelForCausalLM.from_pretrained(folder, config=config, **options).eval()
        self.layer = extended.model
        self.layer.layers = self.layer.layers[-1:]
        self.layer.norm, self.layer.config.num_hidden_layers = torch.nn.Identity(), 1
        self.eps = config.rms_norm_eps
        self.own = {
            name.removeprefix(f"model.layers.{number}.").removesuffix(".weight"): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
        }

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.own[name], self.eps)

    @torch.no_grad()
    def drafts(self, ids: list[int], following: int, number: int) -> list[int]:
        """The `number` tokens that are drafted after `ids` and then `following`, which the model has chosen."""
        hidden = self.model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        tokens, drafted = [*ids[1:], following], []
        for _ in range(number):
            embedded = self.own["embed_tokens"][tokens]
            embedded[0] = 0  # the first token of a text is not told
            pairs = torch.cat([self._norm("enorm", embedded), self._norm("hnorm", hidden)], dim=-1)
            inputs = torch.nn.functional.linear(pairs, self.own["eh_proj"])[None]
            last = self.layer(inputs_embeds=inputs, use_cache=False).last_hidden_state[0, -1:]
            last = self._norm("shared_head.norm", last)
            drafted.append(int((last @ self.own["shared_head.head"].T).argmax()))
            tokens, hidden = [*tokens, drafted[-1]], torch.cat([hidden, last])
        return drafted
