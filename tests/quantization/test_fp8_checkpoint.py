"""Weights in fp8 and their scales: what config.json may say, exact products, one weight at a time, named errors."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

from tests.models.checkpoints import checkpoint
from tests.support import fp8
from vllm_mindspore.config import UnsupportedOptionError
from vllm_mindspore.quantization.checkpoint import Fp8Checkpoint
from vllm_mindspore.quantization.config import DequantizeConfig
from vllm_mindspore.quantization.dequantize import ScaleError, Tensors, adopt, dequantize, dequantized

SCALINGS = {
    "blocks": fp8.BLOCKS,
    "blocks of 128": fp8.Scaling((128, 128), fp8.BLOCKS.config),
    "rows": fp8.ROWS,
    "tensors": fp8.TENSORS,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 24), (300, 131), (129, 257), (5, 700)], ids=str)
def test_products_are_exact_but_for_one_rounding(shape, scaling, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values, scales, exact = fp8.quantize(weight, scaling)
    block = scaling.block if scaling.config["quant_method"] == "fp8" and scaling.block[0] else None
    assert torch.equal(dequantize(values, scales, block, dtype), exact.float().to(dtype))
    assert not torch.equal(values.to(dtype), exact.to(dtype)), "a scale is ignored"


@pytest.mark.parametrize("numbers", [True, False])
def test_every_value_of_fp8_is_its_own(numbers):
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)
    if numbers:
        values = values[:, :-1]  # the last one is not a number
    found = dequantize(values, torch.ones(1), None, torch.float32)
    assert torch.equal(found.nan_to_num(nan=999), values.float().nan_to_num(nan=999))
    assert found.isnan().sum() == (0 if numbers else 2)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_experts_in_one_tensor_have_scales_of_their_own(scaling):
    weights = torch.randn((3, 40, 50), generator=torch.Generator().manual_seed(0))
    values, scales, exact = map(torch.stack, zip(*(fp8.quantize(weight, scaling) for weight in weights), strict=True))
    block = scaling.block if scaling.block[0] not in (None, 1) else None
    assert torch.equal(dequantize(values, scales, block, torch.float32), exact.float())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(checkpoint in fp8, the same as float32) of DeepSeek V3 with experts."""
    return fp8.write(tmp_path_factory.mktemp("fp8"), checkpoint("deepseek-v3-moe"), fp8.BLOCKS)


def files(folder) -> list[str]:
    return sorted(map(str, folder.glob("*.safetensors")))


def read(folder, tensors: Tensors | None = None, dtype: torch.dtype = torch.float32):
    """The weights in `folder` as vLLM's loader reads them, multiplied out."""
    weights = safetensors_weights_iterator(files(folder), use_tqdm_on_load=False)
    return dequantized(weights, tensors or Tensors(files(folder)), Fp8Checkpoint.of(fp8.BLOCKS.config), dtype)


def test_a_checkpoint_is_read_as_the_one_it_means(written):
    in_fp8, exact = written
    found, (file,) = dict(read(in_fp8)), files(exact)
    wanted = load_file(file)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_weights_and_scales_of_any_order_are_in_memory_one_at_a_time(written, tmp_path):
    layers = fp8.change(written[0], tmp_path / "layers", containing("layers."))  # the embedding is half of the model
    references, most, largest, total = {}, 0, 0, 0

    def hold(tensor: torch.Tensor) -> None:
        nonlocal most
        references[id(tensor)] = weakref.ref(tensor)
        most = max(most, sum(held.nbytes for held in (found() for found in references.values()) if held is not None))

    class Watched(Tensors):
        def read(self, name: str) -> torch.Tensor:
            tensor = super().read(name)
            hold(tensor)
            return tensor

    def watched(weights):
        for name, tensor in weights:
            hold(tensor)
            yield name, tensor

    tensors, described = Watched(files(layers)), Fp8Checkpoint.of(fp8.BLOCKS.config)
    for backwards in (False, True):
        order = sorted(files(layers), reverse=backwards)
        weights = (pair for file in order for pair in safetensors_weights_iterator([file], use_tqdm_on_load=False))
        for _, tensor in dequantized(watched(weights), tensors, described, torch.bfloat16):
            hold(tensor)
            largest, total = max(largest, tensor.nbytes), total + tensor.nbytes
    assert total > 2 * 20 * largest, "a weight is much of the model"
    assert most <= 2 * largest, "one as it is read, multiplied out, and the last one, which the reader has not let go"


def containing(part: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part in name}


def without(ending: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}


def replacing(ending: str, change):
    return lambda tensors: {
        name: change(tensor) if name.endswith(ending) else tensor for name, tensor in tensors.items()
    }


