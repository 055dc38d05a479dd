"""Which weights of a model are put into columns (`ops/columns.py`): those that every reader in every graph reads so."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch.fx import Node

from vllm_mindspore.compiler.capture import GraphInput
from vllm_mindspore.compiler.legalize import value
from vllm_mindspore.compiler.network_source import OwnCall
from vllm_mindspore.ops import columns
from vllm_mindspore.ops.registry import OPERATORS

Groups = tuple[tuple[str, ...], ...]


def readable(nodes: list[Node], inputs: dict[Node, GraphInput], stored: dict[Node, torch.dtype]) -> Groups:
    """Weights that only `nodes`, calls of our operators, read, and all of them can in columns; each with those that an
    operator can only read so together with it."""
    inside = set(nodes)
    groups: set[tuple[str, ...]] = set()
    blocked = {inputs[weight].name for weight in stored if not inside.issuperset(weight.users)}
    for node in nodes:
        weights = {operand for operand in node.all_input_nodes if operand in stored}
        together = _read_in_columns(node) & weights
        if any(inputs[weight].kind != "weight" or stored[weight] != torch.bfloat16 for weight in together):
            together = set()
        blocked |= {inputs[weight].name for weight in weights - together}
        if together:
            groups.add(tuple(sorted(inputs[weight].name for weight in together)))
    return _without(groups, blocked)


def chosen(graphs: Iterable[tuple[Groups, Iterable[str]]]) -> Groups:
    """The weights to put into columns. graphs: of each, what `readable` gave and the names of all its weights."""
    graphs = [(groups, set(names)) for groups, names in graphs]
    blocked = {name for groups, names in graphs for name in names - {one for group in groups for one in group}}
    return _without({group for groups, _ in graphs for group in groups}, blocked)


def arrange(groups: Groups, weights: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Put those weights into columns that are alone in their memory, and code those groups where that pays.

    groups: from `chosen`. weights: all tensors of the model by name. Returns what is in columns, and whether it is
    coded.
    """
    if not columns.supported():
        return {}
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in weights.values())
    shared = {name for name, tensor in weights.items() if not _is_alone(tensor, owners)}
    arranged: dict[str, bool] = {}
    for group in _joined(_without(set(groups), shared)):
        tensors = [weights[name].detach() for name in group]
        for tensor in tensors:
            columns.arrange(tensor)
        coded = [tensor for tensor in tensors if columns.encode(tensor)]
        if len(coded) < len(tensors):
            for tensor in coded:
                columns.decode(tensor)
        arranged.update(dict.fromkeys(group, len(coded) == len(tensors)))
    return arranged


def to_rows(arranged: dict[str, bool], weights: dict[str, torch.Tensor]) -> None:
    """Undo `arrange`."""
    for name, coded in arranged.items():
        tensor = weights[name].detach()
        if coded:
            columns.decode(tensor)
        columns.arrange(tensor, back=True)


def _is_alone(tensor: torch.Tensor, owners: Counter) -> bool:
    storage = tensor.untyped_storage()
    return tensor.is_contiguous() and tensor.nbytes == storage.nbytes() and owners[storage.data_ptr()] == 1


def _joined(groups: Groups) -> list[set[str]]:
    """Groups that have members in common as one."""
    joined: list[set[str]] = []
    for group in groups:
        touching = [other for other in joined if other.intersection(group)]
        joined = [other for other in joined if other not in touching] + [set(group).union(*touching)]
    return joined


def _read_in_columns(node: Node) -> set[Node]:
    call = OwnCall.of(node)
    operator = OPERATORS[call.operator]
    if operator.columns is None:
        return set()
    tensors = {item.name: tensor for item, tensor in zip(operator.schema.tensors, call.tensors, strict=True) if tensor}
    shapes = {name: tuple(value(tensor).shape) for name, tensor in tensors.items()}
    return {tensors[name] for name in operator.columns(shapes, call.attributes)}


def _without(groups: set[tuple[str, ...]], blocked: set[str]) -> Groups:
    """The groups of which no member is blocked; the members of a group that is left out are."""
    left = set(groups)
    while out := {group for group in left if blocked.intersection(group)}:
        left -= out
        blocked = blocked.union(*out)
    return tuple(sorted(left))
