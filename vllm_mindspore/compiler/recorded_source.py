"""Writes a network whose layers are recorded into one operator.

MindSpore's runtime costs more per operator than a small one takes, so a step on CPU is few of them. The source reads
like `network_source`'s, with a class per kind of layer.
"""

from dataclasses import dataclass

from torch.fx import Node

from vllm_mindspore.compiler.capture import CapturedGraph
from vllm_mindspore.compiler.expressions import is_own
from vllm_mindspore.compiler.legalize import value
from vllm_mindspore.compiler.network_source import Block, NetworkWriter, OwnCall, class_source, leaving
from vllm_mindspore.compiler.segments import Segment


@dataclass(frozen=True)
class Recorded:
    """What is recorded into one operator, `nodes`: `first`, all layers, `last`; and what that operator returns."""

    first: list[Node]
    last: list[Node]
    nodes: list[Node]
    results: list[Node]


def recorded_part(before: list[Node], layers: list[Segment], after: list[Node], results: list[Node]) -> Recorded | None:
    """The last nodes of `before` and the first of `after` that can be recorded together with all layers.

    Of what is recorded only the last result may be used elsewhere, unless it gives all `results` of the graph. None
    when nothing can be, or when layers contain anything but operators of ours.
    """
    inside = [node for layer in layers for node in layer.nodes]
    if not all(map(is_own, inside)):
        return None
    begin, end = len(before), 0
    while begin > 0 and is_own(before[begin - 1]):
        begin -= 1
    while end < len(after) and is_own(after[end]):
        end += 1
    for last in range(end, -1, -1):
        part = [*before[begin:], *inside, *after[:last]]
        if part and leaving(part) == part[-1:]:
            return Recorded(before[begin:], after[:last], part, part[-1:])
        if part and last == len(after) and set(leaving(part)) == set(results):
            return Recorded(before[begin:], after, part, list(results))
    return None


class RecordedWriter(NetworkWriter):
    """A network of one recorded operator and what comes before and after it."""

    def __init__(self, captured: CapturedGraph, stored: dict, recorded: Recorded):
        """recorded: from `recorded_part`."""
        super().__init__(captured, stored, group=True)
        self.recorded = recorded

    def record(self, names: dict[Node, str], node: Node, result: str) -> str:
        """The line that records one operator."""
        call = OwnCall.of(node)
        operands = "".join(f", {'None' if item is None else names[item]}" for item in call.tensors)
        settings = "".join(f", {name}={item!r}" for name, item in call.attributes.items())
        return f'{result} = run("{call.operator}"{operands}{settings}){self.comment(node)}'

    def _layer_class(self, name: str, kind: list[Segment], layers: list[Segment]) -> str:
        layer, block = kind[0], Block()
        self._layer_weights(block, layer, layers)
        parameters = [self._parameter(block, node) for node in layer.external]
        for node in layer.nodes:
            block.names[node] = block.fresh(f"{OwnCall.of(node).operator}_out")
            block.body.append(self.record(block.names, node, block.names[node]))
        block.body.append("return " + ", ".join(block.names[node] for node in layer.results))
        indices = ", ".join(str(member.index) for member in kind)
        return class_source(name, f"Layers {indices}.", "weights, prefix", block, ["run", *parameters], cell=False)

    def network(self, before: list[Node], layers: list[Segment], after: list[Node]) -> str:
        """The source of the class `Network`."""
        block, recorded = Block(), Block()
        arguments = self._arguments(block)
        first, last, results = self.recorded.first, self.recorded.last, self.recorded.results
        before, after = before[: len(before) - len(first)], after[len(last) :]
        self._network_weights(block, [*before, *after])
        self.write_all(block, before)
        inputs = self._recorded_inputs()
        recorded.names = {node: f'"{block.names[node]}"' for node in inputs}
        block.init.append("run = Recorder()")
        for node in self.stored:
            recorded.names[node] = f'weights["{self.inputs[node].name}"]'
        for node in first:
            self._record_here(block, recorded, node)
        for layer in layers:
            self._layer_call(block, recorded, layer)
        for node in last:
            self._record_here(block, recorded, node)
        names = [block.names[node] for node in inputs]
        operators, weights = block.fresh("operators"), block.fresh("weights")
        returned = "".join(f", {recorded.names[node]}" for node in results)
        block.init.append(f"self.{operators}, self.{weights} = run.primitive({names!r}{returned})")
        call = f"self.{operators}({', '.join([*names, f'*self.{weights}'])})"
        if len(results) > 1:
            block.body.append(f"return {call}{''.join(map(self.comment, results))}")
        else:
            block.names[results[0]] = block.fresh(recorded.names[results[0]])
            block.body.append(f"{block.names[results[0]]} = {call}{self.comment(results[0])}")
            self.write_all(block, after)
            block.body.append("return " + ", ".join(block.names[item] for item in self.captured.results))
        return class_source("Network", f"The {self.captured.name} graph.", "weights", block, arguments)

    def _recorded_inputs(self) -> list[Node]:
        inside, found = set(self.recorded.nodes), {}
        for node in self.recorded.nodes:
            for operand in node.all_input_nodes:
                if operand not in inside and operand not in self.stored:
                    found[operand] = None
        return list(found)

    def _record_here(self, block: Block, recorded: Block, node: Node) -> None:
        recorded.names[node] = recorded.fresh(f"{OwnCall.of(node).operator}_out")
        block.init.append(self.record(recorded.names, node, recorded.names[node]))

    def _layer_call(self, block: Block, recorded: Block, layer: Segment) -> None:
        operands = "".join(f", {recorded.names[node]}" for node in layer.external)
        results = []
        for node in layer.results:
            is_hidden = value(node).dim() > 1
            recorded.names[node] = recorded.fresh("hidden_states" if is_hidden else f"{OwnCall.of(node).operator}_out")
            results.append(recorded.names[node])
        kind = f'{self.classes[layer.signature]}(weights, "{self._prefix(layer)}")'
        comment = self.comment(layer.results[0]) if len(results) == 1 else ""
        block.init.append(f"{', '.join(results)} = {kind}(run{operands}){comment}")
