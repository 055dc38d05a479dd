"""Operators on CPU: our C++ kernels as MindSpore AOT custom operators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_mindspore.ops import build
from vllm_mindspore.ops.operator import Operator


@functools.lru_cache(maxsize=1)
def _checked_library() -> str:
    build.load()
    return str(build.LIBRARY)


@functools.cache
def _registration(function: str, inputs: int) -> dict:
    from mindspore.ops import CustomRegOp, DataType

    # MindSpore keeps one registration per name, so each number of inputs needs a name of its own
    registration = CustomRegOp(f"VllmMs{function}{inputs}")
    for i in range(inputs):
        registration = registration.input(i, f"x{i}")
    registration = registration.output(0, "y").dtype_format(*[DataType.None_None] * (inputs + 1))
    return registration.target("CPU").get_op_info()


def aot_primitive(operator: Operator, given: tuple[str, ...], attributes: dict[str, Any]) -> Callable:
    """The primitive calling `operator.cpu` of the built library. Raises build.BuildError when that cannot be used."""
    positions = {tensor.name: i for i, tensor in enumerate(operator.schema.tensors)}
    present = sum(1 << positions[name] for name in given)
    ordered = operator.schema.mutates or operator.ordered
    return _primitive(operator.cpu, len(given), ordered, {"present": present, **attributes})


def sequence(inputs: str, program: str) -> Callable:
    """Several operators as one primitive, for MindSpore's runtime costs more per operator than a small one takes.

    inputs: names of its tensors, separated by spaces. program: a line `result = operator operands attributes` per
    operator, an operand (or `-`) for each tensor of its schema, attributes as name=value; the last result is what the
    primitive returns, earlier ones live in memory that is reused. Raises build.BuildError when the library cannot be
    used; what is wrong in a program is reported when its shapes are first inferred.
    """
    attributes = {"present": -1, "inputs": inputs, "program": program}
    return _primitive("Sequence", len(inputs.split()), True, attributes)


def _primitive(function: str, inputs: int, ordered: bool, attributes: dict[str, Any]) -> Callable:
    from mindspore import float32, ops

    primitive = ops.Custom(
        f"{_checked_library()}:{function}",
        out_shape=None,  # inferred by the library
        out_dtype=float32,
        func_type="aot",
        reg_info=_registration(function, inputs),
    )
    for name, value in attributes.items():
        primitive.add_prim_attr(name, value)
    if ordered:
        primitive.add_prim_attr("side_effect_mem", True)  # keeps program order around the mutated tensor
    return primitive
