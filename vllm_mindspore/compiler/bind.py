"""Merges the attention inputs of layers that share a KV cache group, once vLLM has formed its groups."""

from dataclasses import dataclass

from vllm_mindspore.compiler.capture import CapturedGraph, GraphInput

ATTENTION = ("paged_attention", "qkv_attention")


@dataclass(frozen=True)
class KVGroup:
    """Layers with one block table, whose blocks hold `block_size` slots each."""

    layers: tuple[str, ...]
    block_size: int


def bind_kv_groups(captured: CapturedGraph, groups: list[KVGroup]) -> None:
    """Give all layers of a group the same `slot_mapping` and `block_table` input, and the group's block size.

    Afterwards the inputs of kind "slot_mapping" and "block_table" are named by the group's number.
    """
    number = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    kept: list[GraphInput] = []
    first = {}
    for node, graph_input in captured.placeholders.items():
        if graph_input.kind in ("slot_mapping", "block_table"):
            group = number[graph_input.name]
            if graph_input.kind == "block_table":
                _set_block_size(node, groups[group].block_size)
            merged = GraphInput(graph_input.kind, str(group))
            if merged in first:
                node.replace_all_uses_with(first[merged])
                captured.module.graph.erase_node(node)
                continue
            first[merged] = node
            graph_input = merged
        kept.append(graph_input)
    captured.inputs = kept


def _set_block_size(block_table, block_size: int) -> None:
    for user in list(block_table.users):
        names = [argument.name for argument in user.target._schema.arguments]
        user.update_arg(names.index("block_size"), block_size)
