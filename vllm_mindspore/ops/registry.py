"""The table of operators, and the two ways into it: `define_all` for torch, `build` for MindSpore."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from vllm_mindspore.ops.operator import Operator, UnsupportedOperator

__all__ = ["OPERATORS", "NAMESPACE", "Operator", "UnsupportedOperator", "build", "define_all"]

NAMESPACE = "vllm_ms"

# Each of these modules of vllm_mindspore.ops has a list OPERATORS.
_DEFINITIONS = (
    "embedding", "linear", "quantized", "norm", "activation", "pointwise", "concat", "rotary", "attention", "mla",
    "indexer", "moe", "collectives", "exchange", "begun",
)  # fmt: skip


def _collect() -> dict[str, Operator]:
    table: dict[str, Operator] = {}
    for module in _DEFINITIONS:
        for operator in importlib.import_module(f"vllm_mindspore.ops.{module}").OPERATORS:
            if operator.name in table:
                raise ValueError(f"operator {operator.name} is defined twice")
            table[operator.name] = operator
    return table


OPERATORS: dict[str, Operator] = _collect()

_libraries: list[Any] = []  # a torch Library takes its definitions along when it is collected


def define_all() -> None:
    """Define every operator in torch's namespace `vllm_ms`, with its fake. Idempotent; does not import MindSpore."""
    import torch

    if _libraries:
        return
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for operator in OPERATORS.values():
        library.define(operator.name + operator.schema.text)
        torch.library.register_fake(f"{NAMESPACE}::{operator.name}", operator.fake, lib=library)
    _libraries.append(library)


def build(name: str, device: str, present: tuple[str, ...] = (), **attributes: Any) -> Callable:
    """A MindSpore primitive, or a callable made of primitives, for one use of an operator in a Cell.

    device: "cpu" or "ascend". present: names of the optional tensor arguments that the call passes. attributes: every
    non-tensor argument of the schema. The result takes the given tensors in schema order; make it in a Cell's
    `__init__` and call it in `construct`. Raises UnsupportedOperator when the device has no implementation, and
    ValueError or TypeError for arguments that do not fit the schema.
    """
    operator = OPERATORS.get(name)
    if operator is None:
        raise UnsupportedOperator(f"no operator {name!r}; known: {', '.join(sorted(OPERATORS))}")
    given = operator.schema.given(tuple(present))
    values = operator.schema.convert(attributes)
    if operator.check is not None:
        operator.check(given, **values)
    if device == "cpu":
        from vllm_mindspore.ops.cpu import aot_primitive

        return aot_primitive(operator, given, values)
    if device == "ascend":
        if operator.ascend is None:
            raise UnsupportedOperator(f"operator {name!r} has no implementation for ascend, only for cpu")
        return operator.ascend(given, **values)
    raise UnsupportedOperator(f"operator {name!r}: no device {device!r}; supported: cpu, ascend")
