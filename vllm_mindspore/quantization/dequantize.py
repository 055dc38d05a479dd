"""The weights of an fp8 checkpoint, multiplied out to the model's type while vLLM's loader reads them.

A weight and its scale are neighbours by name only: they come in any order, and often from different files. So the
loader's tensors go by one after the other, a scale among them is dropped, and a weight's scale is read from its file
when the weight is there. At no time is there more than the weight at hand, as it was read and multiplied out.

What vLLM then sees are the tensors of an unquantized checkpoint. Scales of activations and of the KV cache, which
exist only so that these can be rounded to fp8 as well, are dropped: here they are not rounded.
"""

import copy
import itertools
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from safetensors import safe_open
from vllm.logger import init_logger

from vllm_mindspore import compat
from vllm_mindspore.config import UnsupportedOptionError
from vllm_mindspore.quantization import DEQUANTIZE
from vllm_mindspore.quantization.checkpoint import Fp8Checkpoint

logger = init_logger("vllm.vllm_mindspore.quantization")

FP8 = torch.float8_e4m3fn
# After the weight's name. Both are factors: DeepSeek calls its scale the inverse of the one it quantized with.
SCALE_SUFFIXES = ("_scale_inv", "_scale")
# The last part of their names.
ACTIVATION_SCALES = {
    "input_scale", "output_scale", "activation_scale", "q_scale", "k_scale", "v_scale", "kv_scale", "prob_output_scale",
}  # fmt: skip
ROWS = 128  # at once, where blocks do not say: so much of a weight is in float32 beside its result


class ScaleError(ValueError):
    """A tensor of an fp8 checkpoint and its scale do not fit, or there is no scale."""


class Tensors:
    """The tensors in safetensors files by name: names are read at once, tensors when they are asked for."""

    def __init__(self, files: Iterable[str]):
        self._open = lru_cache(maxsize=8)(lambda file: safe_open(file, framework="pt"))
        self._files = {name: file for file in files for name in self._open(file).keys()}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, as the file has it."""
        return self._open(self._files[name]).get_tensor(name)

    def scale_of(self, name: str) -> str | None:
        """The name of the scale of the tensor `name`, or None if it has none."""
        return next((name + suffix for suffix in SCALE_SUFFIXES if name + suffix in self), None)

    def is_scale(self, name: str) -> bool:
        """Whether `name` is the scale of a weight, of activations or of the KV cache."""
        scaled = (name.removesuffix(suffix) for suffix in SCALE_SUFFIXES if name.endswith(suffix))
        return name.rpartition(".")[2] in ACTIVATION_SCALES or any(weight in self for weight in scaled)


def adopt(loader, vllm_config) -> None:
    """Let a loader of vLLM's read an fp8 checkpoint, if that is what the model has, as an unquantized one.

    Raises:
        UnsupportedOptionError: its weights are not in safetensors files.
    """
    quant_config, model_config = vllm_config.quant_config, vllm_config.model_config
    checkpoint = getattr(quant_config, "checkpoint", None)
    if checkpoint is None or vllm_config.load_config.load_format == "dummy":
        return
    files = compat.safetensors_files(loader, model_config)
    if not files:
        found, supported = "an fp8 checkpoint without safetensors files", "fp8 weights in safetensors files"
        raise UnsupportedOptionError(model_config.model, found, supported, "Convert the checkpoint.")
    read_all, load = loader.get_all_weights, loader.load_weights

    def get_all_weights(model_config, model) -> Iterator[tuple[str, torch.Tensor]]:
        return dequantized(read_all(model_config, model), Tensors(files), checkpoint, model_config.dtype)

    def load_weights(model, model_config) -> None:
        if model_config.quantization == DEQUANTIZE:  # then vLLM checks that every weight was there
            model_config = copy.copy(model_config)
            model_config.quantization = None
        load(model, model_config)

    loader.get_all_weights, loader.load_weights = get_all_weights, load_weights


def dequantized(
    weights: Iterable[tuple[str, torch.Tensor]], tensors: Tensors, checkpoint: Fp8Checkpoint, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` without the scales among them, and those in fp8 multiplied out to `dtype`.

    weights: some or all of `tensors`, in any order.

    Raises:
        ScaleError: names the tensor.
    """
    count, seconds = 0, 0.0
    for name, tensor in weights:
        if tensors.is_scale(name):
            continue
        scale = tensors.scale_of(name)
        if tensor.dtype == FP8:
            begin = time.perf_counter()
            tensor = _multiplied_out(name, tensor, scale, tensors, checkpoint.block, dtype)
            count, seconds = count + 1, seconds + time.perf_counter() - begin
        elif scale is not None or tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
            found = f"found {tensor.dtype} values" + (f" with a scale, {scale}" if scale else "")
            raise ScaleError(f"{name}: {found}. In an fp8 checkpoint, {FP8} is supported. Use another checkpoint.")
        yield name, tensor
    logger.info("%d weights in fp8 multiplied out to %s in %.1f s", count, dtype, seconds)


