"""FX graph → the source of a MindSpore network a person can read, run in PyNative, or paste into a notebook."""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import Node

from vllm_mindspore.compiler.capture import CapturedGraph, GraphInput
from vllm_mindspore.compiler.expressions import ExpressionWriter, is_own, require_mapped
from vllm_mindspore.compiler.legalize import value
from vllm_mindspore.compiler.segments import LAYER_INDEX, Segment, WeightNames, find_layers

HEADER = '''"""{title}

Written by vllm-mindspore; edits are lost when the graph is compiled again. Weights are read in their storage type,
values between operators are float32. `weights` maps vLLM's parameter names to MindSpore Parameters.
"""

import mindspore as ms
from mindspore import nn, ops

from vllm_mindspore.compiler import ms_functions as F
{imports}
DEVICE = {device!r}
'''


IMPORTS = {
    "ascend": "from vllm_mindspore.ops.registry import build\n",
    "cpu": "from vllm_mindspore.ops.cpu import sequence\nfrom vllm_mindspore.ops.registry import build\n",
}


@dataclass(frozen=True)
class EmittedGraph:
    """A network's source and what to feed it.

    weights: parameter and constant names the constructor reads. inputs: arguments of `construct`, in order.
    outputs: the shape of each result, None for a size that varies.
    """

    name: str
    source: str
    weights: tuple[GraphInput, ...]
    inputs: tuple[GraphInput, ...]
    outputs: tuple[tuple[int | None, ...], ...]
    layer_classes: int
    operators: dict[str, int]


def emit(captured: CapturedGraph, stored: dict[str, torch.dtype], device: str, title: str) -> EmittedGraph:
    """Write `captured` (legalized, bound to KV groups) as a network with the class `Network`.

    stored: the real type of every weight and constant by name.

    Raises:
        UnmappedOperatorError: an operator has no MindSpore expression.
    """
    require_mapped(captured)
    _use_unknown_sizes(captured)
    inputs = captured.placeholders
    stored_nodes = {node: stored[item.name] for node, item in inputs.items() if item.kind in ("weight", "constant")}
    before, layers, after = find_layers(captured, stored_nodes)
    writer = _NetworkWriter(captured, stored_nodes, group=device == "cpu")
    classes = writer.layer_classes(layers)
    body = writer.network(before, layers, after)
    source = "\n".join([HEADER.format(title=title, device=device, imports=IMPORTS[device]), *classes, body])
    step_inputs = tuple(item for item in inputs.values() if item.kind not in ("weight", "constant"))
    weights = tuple(item for item in inputs.values() if item.kind in ("weight", "constant"))
    operators = Counter(_operator(node) for node in [*before, *after, *(n for layer in layers for n in layer.nodes)])
    outputs = tuple(_known_shape(node) for node in results_of(captured))
    return EmittedGraph(captured.name, source, weights, step_inputs, outputs, len(classes), dict(operators))


def results_of(captured: CapturedGraph) -> list[Node]:
    """The nodes a graph returns."""
    output = next(node for node in captured.module.graph.nodes if node.op == "output").args[0]
    return [node for node in (output if isinstance(output, (tuple, list)) else [output]) if node is not None]


def _known_shape(node: Node) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in value(node).shape)


def _operator(node: Node) -> str:
    from vllm_mindspore.compiler.legalize import operator_name

    return operator_name(node.target)


def _use_unknown_sizes(captured: CapturedGraph) -> None:
    """In a view whose only unknown size is computed, write -1 for it: the size then needs no input of its own."""
    for node in captured.module.graph.nodes:
        if node.target is torch.ops.aten.reshape.default:
            shape = node.args[1]
            unknown = [position for position, size in enumerate(shape) if not isinstance(size, int) or size == -1]
            if len(unknown) == 1:
                node.update_arg(1, [-1 if position in unknown else size for position, size in enumerate(shape)])
    captured.module.graph.eliminate_dead_code()


def identifier(name: str) -> str:
    """A Python identifier for a parameter name."""
    text = re.sub(r"\W", "_", name)
    return text if text[:1].isalpha() or text[:1] == "_" else f"w_{text}"


@dataclass(frozen=True)
class OwnCall:
    """A call of an operator of ours: its tensors in schema order (None: absent), and everything else by name.

    present: names of the optional tensors that are given.
    """

    operator: str
    tensors: tuple[Node | None, ...]
    present: tuple[str, ...]
    attributes: dict[str, object]

    @classmethod
    def of(cls, node: Node) -> "OwnCall":
        tensors, present, attributes = [], [], {}
        for argument, item in zip(node.target._schema.arguments, node.args, strict=True):
            kind = str(argument.type)
            if kind not in ("Tensor", "Optional[Tensor]"):
                attributes[argument.name] = item
                continue
            tensors.append(item)
            if kind == "Optional[Tensor]" and item is not None:
                present.append(argument.name)
        operator = node.target._schema.name.split("::")[1]
        return cls(operator, tuple(tensors), tuple(present), attributes)


