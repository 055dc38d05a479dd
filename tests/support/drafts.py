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
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.models.checkpoints import checkpoint

LITTLE = 0.1  # of what layers add
ADDED = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
ADDED_BY_NORMS = ("post_attention_layernorm.weight", "post_mlp_layernorm.weight")  # with norms after attention and MLP


def metrics(llm) -> dict[str, int]:
    """What /metrics counts of drafts, without its prefix."""
    prefix = "vllm:spec_decode_num_"
    return {m.name.removeprefix(prefix): getattr(m, "value", None) for m in llm.get_metrics() if prefix in m.name}


def checkpoint_with_draft(name: str, folder: Path, dtype: str = "float32") -> Path:
    """The checkpoint of family `name` with little added by its layers, and a draft's layer after the last.

    "mimo" is not among the families: the model is a Qwen 2, and the names of its draft are others.
    """
    source = checkpoint("qwen2" if name == "mimo" else name, dtype)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for path in {folder, folder / "reference"}:
        if path.exists():
            _write(path, name, with_draft=path == folder)
    return folder


def _write(folder: Path, family: str, with_draft: bool) -> None:
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
        if family == "mimo":
            config["architectures"] = ["MiMoForCausalLM"]
        if "lm_head.weight" not in tensors:  # vLLM's classes of drafts want one
            config["tie_word_embeddings"] = False
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        made = draft_tensors(tensors, layers)
        tensors.update(NAMED_OTHERWISE.get(family, lambda made, *_: made)(made, f"model.layers.{layers}.", config))
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


def renamed(made: dict[str, torch.Tensor], prefix: str, new: str, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """`made` with another prefix, and other names after it; without those whose name is empty."""
    pairs = ((names.get(name.removeprefix(prefix), name.removeprefix(prefix)), made[name]) for name in made)
    return {new + name: tensor for name, tensor in pairs if name}


SHARED = {"shared_head.head.weight": "", "embed_tokens.weight": ""}  # not in the checkpoint a second time


def as_mimo(made: dict[str, torch.Tensor], prefix: str, config: dict) -> dict[str, torch.Tensor]:
    """MiMo has the hidden state before the embedding."""
    made[f"{prefix}eh_proj.weight"] = torch.cat(made[f"{prefix}eh_proj.weight"].chunk(2, dim=1)[::-1], dim=1)
    names = {
        "enorm.weight": "token_layernorm.weight",
        "hnorm.weight": "hidden_layernorm.weight",
        "eh_proj.weight": "input_proj.weight",
        "shared_head.norm.weight": "final_layernorm.weight",
    }
    return renamed(made, prefix, "model.mtp_layers.0.", names | SHARED)


def as_hunyuan(made: dict[str, torch.Tensor], prefix: str, config: dict) -> dict[str, torch.Tensor]:
    return renamed(made, prefix, prefix, {"shared_head.norm.weight": "final_layernorm.weight"} | SHARED)


def as_ernie(made: dict[str, torch.Tensor], prefix: str, config: dict) -> dict[str, torch.Tensor]:
    """ERNIE's draft has no experts, and no norm before the head: here the projection multiplies by its weight."""
    norm, hidden, size = made[f"{prefix}shared_head.norm.weight"], config["hidden_size"], config["intermediate_size"]
    made[f"{prefix}eh_proj.weight"] *= norm[:, None]
    generator = torch.Generator().manual_seed(8)
    block = {name.removeprefix(prefix): made[name] for name in made if ".mlp." not in name}
    for name, rows, columns, scale in (
        ("gate", size, hidden, 1.0), ("up", size, hidden, 1.0), ("down", hidden, size, LITTLE)
    ):  # fmt: skip
        weight = scale / columns**0.5 * torch.randn(rows, columns, generator=generator)
        block[f"mlp.{name}_proj.weight"] = weight.to(norm.dtype)
    own = {"enorm": "mtp_emb_norm", "hnorm": "mtp_hidden_norm", "eh_proj": "mtp_linear_proj"}
    names = {f"{name}.weight": "" for name in (*own, "shared_head.norm")} | SHARED
    return renamed(block, "", "model.mtp_block.0.", names) | {
        f"model.{new}.0.weight": made[f"{prefix}{name}.weight"] for name, new in own.items()
    }


NAMED_OTHERWISE = {"mimo": as_mimo, "hy-v3": as_hunyuan, "ernie-moe": as_ernie}


def one_layer_more(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with the last layer twice."""
    fields = config.to_dict()
    lists = {name: [*fields[name], fields[name][-1]] for name in ("layer_types", "mlp_layer_types") if fields.get(name)}
    return type(config).from_dict(fields | lists | {"num_hidden_layers": config.num_hidden_layers + 1})


class DraftReference:
    """A model with its draft, DeepSeek's layers, from Hugging Face's: float32, whole sequences, no KV cache."""

    def __init__(self, folder: Path, config: PreTrainedConfig):
        """folder: from `checkpoint_with_draft`, of a family that has Hugging Face's format. config: the model's."""
        options = dict(dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
        self.model = AutoModelForCausalLM.from_pretrained(folder, config=config, **options).eval()
        number = config.num_hidden_layers
        extended = AutoModelForCausalLM.from_pretrained(folder, config=one_layer_more(config), **options).eval()
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