KV_B = "layers.1.self_attn.kv_b_proj.weight"
BROKEN = {
    "no scale": (without(KV_B + "_scale_inv"), f"{KV_B}: found values in fp8, but neither .*_scale_inv nor .*_scale"),
    "another shape": (
        replacing(KV_B + "_scale_inv", lambda scale: scale[:-1].clone()),
        rf"{KV_B}_scale_inv: found scales of shape .* for a weight of shape .* each block of 16 x 24",
    ),
    "another type": (
        replacing(KV_B, lambda weight: weight.float().to(torch.int8)),
        rf"{KV_B}: found torch.int8 values with a scale, .*{KV_B}_scale_inv",
    ),
    "other fp8": (
        replacing(KV_B, lambda weight: weight.float().to(torch.float8_e5m2)), rf"{KV_B}: found torch.float8_e5m2 values"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_is_named(kind, written, tmp_path):
    edit, message = BROKEN[kind]
    broken = fp8.change(written[0], tmp_path / "broken", edit)
    with pytest.raises(ScaleError, match=message):
        list(read(broken))


def test_files_that_are_not_safetensors_are_refused(tmp_path):
    torch.save({"weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "pytorch_model.bin")
    load = LoadConfig()
    config = SimpleNamespace(
        quant_config=DequantizeConfig(Fp8Checkpoint("fp8", None)),
        model_config=SimpleNamespace(model=str(tmp_path), revision=None),
        load_config=load,
    )
    message = "found an fp8 checkpoint without safetensors files.*supports fp8 weights in safetensors files"
    with pytest.raises(UnsupportedOptionError, match=message):
        adopt(get_model_loader(load), config)


def test_scales_of_activations_and_of_the_kv_cache_are_dropped(tmp_path):
    weight = torch.randn(8, 8).to(torch.float8_e4m3fn)
    names = ["input_scale", "output_scale", "k_scale", "v_scale", "logit_scale"]
    stored = {f"attn.k_proj.{name}": torch.tensor(2.0) for name in names}
    stored |= {"attn.k_proj.weight": weight, "attn.k_proj.weight_scale": torch.tensor([3.0])}
    save_file(stored, tmp_path / "model.safetensors")
    found = dict(read(tmp_path))
    assert set(found) == {"attn.k_proj.weight", "attn.k_proj.logit_scale"}
    assert torch.equal(found["attn.k_proj.weight"], weight.float() * 3)


@pytest.mark.parametrize(
    ("config", "block"),
    [
        (fp8.BLOCKS.config, (16, 24)),
        (fp8.TENSORS.config, None),
        (fp8.ROWS.config, None),
        (fp8.compressed_tensors("tensor"), None),
        (fp8.compressed_tensors("block", block_structure=[128, 128]), (128, 128)),
    ],
    ids=["fp8 blocks", "fp8", "channel", "tensor", "block"],
)
def test_what_configurations_say(config, block):
    assert Fp8Checkpoint.of(config) == Fp8Checkpoint(config["quant_method"], block)


REFUSED = {
    "packed": ({**fp8.ROWS.config, "format": "pack-quantized"}, "the format pack-quantized"),
    "int8": (fp8.compressed_tensors("channel", type="int"), "symmetric weights of 8 bits, int, by channel"),
    "4 bits": (fp8.compressed_tensors("channel", num_bits=4), "symmetric weights of 4 bits, float"),
    "asymmetric": (fp8.compressed_tensors("channel", symmetric=False), "asymmetric weights"),
    "groups": (fp8.compressed_tensors("group", group_size=32), "by group"),
    "rotated": ({**fp8.ROWS.config, "transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
    "sparse": ({**fp8.ROWS.config, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
    "nothing": ({**fp8.ROWS.config, "config_groups": {}}, "no config_groups"),
    "e5m2": ({**fp8.BLOCKS.config, "fmt": "e5m2"}, "fmt e5m2"),
    "mxfp4 inside": ({**fp8.BLOCKS.config, "store_dtype": "mxfp4"}, "store_dtype mxfp4"),
    "no block": ({**fp8.BLOCKS.config, "weight_block_size": 128}, "weight_block_size 128"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_configurations_that_are_not_plain_fp8_are_refused(kind):
    config, reason = REFUSED[kind]
    message = rf"quantization_config \({config['quant_method']}\): found .*{reason}.*supports fp8 weights"
    with pytest.raises(UnsupportedOptionError, match=message):
        Fp8Checkpoint.of(config)


def test_configurations_of_other_methods_are_not_ours():
    assert Fp8Checkpoint.of({"quant_method": "awq", "bits": 4}) is None
