"""What an operator of the library is: its schema, and where its implementations come from."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_ATTRIBUTE_TYPES = {"int": int, "float": float, "bool": bool, "str": str}


class UnsupportedOperator(NotImplementedError):
    """An operator, or this combination of its arguments, has no implementation on a device."""


@dataclass(frozen=True)
class TensorArgument:
    """A tensor argument of a schema."""

    name: str
    optional: bool
    mutated: bool


@dataclass(frozen=True)
class Attribute:
    """A non-tensor argument of a schema; `type` is int, float, bool or str."""

    name: str
    type: type


@dataclass(frozen=True)
class Schema:
    """A parsed schema `(Tensor x, Tensor? bias, Tensor(a!) cache, float eps) -> Tensor`."""

    text: str
    tensors: tuple[TensorArgument, ...]
    attributes: tuple[Attribute, ...]

    @classmethod
    def parse(cls, text: str) -> Schema:
        """Raises ValueError on anything but tensors, int, float, bool and str."""
        match = re.fullmatch(r"\((.*)\)\s*->\s*(?:Tensor|\(\))", text.strip(), re.DOTALL)
        if match is None:
            raise ValueError(f"schema {text!r}: expected '(arguments) -> Tensor' or '-> ()'")
        tensors, attributes = [], []
        for argument in match[1].split(","):
            kind, _, name = argument.strip().rpartition(" ")
            if kind in _ATTRIBUTE_TYPES:
                attributes.append(Attribute(name, _ATTRIBUTE_TYPES[kind]))
            elif re.fullmatch(r"Tensor(\([a-z]!\))?\??", kind):
                tensors.append(TensorArgument(name, kind.endswith("?"), "!" in kind))
            else:
                raise ValueError(f"schema {text!r}: cannot read argument {argument.strip()!r}")
        return cls(text.strip(), tuple(tensors), tuple(attributes))

    @property
    def mutates(self) -> bool:
        return any(tensor.mutated for tensor in self.tensors)

    def given(self, present: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the tensor inputs of a call, in order, where `present` names the optional ones given.

        Raises ValueError when `present` names something that is not an optional tensor argument.
        """
        unknown = set(present) - {tensor.name for tensor in self.tensors if tensor.optional}
        if unknown:
            raise ValueError(f"not an optional tensor argument: {', '.join(sorted(unknown))}; schema {self.text}")
        return tuple(tensor.name for tensor in self.tensors if not tensor.optional or tensor.name in present)

    def convert(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """`attributes` in schema order and with the schema's types. Raises TypeError when any is missing or unknown."""
        names = [attribute.name for attribute in self.attributes]
        if set(names) != set(attributes):
            raise TypeError(f"attributes {sorted(attributes)} given, schema {self.text} has {sorted(names)}")
        return {attribute.name: attribute.type(attributes[attribute.name]) for attribute in self.attributes}


@dataclass(frozen=True)
class Operator:
    """One operator.

    name: in torch `vllm_ms::<name>`.
    schema: tensors become inputs of the primitive, everything else its attributes.
    fake: torch function (same arguments) giving the shape and dtype of the result; imports torch when called.
    cpu: name that csrc/wrappers exports (VLLM_MS_AOT_OPERATOR).
    ascend: `ascend(given, **attributes)` returns a callable of MindSpore primitives that takes the tensors named by
        `given`, or raises UnsupportedOperator; None where there is no implementation at all.
    ordered: keep program order with operators that mutate a tensor this one reads. Those that mutate always keep it.
    columns: `columns(shapes, attributes)` returns the names of the tensors that the CPU's kernel can read in columns
        (`ops/columns.py`), all of them or none; both arguments by name. None: it cannot.
    check: `check(given, **attributes)` raises ValueError for attribute values that no device accepts.
    """

    name: str
    schema: Schema
    fake: Callable[..., Any] = field(repr=False)
    cpu: str
    ascend: Callable[..., Callable] | None = field(default=None, repr=False)
    check: Callable[..., None] | None = field(default=None, repr=False)
    columns: Callable[[dict[str, tuple[int, ...]], dict[str, Any]], set[str]] | None = field(default=None, repr=False)
    ordered: bool = False


def ascend_cell(name: str, module: str = "ascend") -> Callable[..., Callable]:
    """An Operator's `ascend`: class `name` of `vllm_mindspore.ops.<module>`, which is imported when it is used."""

    def build(given: tuple[str, ...], **attributes: Any) -> Callable:
        return getattr(importlib.import_module(f"vllm_mindspore.ops.{module}"), name)(given, **attributes)

    return build
