"""Writes one FX node as a MindSpore expression, given names for its operands."""

import math
from collections import Counter

import torch
from torch.fx import Node

from vllm_mindspore.compiler.capture import CapturedGraph
from vllm_mindspore.compiler.legalize import FLOATS, operator_name, value
from vllm_mindspore.compiler.torch_map import TABLE

MS_DTYPES = {
    torch.float64: "ms.float64",
    torch.float32: "ms.float32",
    torch.float16: "ms.float32",
    torch.bfloat16: "ms.float32",
    torch.int64: "ms.int64",
    torch.int32: "ms.int32",
    torch.int16: "ms.int16",
    torch.int8: "ms.int8",
    torch.uint8: "ms.uint8",
    torch.bool: "ms.bool_",
}
PYTHON_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "neg": "-"}


class UnmappedOperatorError(NotImplementedError):
    """The model uses PyTorch operators without a meaning in MindSpore; raised before weights are loaded."""

    def __init__(self, graph: str, missing: Counter):
        listing = ", ".join(f"{name} (×{count})" for name, count in sorted(missing.items()))
        super().__init__(
            f"the {graph} graph uses PyTorch operators that are not mapped to MindSpore: {listing}. "
            "`vllm-mindspore ops` lists what is mapped; CONTRIBUTING.md says how to add one."
        )
        self.missing = missing


def is_own(node: Node) -> bool:
    """Whether the node is an operator of our library."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "vllm_ms"


def is_mapped(node: Node) -> bool:
    """Whether the node can be written."""
    return (
        is_own(node)
        or operator_name(node.target) in TABLE
        or operator_name(node.target) in {*PYTHON_OPERATORS, "getitem"}
    )


def require_mapped(captured: CapturedGraph) -> None:
    """Raise `UnmappedOperatorError` listing every operator that cannot be written."""
    nodes = [node for node in captured.module.graph.nodes if node.op == "call_function"]
    missing = Counter(operator_name(node.target) for node in nodes if not is_mapped(node))
    if missing:
        raise UnmappedOperatorError(captured.name, missing)


class ExpressionWriter:
    """Writes expressions; `names` maps nodes to the text that stands for them, `stored` weights to their real type."""

    def __init__(self, names: dict[Node, str], stored: dict[Node, torch.dtype]):
        self.names, self.stored = names, stored

    def __call__(self, operand) -> str:
        """The text of an operand: a node's name (a half-precision weight is cast), or a constant."""
        if isinstance(operand, Node):
            name = self.names[operand]
            half = self.stored.get(operand) in (torch.bfloat16, torch.float16)
            return f"ops.cast({name}, ms.float32)" if half else name
        if isinstance(operand, (list, tuple)):
            return "(" + "".join(f"{self(item)}, " for item in operand).rstrip(" ") + ")"
        if isinstance(operand, torch.dtype):
            return MS_DTYPES[operand]
        if isinstance(operand, float) and not math.isfinite(operand):
            return f'float("{operand}")'
        return repr(operand)

    value = staticmethod(value)

    @staticmethod
    def is_tensor(operand) -> bool:
        return isinstance(operand, Node) and isinstance(value(operand), torch.Tensor)

    @staticmethod
    def dtype(dtype: torch.dtype) -> str:
        """MindSpore's name of a type; half floats are float32, as everything between operators."""
        return MS_DTYPES[dtype]

    def cast(self, operand, dtype: torch.dtype) -> str:
        """The operand as `dtype`, with a cast only where its type differs."""
        if self.is_tensor(operand) and MS_DTYPES[value(operand).dtype] != MS_DTYPES[dtype]:
            return f"ops.cast({self(operand)}, {MS_DTYPES[dtype]})"
        if (
            not isinstance(operand, Node)
            and dtype in FLOATS
            and isinstance(operand, int)
            and not isinstance(operand, bool)
        ):
            return self(float(operand))
        return self(operand)

    @staticmethod
    def dim(operand, dim: int) -> int:
        """A dimension counted from the front."""
        return dim % max(value(operand).dim(), 1) if dim < 0 else dim

    def target_shape(self, node: Node, shape) -> str:
        """A shape to reshape to: -1 stands for the one size that is not a constant."""
        sizes = [
            size if isinstance(size, int) else result for size, result in zip(shape, value(node).shape, strict=True)
        ]
        unknown = [size for size in sizes if not isinstance(size, int) or size == -1]
        if len(unknown) <= 1:
            return self(tuple(size if isinstance(size, int) else -1 for size in sizes))
        return self(tuple(shape))

    def expression(self, node: Node) -> str:
        """The node's right-hand side."""
        name = operator_name(node.target)
        if name == "getitem":
            return f"{self(node.args[0])}[{self(node.args[1])}]"
        if name in PYTHON_OPERATORS:
            if len(node.args) == 1:
                return f"{PYTHON_OPERATORS[name]}{self(node.args[0])}"
            return f"{self(node.args[0])} {PYTHON_OPERATORS[name]} {self(node.args[1])}"
        return TABLE[name](self, node, *node.args, **node.kwargs)
