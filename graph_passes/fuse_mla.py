"""Multi-head latent attention: norm, rotary, KV-cache write and attention as one operator that reads two projections.

q = reshape(q_proj, [T, heads, nope + rope])
q[..., nope:] = rotary(positions, q[..., nope:])       optional (functionalized: slice, rotary, slice_scatter)
kv_c, k_pe = split(kv_a, [kv_lora_rank, rope])          kv_a: a projection, or a part of one
kv_c, k_pe = rms_norm(kv_c), rotary(positions, k_pe)   optional
mla_kv_write(kv_cache, kv_c, k_pe, slot_mapping)
mla_attention(q, kv_b, kv_cache, …)      →   mla_qkv_attention(q_proj, kv_a, positions, …, kv_column=…)
"""

import sys
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import (
    RESHAPE,
    arguments,
    calls,
    cut,
    is_call,
    operator,
    replace,
    same_rotary,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class _Columns:
    """Columns [begin, end) of a [T, N] tensor."""

    source: Node
    begin: int
    end: int


def run(graph: Graph) -> int:
    """Returns the number of attention layers fused."""
    return sum(_fuse(graph, attention) for attention in calls(graph, "mla_attention"))


def _fuse(graph: Graph, attention: Node) -> bool:
    values = arguments(attention)
    writes = [user for user in values["kv_cache"].users if is_call(user, operator("mla_kv_write"))]
    if len(writes) != 1 or not writes[0] < attention:
        return False
    write = arguments(writes[0])
    query, query_rotary = _query(values)
    latent, norm = _through(write["kv_c"], "rms_norm")
    key, key_rotary = _through(write["k_pe"], "rotary")
    latent, key = _columns(latent), _columns(key)
    if query is None or latent is None or key is None or not same_rotary(query_rotary, key_rotary):
        return False
    if latent.source is not key.source or latent.end != key.begin or not _sizes_fit(values, latent, key, query_rotary):
        return False
    rotary, norm = query_rotary or {}, norm or {}
    fused = {
        **values,
        "query": query,
        "kv_a": latent.source,
        "positions": rotary.get("positions", write["slot_mapping"]),
        "cos_sin": rotary.get("cos_sin"),
        "kv_norm": norm.get("weight"),
        "slot_mapping": write["slot_mapping"],
        "kv_column": latent.begin,
        "neox": rotary.get("neox", True),
        "norm_eps": norm.get("eps", 0.0),
        "norm_offset": norm.get("offset", 0.0),
    }
    replace(graph, attention, "mla_qkv_attention", fused)
    graph.erase_node(writes[0])
    return True


def _through_views(node: object) -> object:
    while is_call(node, RESHAPE, aten.unsqueeze.default):
        node = node.args[0]
    return node


def _through(node: object, name: str) -> tuple[object, dict[str, object] | None]:
    """What our operator `name` is applied to, and its arguments; the node itself and None if it is another."""
    node = _through_views(node)
    if not is_call(node, operator(name)):
        return node, None
    values = arguments(node)
    if name == "rms_norm" and values["weight"] is None:
        return node, None
    return _through_views(values["x"]), values


def _query(values: dict[str, object]) -> tuple[Node | None, dict[str, object] | None]:
    """The [T, heads * (nope + rope)] projection of the queries, and the rotation of their last parts."""
    node, rotary = values["query"], None
    if is_call(node, aten.slice_scatter.default):
        heads, rotated = node.args[:2]
        rotated = _through_views(rotated)
        if not is_call(rotated, operator("rotary")) or not _is_last_part(node.args[2:], heads, values):
            return None, None
        rotary = arguments(rotated)
        part = _through_views(rotary["x"])
        if not is_call(part, aten.slice.Tensor) or part.args[0] is not heads:
            return None, None
        if not _is_last_part(part.args[1:], heads, values):
            return None, None
        node = heads
    node = _through_views(node)
    width = values["num_heads"] * (values["nope_dim"] + values["rope_dim"])
    fits = isinstance(node, Node) and node.meta["val"].dim() == 2 and node.meta["val"].shape[1] == width
    return (node, rotary) if fits else (None, None)


def _is_last_part(where: tuple, heads: Node, values: dict[str, object]) -> bool:
    """Whether (dim, start, end, step) is [..., nope:] of [T, heads, nope + rope]."""
    dim, start, end, step = (*where, *(0, None, None, 1)[len(where) :])
    size = values["nope_dim"] + values["rope_dim"]
    end = size if end is None or end == sys.maxsize else end
    return heads.meta["val"].dim() == 3 and dim in (2, -1) and (start, end, step) == (values["nope_dim"], size, 1)


def _columns(node: object) -> _Columns | None:
    """`node` as columns of the projection that it is a part of, through splits of splits."""
    if not isinstance(node, Node) or node.meta["val"].dim() != 2 or not isinstance(node.meta["val"].shape[1], int):
        return None
    begin, width = 0, node.meta["val"].shape[1]
    while (part := cut(node)) is not None and part.tensor.meta["val"].dim() == 2 and part.dim == 1:
        begin += part.begin
        node = part.tensor
    return _Columns(node, begin, begin + width)


def _sizes_fit(values: dict[str, object], latent: _Columns, key: _Columns, rotary: dict | None) -> bool:
    rope = values["rope_dim"]
    whole = rotary is None or rotary["head_size"] == rotary["rotary_dim"] == rope
    return whole and (latent.end - latent.begin, key.end - key.begin) == (values["kv_lora_rank"], rope)