def sequences(nodes: list[Node]) -> list[list[Node]]:
    """`nodes` cut into runs: one node, or operators of ours of which only the last one's result leaves the run."""
    runs, begin = [], 0
    while begin < len(nodes):
        end = begin
        while end < len(nodes) and is_own(nodes[end]):
            end += 1
        while end > begin + 1 and _leaving(nodes[begin:end]) != [nodes[end - 1]]:
            end -= 1
        end = max(end, begin + 1)
        runs.append(nodes[begin:end])
        begin = end
    return runs


def _leaving(run: list[Node]) -> list[Node]:
    inside = set(run)
    return [node for node in run if any(user not in inside for user in node.users)]


class _Block:
    """The body of one class: constructor lines, construct lines, and unique local names."""

    def __init__(self):
        self.init: list[str] = []
        self.body: list[str] = []
        self.counts: Counter = Counter()
        self.names: dict[Node, str] = {}

    def fresh(self, base: str) -> str:
        self.counts[base] += 1
        return base if self.counts[base] == 1 else f"{base}_{self.counts[base] - 1}"


class _NetworkWriter:
    def __init__(self, captured: CapturedGraph, stored: dict[Node, torch.dtype], group: bool):
        """group: write consecutive operators of ours as one."""
        self.captured, self.stored, self.inputs, self.group = captured, stored, captured.placeholders, group
        self.classes: dict[tuple, str] = {}
        self.symbols = self._symbols()

    def _symbols(self) -> dict[str, str]:
        """Readable names of the symbolic sizes."""
        names = {}
        for node, item in self.inputs.items():
            shape = getattr(value(node), "shape", ())
            meaning = {
                "input_ids": ["num_tokens"],
                "hidden_states": ["num_rows"],
                "seq_lens": ["num_reqs"],
            }.get(item.name if item.kind == "tensor" else item.kind, [])
            meaning = ["num_reqs", "max_blocks"] if item.kind == "block_table" else meaning
            meaning = ["num_slots"] if item.kind == "kv_cache" else meaning
            for size, name in zip(shape, meaning, strict=False):
                names.setdefault(str(size), name)
        return names

    def comment(self, node: Node) -> str:
        """`  # [num_tokens, 1024]`, with the type where it is not float32."""
        result = value(node)
        if not isinstance(result, torch.Tensor):
            return ""
        sizes = ", ".join(self.symbols.get(str(size), str(size)) for size in result.shape)
        kind = "" if result.dtype == torch.float32 else f" {str(result.dtype).removeprefix('torch.')}"
        return f"  # [{sizes}]{kind}"

    def write(self, block: _Block, node: Node) -> None:
        """Append one node to a block."""
        writer = ExpressionWriter(block.names, self.stored)
        if not is_own(node):
            block.names[node] = name = block.fresh(re.sub(r"_\d+$", "", node.name))
            block.body.append(f"{name} = {writer.expression(node)}{self.comment(node)}")
            return
        call = OwnCall.of(node)
        attribute = block.fresh(call.operator)
        settings = "".join(f", {name}={item!r}" for name, item in call.attributes.items())
        block.init.append(f'self.{attribute} = build("{call.operator}", DEVICE, {call.present!r}{settings})')
        operands = ", ".join(block.names[item] for item in call.tensors if item is not None)
        if not node.target._schema.returns:
            block.body.append(f"self.{attribute}({operands})")
            return
        block.names[node] = name = block.fresh(f"{call.operator}_out")
        block.body.append(f"{name} = self.{attribute}({operands}){self.comment(node)}")

    def write_all(self, block: _Block, nodes: list[Node]) -> None:
        """Append nodes in order."""
        for run in sequences(nodes) if self.group else [[node] for node in nodes]:
            if len(run) == 1:
                self.write(block, run[0])
            else:
                self.write_sequence(block, run)

    def write_sequence(self, block: _Block, run: list[Node]) -> None:
        """Append operators of ours, of which only the last one's result is used elsewhere, as one."""
        inputs: dict[Node, str] = {}
        lines = []
        attribute = block.fresh("operators")
        for node in run:
            call = OwnCall.of(node)
            for operand in call.tensors:
                if operand is not None and operand not in run:
                    inputs[operand] = block.names[operand].removeprefix("self.")
            operands = " ".join("-" if item is None else inputs.get(item) or block.names[item] for item in call.tensors)
            settings = "".join(f" {name}={item}" for name, item in call.attributes.items())
            block.names[node] = block.fresh(f"{call.operator}_out")
            lines.append(f"{block.names[node]} = {call.operator} {operands}{settings}")
        block.init.append(f"self.{attribute} = sequence(")
        block.init.append(f'    "{" ".join(inputs.values())}",')
        block.init += ['    """', *(f"    {line}" for line in lines), '    """,', ")"]
        operands = ", ".join(block.names[node] for node in inputs)
        block.body.append(f"{block.names[run[-1]]} = self.{attribute}({operands}){self.comment(run[-1])}")

    def layer_classes(self, layers: list[Segment]) -> list[str]:
        """The source of one class per kind of layer."""
        members: dict[tuple, list[Segment]] = {}
        for layer in layers:
            members.setdefault(layer.signature, []).append(layer)
        sources = []
        for number, (signature, kind) in enumerate(members.items()):
            self.classes[signature] = f"Layer{number}" if len(members) > 1 else "Layer"
            sources.append(self._layer_class(self.classes[signature], kind, layers))
        return sources

    def _weight_names(self, layers: list[Segment]) -> WeightNames:
        used_by: dict[Node, set[int]] = {}
        for layer in layers:
            for weight in layer.weights:
                used_by.setdefault(weight, set()).add(layer.index)
        return WeightNames(self.inputs, used_by)

    def _layer_class(self, name: str, kind: list[Segment], layers: list[Segment]) -> str:
        layer, block, names = kind[0], _Block(), self._weight_names(layers)
        for weight in layer.weights:
            local, relative = names.local(weight, layer.index)
            attribute = block.fresh(identifier(local))
            key = f'prefix + "{local}"' if relative else f'"{local}"'
            block.init.append(f"self.{attribute} = weights[{key}]{self.comment(weight)}")
            block.names[weight] = f"self.{attribute}"
        parameters = [self._parameter(block, node) for node in layer.external]
        self.write_all(block, layer.nodes)
        block.body.append("return " + ", ".join(block.names[node] for node in layer.results))
        indices = ", ".join(str(member.index) for member in kind)
        return _class(name, f"Layers {indices}.", "weights, prefix", block, parameters)

    def _parameter(self, block: _Block, node: Node) -> str:
        item = self.inputs.get(node)
        if item is None:
            name = block.fresh("hidden_states" if isinstance(value(node), torch.Tensor) else "size")
        else:
            name = block.fresh(item.name if item.kind == "tensor" else item.kind)
        block.names[node] = name
        return name

    def network(self, before: list[Node], layers: list[Segment], after: list[Node]) -> str:
        """The source of the class `Network`."""
        block = _Block()
        arguments = []
        for node, item in self.inputs.items():
            if item.kind in ("weight", "constant"):
                continue
            name = item.name if item.kind == "tensor" else f"{item.kind}_{self._input_number(item)}"
            block.names[node] = block.fresh(name)
            arguments.append(block.names[node])
        outside = {operand for node in [*before, *after] for operand in node.all_input_nodes}
        results = results_of(self.captured)
        for node in self.stored:
            if node in outside or node in results:
                item = self.inputs[node]
                attribute = block.fresh(identifier(item.name))
                block.init.append(f'self.{attribute} = weights["{item.name}"]{self.comment(node)}')
                block.names[node] = f"self.{attribute}"
        self.write_all(block, before)
        for layer in layers:
            self._layer_call(block, layer)
        self.write_all(block, after)
        block.body.append("return " + ", ".join(block.names[item] for item in results))
        return _class("Network", f"The {self.captured.name} graph.", "weights", block, arguments)

    def _input_number(self, item: GraphInput) -> str:
        """A KV cache is numbered by its layer, attention metadata by its KV cache group."""
        match = LAYER_INDEX.match(item.name)
        return match["index"] if match else item.name

    def _layer_call(self, block: _Block, layer: Segment) -> None:
        prefix = next(
            (LAYER_INDEX.match(self.inputs[w].name)["prefix"] for w in layer.weights if self._belongs(w, layer)), ""
        )
        attribute = f"layer_{layer.index}"
        block.init.append(f'self.{attribute} = {self.classes[layer.signature]}(weights, "{prefix}")')
        operands = ", ".join(block.names[node] for node in layer.external)
        names = []
        for node in layer.results:
            block.names[node] = block.fresh("hidden_states")
            names.append(block.names[node])
        comment = self.comment(layer.results[0]) if len(names) == 1 else ""
        block.body.append(f"{', '.join(names)} = self.{attribute}({operands}){comment}")

    def _belongs(self, weight: Node, layer: Segment) -> bool:
        match = LAYER_INDEX.match(self.inputs[weight].name)
        return match is not None and int(match["index"]) == layer.index


def _class(name: str, docstring: str, constructor: str, block: _Block, parameters: list[str]) -> str:
    indent = " " * 8
    lines = ["", "", f"class {name}(nn.Cell):", f'    """{docstring}"""', "", f"    def __init__(self, {constructor}):"]
    lines += [f"{indent}super().__init__()", *(indent + line for line in block.init), ""]
    lines += [f"    def construct(self, {', '.join(parameters)}):", *(indent + line for line in block.body)]
    return "\n".join(lines)
