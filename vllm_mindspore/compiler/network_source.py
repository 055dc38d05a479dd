"""Writes a network as nn.Cells: a class per kind of layer, a line per operator."""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import Node

from vllm_mindspore.compiler.capture import CapturedGraph, GraphInput
from vllm_mindspore.compiler.expressions import ExpressionWriter, is_own
from vllm_mindspore.compiler.legalize import value
from vllm_mindspore.compiler.segments import LAYER_INDEX, Segment, WeightNames


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
        while end > begin + 1 and leaving(nodes[begin:end]) != [nodes[end - 1]]:
            end -= 1
        end = max(end, begin + 1)
        runs.append(nodes[begin:end])
        begin = end
    return runs


def leaving(run: list[Node]) -> list[Node]:
    """The nodes of `run` whose results are used outside of it."""
    inside = set(run)
    return [node for node in run if any(user not in inside for user in node.users)]


class Block:
    """The body of one class: constructor lines, construct lines, and unique local names."""

    def __init__(self):
        self.init: list[str] = []
        self.body: list[str] = []
        self.counts: Counter = Counter()
        self.names: dict[Node, str] = {}

    def fresh(self, base: str) -> str:
        self.counts[base] += 1
        return base if self.counts[base] == 1 else f"{base}_{self.counts[base] - 1}"


class NetworkWriter:
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
        result = node.meta.get("val")
        if not isinstance(result, torch.Tensor):
            return ""
        sizes = ", ".join(self.symbols.get(str(size), str(size)) for size in result.shape)
        kind = "" if result.dtype == torch.float32 else f" {str(result.dtype).removeprefix('torch.')}"
        return f"  # [{sizes}]{kind}"

    def write(self, block: Block, node: Node) -> None:
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

    def write_all(self, block: Block, nodes: list[Node]) -> None:
        """Append nodes in order."""
        for run in sequences(nodes) if self.group else [[node] for node in nodes]:
            if len(run) == 1:
                self.write(block, run[0])
            else:
                self.write_sequence(block, run)

    def write_sequence(self, block: Block, run: list[Node]) -> None:
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
        layer, block = kind[0], Block()
        self._layer_weights(block, layer, layers)
        parameters = [self._parameter(block, node) for node in layer.external]
        self.write_all(block, layer.nodes)
        block.body.append("return " + ", ".join(block.names[node] for node in layer.results))
        indices = ", ".join(str(member.index) for member in kind)
        return class_source(name, f"Layers {indices}.", "weights, prefix", block, parameters)

    def _layer_weights(self, block: Block, layer: Segment, layers: list[Segment]) -> None:
        names = self._weight_names(layers)
        for weight in layer.weights:
            local, relative = names.local(weight, layer.index)
            attribute = block.fresh(identifier(local))
            key = f'prefix + "{local}"' if relative else f'"{local}"'
            block.init.append(f"self.{attribute} = weights[{key}]{self.comment(weight)}")
            block.names[weight] = f"self.{attribute}"

    def _parameter(self, block: Block, node: Node) -> str:
        item = self.inputs.get(node)
        if item is None:
            name = block.fresh("hidden_states" if isinstance(value(node), torch.Tensor) else "size")
        else:
            name = block.fresh(item.name if item.kind == "tensor" else item.kind)
        block.names[node] = name
        return name

    def network(self, before: list[Node], layers: list[Segment], after: list[Node]) -> str:
        """The source of the class `Network`."""
        block = Block()
        arguments = self._arguments(block)
        self._network_weights(block, [*before, *after])
        self.write_all(block, before)
        for layer in layers:
            self._layer_call(block, layer)
        self.write_all(block, after)
        block.body.append("return " + ", ".join(block.names[item] for item in self.captured.results))
        return class_source("Network", f"The {self.captured.name} graph.", "weights", block, arguments)

    def _arguments(self, block: Block) -> list[str]:
        """Names the inputs of a step."""
        for node, item in self.inputs.items():
            if item.kind not in ("weight", "constant"):
                name = item.name if item.kind == "tensor" else f"{item.kind}_{self._input_number(item)}"
                block.names[node] = block.fresh(name)
        return list(block.names.values())

    def _network_weights(self, block: Block, nodes: list[Node]) -> None:
        """Names the weights that `nodes` read, and those that are returned."""
        used = {operand for node in nodes for operand in node.all_input_nodes} | set(self.captured.results)
        for node in self.stored:
            if node in used:
                item = self.inputs[node]
                attribute = block.fresh(identifier(item.name))
                block.init.append(f'self.{attribute} = weights["{item.name}"]{self.comment(node)}')
                block.names[node] = f"self.{attribute}"

    def _input_number(self, item: GraphInput) -> str:
        """A KV cache is numbered by its layer, attention metadata by its KV cache group."""
        match = LAYER_INDEX.match(item.name)
        return match["index"] if match else item.name

    def _layer_call(self, block: Block, layer: Segment) -> None:
        attribute = f"layer_{layer.index}"
        block.init.append(f'self.{attribute} = {self.classes[layer.signature]}(weights, "{self._prefix(layer)}")')
        operands = ", ".join(block.names[node] for node in layer.external)
        names = []
        for node in layer.results:
            block.names[node] = block.fresh("hidden_states")
            names.append(block.names[node])
        comment = self.comment(layer.results[0]) if len(names) == 1 else ""
        block.body.append(f"{', '.join(names)} = self.{attribute}({operands}){comment}")

    def _prefix(self, layer: Segment) -> str:
        """Of the names of the layer's own weights."""
        own = (self.inputs[weight].name for weight in layer.weights if self._belongs(weight, layer))
        return next((LAYER_INDEX.match(name)["prefix"] for name in own), "")

    def _belongs(self, weight: Node, layer: Segment) -> bool:
        match = LAYER_INDEX.match(self.inputs[weight].name)
        return match is not None and int(match["index"]) == layer.index


def class_source(
    name: str, docstring: str, constructor: str, block: Block, parameters: list[str], cell: bool = True
) -> str:
    """A class of `block`'s lines: an nn.Cell, or (`cell` False) a plain class that is called."""
    indent = " " * 8
    base, initialize = ("(nn.Cell)", [f"{indent}super().__init__()"]) if cell else ("", [])
    lines = ["", "", f"class {name}{base}:", f'    """{docstring}"""', "", f"    def __init__(self, {constructor}):"]
    lines += [*initialize, *(indent + line for line in block.init or ([] if cell else ["pass"])), ""]
    call = "construct" if cell else "__call__"
    lines += [f"    def {call}(self, {', '.join(parameters)}):", *(indent + line for line in block.body)]
    return "\n".join(lines)
