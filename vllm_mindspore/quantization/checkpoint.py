"""What the configuration of a quantized checkpoint says: whether its weights are fp8, and how they are scaled.

Two conventions of `quantization_config` in config.json: `fp8`, of DeepSeek's and Hugging Face's own checkpoints
(transformers/utils/quantization_config.py, `FineGrainedFP8Config`), and `compressed-tensors`, of llm-compressor
(compressed_tensors/quantization/quant_config.py).
"""

from dataclasses import dataclass
from typing import Any

from vllm_mindspore.config import UnsupportedOptionError

FP8_FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors: a weight is a tensor of its own type
FP8_STRATEGIES = ("tensor", "channel", "block")
SUPPORTED = (
    "fp8 weights in e4m3 (quant_method fp8, or compressed-tensors of the format float-quantized), scaled by block, "
    "channel or tensor"
)
ADVICE = "Use such a checkpoint, or the unquantized one."


@dataclass(frozen=True)
class Fp8Checkpoint:
    """method: as config.json calls it. block: rows and columns of a weight that share a scale, where blocks do."""

    method: str
    block: tuple[int, int] | None

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Fp8Checkpoint | None":
        """What `quantization_config` says; None if its method is neither of the two.

        Raises:
            UnsupportedOptionError: the method is, but with weights that are not plain fp8.
        """
        method = config.get("quant_method")
        if method not in _BLOCKS:
            return None
        return cls(method, _BLOCKS[method](config))


def _refuse(method: str, found: object) -> UnsupportedOptionError:
    return UnsupportedOptionError(f"the checkpoint's quantization_config ({method})", found, SUPPORTED, ADVICE)


def _block_of_fp8(config: dict[str, Any]) -> tuple[int, int] | None:
    for field, supported in (("fmt", "e4m3"), ("store_dtype", None)):
        value = config.get(field)
        if value not in (None, supported):
            raise _refuse("fp8", f"{field} {value}")
    block = config.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, (list, tuple)) or len(block) != 2 or min(block) < 1:
        raise _refuse("fp8", f"weight_block_size {block}")
    return tuple(block)


def _block_of_compressed_tensors(config: dict[str, Any]) -> tuple[int, int] | None:
    from compressed_tensors.quantization import QuantizationArgs

    method = "compressed-tensors"
    if config.get("transform_config"):
        raise _refuse(method, "a transform_config: weights that are rotated")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _refuse(method, f"sparse weights ({config['sparsity_config']['format']})")
    groups = [group for group in (config.get("config_groups") or {}).values() if group.get("weights")]
    if not groups:
        raise _refuse(method, "no config_groups with weights")
    blocks = set()
    for group in groups:
        stored = group.get("format") or config.get("format")
        if stored not in FP8_FORMATS:
            raise _refuse(method, f"the format {stored}")
        weights = QuantizationArgs.model_validate(group["weights"])
        fp8 = weights.type == "float" and weights.num_bits == 8 and weights.symmetric
        if not fp8 or weights.strategy not in FP8_STRATEGIES:
            kind = f"{'symmetric' if weights.symmetric else 'asymmetric'} weights of {weights.num_bits} bits"
            raise _refuse(method, f"{kind}, {weights.type}, by {weights.strategy}")
        if weights.strategy == "block":
            blocks.add(tuple(weights.block_structure))
    if len(blocks) > 1:
        raise _refuse(method, f"blocks of several sizes, {sorted(blocks)}")
    return blocks.pop() if blocks else None


_BLOCKS = {"fp8": _block_of_fp8, "compressed-tensors": _block_of_compressed_tensors}
