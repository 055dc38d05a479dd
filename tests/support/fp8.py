"""Checkpoints in fp8, made of the families' small ones, and their exact meaning as ordinary checkpoints."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LARGEST = 448.0  # of e4m3


@dataclass(frozen=True)
class Scaling:
    """How weights are scaled: by `block`, of which None is a whole side, and what config.json says of it."""

    block: tuple[int | None, int | None]
    config: dict[str, Any]
    suffix: str = "_scale_inv"
    dtype: torch.dtype = torch.float32
    activations: bool = False  # write scales of activations and of the KV cache as well


BLOCKS = Scaling(
    (16, 24),
    {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 24]},
)
TENSORS = Scaling(
    (None, None), {"quant_method": "fp8", "activation_scheme": "static"}, suffix="_scale", activations=True
)


def compressed_tensors(strategy: str, **weights) -> dict[str, Any]:
    """`quantization_config` as llm-compressor writes it for fp8; `weights` changes how weights are described."""
    common = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "observer": "minmax"}
    group = {
        "weights": {**common, "dynamic": False, "strategy": strategy, **weights},
        "input_activations": {**common, "dynamic": True, "strategy": "token", "observer": None},
        "targets": ["Linear"],
    }
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {},
    }  # fmt: skip


ROWS = Scaling((1, None), compressed_tensors("channel"), suffix="_scale", dtype=torch.bfloat16)


def quantize(weight: torch.Tensor, scaling: Scaling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(fp8 values, scales, what both mean in float64) of a weight [rows, columns].

    The scales are up to twice what the values need, at random: no block can do with the scale of another.
    """
    rows, columns = weight.shape
    height, width = scaling.block[0] or rows, scaling.block[1] or columns
    padded = torch.nn.functional.pad(weight.double(), (0, -columns % width, 0, -rows % height))
    largest = padded.reshape(padded.shape[0] // height, height, -1, width).abs().amax((1, 3))
    generator = torch.Generator().manual_seed(rows * columns)
    spread = 1.01 + torch.rand(largest.shape, generator=generator, dtype=torch.float64)
    scales = (largest / LARGEST * spread).to(scaling.dtype)
    factors = scales.double().repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    values = (weight.double() / factors).float().to(torch.float8_e4m3fn)
    return values, scales.reshape(()) if scaling.block == (None, None) else scales, values.double() * factors


def write(folder: Path, source: Path, scaling: Scaling, kept: tuple[str, ...] = ("mlp.gate.",)) -> tuple[Path, Path]:
    """(the checkpoint `source` in fp8, what it means as an ordinary float32 checkpoint), both in `folder`.

    Matrices are quantized, but those of which a part of the name is `kept`. There are three files, and no scale is in
    its weight's: those of the first file are in the third, those of the second in the first.
    """
    weights = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    files: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    meaning = dict(weights)
    for index, (name, weight) in enumerate(sorted(weights.items())):
        place = index % 2
        if weight.dim() != 2 or any(part in name for part in kept):
            files[place][name] = weight
            continue
        values, scales, exact = quantize(weight, scaling)
        files[place][name], files[place - 1][name + scaling.suffix] = values, scales
        meaning[name] = exact.float()
        if scaling.activations:
            files[place][name.removesuffix("weight") + "input_scale"] = torch.tensor(0.25)
            if name.endswith("k_proj.weight"):
                files[place][name.removesuffix("weight") + "k_scale"] = torch.tensor(0.5)
    config = json.loads((source / "config.json").read_text())
    in_fp8, exact = folder / "fp8", folder / "exact"
    for copy, fields in ((in_fp8, {**config, "quantization_config": scaling.config}), (exact, config)):
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.safetensors*", "reference"))
        (copy / "config.json").write_text(json.dumps(fields))
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, in_fp8 / name, {"format": "pt"})
    index = {key: name for name, tensors in zip(names, files, strict=True) for key in tensors}
    (in_fp8 / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_file(meaning, exact / "model.safetensors", {"format": "pt"})
    return in_fp8, exact


def change(folder: Path, copy: Path, edit) -> Path:
    """A copy of the checkpoint in `folder` with the tensors of each of its files as `edit(tensors)` returns them."""
    shutil.copytree(folder, copy)
    for file in copy.glob("*.safetensors"):
        tensors = edit(load_file(file))
        save_file(tensors, file, {"format": "pt"})
    return copy
