"""Elementwise arithmetic, comparison, logic and casts.

Arithmetic of two float tensors never gets here: legalization makes it `vllm_ms.binary`, because MindSpore's
broadcasting arithmetic on CPU keeps memory for ever.
"""

import torch

from vllm_mindspore.compiler.torch_map.table import op, unary

for _name, _expression in {
    "aten.cos.default": "ops.cos",
    "aten.sin.default": "ops.sin",
    "aten.rsqrt.default": "ops.rsqrt",
    "aten.sqrt.default": "ops.sqrt",
    "aten.neg.default": "ops.neg",
    "aten.abs.default": "ops.abs",
    "aten.exp.default": "ops.exp",
    "aten.log.default": "ops.log",
    "aten.tanh.default": "ops.tanh",
    "aten.reciprocal.default": "ops.reciprocal",
    "aten.erf.default": "ops.erf",
    "aten.floor.default": "ops.floor",
    "aten.ceil.default": "ops.ceil",
    "aten.round.default": "ops.round",
    "aten.sign.default": "ops.sign",
    "aten.softplus.default": "ops.softplus",
    "aten.logical_not.default": "ops.logical_not",
    "aten.isnan.default": "ops.isnan",
}.items():
    unary(_name, _expression)


def _arithmetic(symbol: str):
    def rule(e, node, x, y, alpha=1):
        dtype = e.value(node).dtype
        right = e.cast(y, dtype) if alpha == 1 else f"{e.cast(y, dtype)} * {e(alpha)}"
        return f"{e.cast(x, dtype)} {symbol} {right}"

    return rule


for _name, _symbol in {"add": "+", "sub": "-", "mul": "*", "div": "/"}.items():
    op(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar")(_arithmetic(_symbol))


def _comparison(symbol: str):
    def rule(e, node, x, y):
        if e.is_tensor(x) and e.is_tensor(y):
            dtype = torch.promote_types(e.value(x).dtype, e.value(y).dtype)
            return f"{e.cast(x, dtype)} {symbol} {e.cast(y, dtype)}"
        return f"{e(x)} {symbol} {e(y)}"

    return rule


for _name, _symbol in {"eq": "==", "ne": "!=", "le": "<=", "lt": "<", "ge": ">=", "gt": ">"}.items():
    op(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar")(_comparison(_symbol))


@op("aten.to.dtype")
def cast(e, node, x, *args, **kwargs):
    return e.cast(x, e.value(node).dtype)


@op("aten.pow.Tensor_Scalar")
def pow_scalar(e, node, x, exponent):
    return f"ops.square({e(x)})" if exponent == 2 else f"ops.pow({e(x)}, {e(exponent)})"


@op("aten.pow.Scalar", "aten.pow.Tensor_Tensor")
def pow_tensor(e, node, x, exponent):
    return f"ops.pow({e(x)}, {e(exponent)})"


@op("aten.rsub.Scalar", "aten.rsub.Tensor")
def rsub(e, node, x, y, alpha=1):
    scaled = e(x) if alpha == 1 else f"{e(x)} * {e(alpha)}"
    return f"{e(y)} - {scaled}"


@op("aten.floor_divide.default", "aten.div.Tensor_mode")
def floor_divide(e, node, x, y, rounding_mode="floor"):
    if rounding_mode == "floor":
        return f"ops.floor_div({e(x)}, {e(y)})"
    return f"ops.div({e(x)}, {e(y)}, rounding_mode={rounding_mode!r})"


@op("aten.remainder.Scalar", "aten.remainder.Tensor")
def remainder(e, node, x, y):
    return f"ops.floor_mod({e(x)}, {e(y)})"


@op("aten.logical_and.default", "aten.bitwise_and.Tensor")
def logical_and(e, node, x, y):
    function = "logical_and" if e.value(node).dtype == torch.bool else "bitwise_and"
    return f"ops.{function}({e(x)}, {e(y)})"


@op("aten.logical_or.default", "aten.bitwise_or.Tensor")
def logical_or(e, node, x, y):
    function = "logical_or" if e.value(node).dtype == torch.bool else "bitwise_or"
    return f"ops.{function}({e(x)}, {e(y)})"


@op("aten.bitwise_not.default")
def bitwise_not(e, node, x):
    return f"ops.logical_not({e(x)})" if e.value(node).dtype == torch.bool else f"-1 - {e(x)}"


@op("aten.where.self")
def where(e, node, condition, x, y):
    dtype = e.value(node).dtype
    return f"ops.where({e(condition)}, {e.cast(x, dtype)}, {e.cast(y, dtype)})"


@op("aten.masked_fill.Scalar")
def masked_fill(e, node, x, mask, fill):
    return f"ops.masked_fill({e(x)}, {e(mask)}, {e(fill)})"


@op("aten.clamp.default")
def clamp(e, node, x, low=None, high=None):
    return f"ops.clamp({e(x)}, {e(low)}, {e(high)})"


@op("aten.clamp_min.default")
def clamp_min(e, node, x, low):
    return f"ops.clamp({e(x)}, {e(low)}, None)"


@op("aten.clamp_max.default")
def clamp_max(e, node, x, high):
    return f"ops.clamp({e(x)}, None, {e(high)})"