def _multiplied_out(
    name: str, values: torch.Tensor, scale: str | None, tensors: Tensors, block: tuple[int, int] | None, dtype
) -> torch.Tensor:
    if scale is None:
        names = " nor ".join(name + suffix for suffix in SCALE_SUFFIXES)
        raise ScaleError(f"{name}: found values in fp8, but neither {names}. Use a complete checkpoint.")
    factors = tensors.read(scale)
    try:
        return dequantize(values, factors, block, dtype)
    except ScaleError as error:
        raise ScaleError(f"{scale}: {error} Use another checkpoint.") from None


def dequantize(
    values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> torch.Tensor:
    """`values * scale`, in float32, rounded once to `dtype`.

    values: [rows, columns], or [experts, rows, columns] with as many scales; fp8
    scale: [ceil(rows / block[0]), ceil(columns / block[1])], [rows, 1], [rows], or one value; any float type

    Raises:
        ScaleError: no such shape.
    """
    result = torch.empty(values.shape, dtype=dtype)
    if values.dim() == 3:
        scales = scale if scale.dim() and len(scale) == len(values) else itertools.repeat(scale)
        for expert, its_scale, out in zip(values, scales, result, strict=False):
            _dequantize(expert, its_scale, block, out)
    else:
        _dequantize(values, scale, block, result)
    return result


def _dequantize(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, result: torch.Tensor) -> None:
    rows, factors = _factors(values, scale.float(), block)
    for part, factor, out in zip(values.split(rows), factors, result.split(rows), strict=False):
        torch.mul(_in_float32(part), factor, out=out)


def _in_float32(values: torch.Tensor) -> torch.Tensor:
    """values.float(), which PyTorch converts one by one, in vector instructions: several times as fast.

    The bits of an e4m3, s eeee mmm, at the places of a float16, s 0eeee mmm0000000, are 2^-8 of its value.
    """
    bits = values.view(torch.int8)
    if ((bits & 0x7F) == 0x7F).any():  # not a number
        return values.float()
    moved = bits.to(torch.int16).mul_(1 << 7).bitwise_and_(~(1 << 14))  # the product has the sign in bits 15 and 14
    return moved.view(torch.float16).float().mul_(256.0)


def _factors(
    values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None
) -> tuple[int, Iterable[torch.Tensor]]:
    """How many rows to multiply at once, and for each such part the factor, [1 or rows, 1 or columns]."""
    if values.dim() == 2:
        rows, columns = values.shape
        if block and scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
            return block[0], scale.repeat_interleave(block[1], dim=1)[:, :columns].split(1)
        if scale.numel() == 1:
            return ROWS, itertools.repeat(scale.reshape(1, 1))
        if scale.shape in ((rows,), (rows, 1)):
            return ROWS, scale.reshape(-1, 1).split(ROWS)
    blocks = f"one for each block of {block[0]} x {block[1]}, " if block else ""
    raise ScaleError(
        f"found scales of shape {list(scale.shape)} for a weight of shape {list(values.shape)}. "
        f"Supported are {blocks}one for each row, or a single one."
    )
