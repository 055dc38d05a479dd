"""Finds the repeated decoder layers in a graph, so that each kind is emitted (and parsed by MindSpore) once.

A layer begins where the first weight or KV cache with its index is read; the first one's need not be 0. Two layers are
of one kind when their operators, attributes, wiring and weights' shapes and types are the same. What comes after the
last layer (final norm, output head, …) is left outside.
"""

import re
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from vllm_mindspore.compiler.capture import CapturedGraph, GraphInput

LAYER_INDEX = re.compile(r"^(?P<prefix>(?:.*?\.)?(?P<index>\d+)\.)(?P<suffix>.*)$")


@dataclass
class Segment:
    """Consecutive nodes of one layer.

    external: values from outside, in order of first use (weights excluded). weights: nodes of weights used here.
    results: nodes used after the segment. signature: equal for layers of one kind.
    """

    index: int
    nodes: list[Node]
    external: list[Node] = field(default_factory=list)
    weights: list[Node] = field(default_factory=list)
    results: list[Node] = field(default_factory=list)
    signature: tuple = ()


class WeightNames:
    """How a layer's class refers to its weights: by suffix when they are the layer's own, else by their full name."""

    def __init__(self, inputs: dict[Node, GraphInput], used_by: dict[Node, set[int]]):
        self.inputs, self.used_by = inputs, used_by

    def local(self, node: Node, layer: int) -> tuple[str, bool]:
        """(name, whether it is relative to the layer's prefix)."""
        name = self.inputs[node].name
        match = LAYER_INDEX.match(name)
        own = match is not None and int(match["index"]) == layer and len(self.used_by[node]) == 1
        return (match["suffix"], True) if own else (name, False)


def find_layers(
    captured: CapturedGraph, stored: dict[Node, torch.dtype]
) -> tuple[list[Node], list[Segment], list[Node]]:
    """(nodes before the first layer, layers, nodes after the last); no layers when nothing repeats."""
    inputs = captured.placeholders
    nodes = [node for node in captured.module.graph.nodes if node.op == "call_function"]
    first, starts = _starts(nodes, inputs)
    if len(starts) < 2:
        return nodes, [], []
    bounds = [*starts, len(nodes)]
    groups = [nodes[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]
    segments = _describe(groups, first, inputs, stored)
    tail: list[Node] = []
    known = {segment.signature for segment in segments[:-1]}
    if segments[-1].signature not in known:
        lengths = sorted({len(segment.nodes) for segment in segments[:-1]}, reverse=True)
        for length in [*lengths, _end_of_layer(groups[-1], first + len(groups) - 1, inputs)]:
            attempt = _describe([*groups[:-1], groups[-1][:length]], first, inputs, stored)
            tail = groups[-1][length:]
            if attempt[-1].signature in {segment.signature for segment in attempt[:-1]}:
                break
        segments = attempt
    return nodes[: starts[0]], segments, tail


def _starts(nodes: list[Node], inputs: dict[Node, GraphInput]) -> tuple[int, list[int]]:
    """The first layer's index, and for each layer the position of its first node."""
    layers = [_highest_layer(node, inputs) for node in nodes]
    first = min((layer for layer in layers if layer is not None), default=0)
    starts: list[int] = []
    for position, layer in enumerate(layers):
        if layer == first + len(starts):
            starts.append(position)
    return first, starts


def _highest_layer(node: Node, inputs: dict[Node, GraphInput]) -> int | None:
    """Of the layers whose weights or caches a node reads."""
    layers = [_layer_of(inputs[operand]) for operand in node.all_input_nodes if operand in inputs]
    return max((layer for layer in layers if layer is not None), default=None)


def _end_of_layer(nodes: list[Node], layer: int, inputs: dict[Node, GraphInput]) -> int:
    """How many of `nodes` come before the first that reads a weight of no layer, once the layer's own were read."""
    end = own = 0
    for position, node in enumerate(nodes):
        weights = [inputs[operand] for operand in node.all_input_nodes if operand in inputs]
        layers = [_layer_of(weight) for weight in weights if weight.kind == "weight"]
        if layer in layers:
            own, end = position, len(nodes)
        elif layers and end == len(nodes):
            end = position
    return max(end, own + 1)


def _layer_of(graph_input: GraphInput) -> int | None:
    if graph_input.kind not in ("weight", "kv_cache"):
        return None
    match = LAYER_INDEX.match(graph_input.name)
    return int(match["index"]) if match else None


def _describe(groups, first: int, inputs, stored) -> list[Segment]:
    segments = [Segment(index, nodes) for index, nodes in enumerate(groups, first)]
    used_by: dict[Node, set[int]] = {}
    for segment in segments:
        for node in segment.nodes:
            for operand in node.all_input_nodes:
                used_by.setdefault(operand, set()).add(segment.index)
    names = WeightNames(inputs, used_by)
    for segment in segments:
        _complete(segment, names, stored)
    return segments


def _complete(segment: Segment, names: WeightNames, stored: dict[Node, torch.dtype]) -> None:
    inside = {node: number for number, node in enumerate(segment.nodes)}
    references: dict[Node, tuple] = {}
    for node in segment.nodes:
        for operand in node.all_input_nodes:
            if operand in inside or operand in references:
                continue
            kind = names.inputs[operand].kind if operand in names.inputs else "tensor"
            if kind in ("weight", "constant"):
                segment.weights.append(operand)
                shape = tuple(operand.meta["val"].shape)
                references[operand] = ("weight", *names.local(operand, segment.index), shape, str(stored.get(operand)))
            else:
                references[operand] = ("external", len(segment.external))
                segment.external.append(operand)
        if any(user not in inside for user in node.users):
            segment.results.append(node)

    def reference(operand):
        return ("inside", inside[operand]) if operand in inside else references[operand]

    def freeze(item):
        if isinstance(item, Node):
            return reference(item)
        if isinstance(item, (list, tuple)):
            return tuple(freeze(entry) for entry in item)
        if isinstance(item, dict):
            return tuple((key, freeze(entry)) for key, entry in sorted(item.items()))
        return repr(item)

    segment.signature = (
        tuple((str(node.target), freeze(node.args), freeze(node.kwargs)) for node in segment.nodes),
        tuple(inside[node] for node in segment.results),
    )
