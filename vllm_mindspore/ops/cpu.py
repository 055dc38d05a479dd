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
    import mindspore
    from mindspore import ops

    primitive = ops.Custom(
        f"{_checked_library()}:{operator.cpu}",
        out_shape=None,  # inferred by the library
        out_dtype=mindspore.float32,
        func_type="aot",
        reg_info=_registration(operator.cpu, len(given)),
    )
    positions = {tensor.name: i for i, tensor in enumerate(operator.schema.tensors)}
    primitive.add_prim_attr("present", sum(1 << positions[name] for name in given))
    for name, value in attributes.items():
        primitive.add_prim_attr(name, value)
    if operator.schema.mutates or operator.ordered:
        primitive.add_prim_attr("side_effect_mem", True)  # keeps program order around the mutated tensor
    return primitive
