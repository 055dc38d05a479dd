"""FX graph → the source of a MindSpore network a person can read, run in PyNative, or paste into a notebook."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import Node

from vllm_mindspore.compiler import arrangement
from vllm_mindspore.compiler.capture import CapturedGraph, GraphInput
from vllm_mindspore.compiler.expressions import require_mapped
from vllm_mindspore.compiler.legalize import operator_name, value
from vllm_mindspore.compiler.network_source import NetworkWriter
from vllm_mindspore.compiler.recorded_source import RecordedWriter, recorded_part
from vllm_mindspore.compiler.segments import find_layers

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
    "cpu": "from vllm_mindspore.ops.cpu import Recorder, sequence\nfrom vllm_mindspore.ops.registry import build\n",
}


@dataclass(frozen=True)
class EmittedGraph:
    """A network's source and what to feed it.

    weights: parameter and constant names the constructor reads. inputs: arguments of `construct`, in order.
    outputs: the shape of each result, None for a size that varies. packed: they are one vector, one after the other.
    columns: groups of weights that can be in columns, each as a whole.
    """

    name: str
    source: str
    weights: tuple[GraphInput, ...]
    inputs: tuple[GraphInput, ...]
    outputs: tuple[tuple[int | None, ...], ...]
    packed: bool
    columns: arrangement.Groups
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
    recorded = recorded_part(before, layers, after, captured.results) if device == "cpu" else None
    if recorded is None:
        writer = NetworkWriter(captured, stored_nodes, group=device == "cpu")
    else:
        writer = RecordedWriter(captured, stored_nodes, recorded)
    classes = writer.layer_classes(layers)
    body = writer.network(before, layers, after)
    source = "\n".join([HEADER.format(title=title, device=device, imports=IMPORTS[device]), *classes, body])
    step_inputs = tuple(item for item in inputs.values() if item.kind not in ("weight", "constant"))
    weights = tuple(item for item in inputs.values() if item.kind in ("weight", "constant"))
    operators = Counter(
        operator_name(node.target) for node in [*before, *after, *(n for layer in layers for n in layer.nodes)]
    )
    outputs = tuple(_known_shape(node) for node in captured.results)
    packed = recorded is not None and len(recorded.results) > 1
    # recorded operators have the weights' addresses, and need not know MindSpore's types
    columns = () if recorded is None else arrangement.readable(recorded.nodes, inputs, stored_nodes)
    return EmittedGraph(
        captured.name, source, weights, step_inputs, outputs, packed, columns, len(classes), dict(operators)
    )


def _known_shape(node: Node) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in value(node).shape)


def _use_unknown_sizes(captured: CapturedGraph) -> None:
    """In a view whose only unknown size is computed, write -1 for it: the size then needs no input of its own."""
    for node in captured.module.graph.nodes:
        if node.target is torch.ops.aten.reshape.default:
            shape = node.args[1]
            unknown = [position for position, size in enumerate(shape) if not isinstance(size, int) or size == -1]
            if len(unknown) == 1:
                node.update_arg(1, [-1 if position in unknown else size for position, size in enumerate(shape)])
    captured.module.graph.eliminate_dead_code()
