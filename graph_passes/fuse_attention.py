"""Rotary embedding, KV-cache write and attention as one operator that reads the merged q, k, v projection.

q, k, v = split(qkv)                          (views between the steps are looked through)
q, k = rms_norm(q), rms_norm(k)               each optional: per head, or over all heads
q, k = rotary(positions, q), rotary(…, k)     optional
kv_write(kv_cache, k, v, slot_mapping)
paged_attention(q, kv_cache, …)               →   qkv_attention(qkv, positions, …, kv_cache, …)
"""

import operator as python_operator
from dataclasses import dataclass

from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import (
    SPLITS,
    arguments,
    calls,
    is_call,
    operator,
    replace,
    same_rotary,
    through_views,
)


@dataclass
class _Branch:
    """Where q, k or v comes from: part `index` of `split`, normalized and rotated as told (None: not)."""

    split: Node
    index: int
    norm: dict[str, object] | None
    rotary: dict[str, object] | None


def run(graph: Graph) -> int:
    """Returns the number of attention layers fused."""
    return sum(_fuse(graph, attention) for attention in calls(graph, "paged_attention"))


def _fuse(graph: Graph, attention: Node) -> bool:
    values = arguments(attention)
    writes = [user for user in values["kv_cache"].users if is_call(user, operator("kv_write"))]
    if len(writes) != 1 or not writes[0] < attention:
        return False
    write = arguments(writes[0])
    branches = [_branch(values["query"]), _branch(write["key"]), _branch(write["value"])]
    if not _is_qkv(branches, values):
        return False
    q, k, _ = branches
    rotary, norm = q.rotary or {}, q.norm or k.norm or {}
    qkv = q.split.args[0]
    fused = {
        **values,
        "qkv": qkv,
        "positions": rotary.get("positions", write["slot_mapping"]),
        "cos_sin": rotary.get("cos_sin"),
        "q_norm": q.norm["weight"] if q.norm else None,
        "k_norm": k.norm["weight"] if k.norm else None,
        "slot_mapping": write["slot_mapping"],
        "rotary_dim": rotary.get("rotary_dim", 0),
        "neox": rotary.get("neox", True),
        "norm_eps": norm.get("eps", 0.0),
        "norm_offset": norm.get("offset", 0.0),
        "norm": _norm_kind(norm, values),
    }
    replace(graph, attention, "qkv_attention", fused)
    graph.erase_node(writes[0])
    return True


def _branch(node: object) -> _Branch | None:
    node, rotary, norm = through_views(node), None, None
    if is_call(node, operator("rotary")):
        rotary = arguments(node)
        node = through_views(rotary["x"])
    if is_call(node, operator("rms_norm")):
        norm = arguments(node)
        node = through_views(norm["x"])
    if not is_call(node, python_operator.getitem) or not is_call(node.args[0], *SPLITS):
        return None
    return _Branch(node.args[0], node.args[1], norm, rotary)


def _is_qkv(branches: list[_Branch | None], values: dict[str, object]) -> bool:
    """Whether the branches are parts 0, 1, 2 of one row [q | k | v], q and k rotated alike and v left as it is."""
    if any(branch is None for branch in branches):
        return False
    q, k, v = branches
    if not (q.split is k.split is v.split) or [branch.index for branch in branches] != [0, 1, 2]:
        return False
    row = q.split.args[0].meta["val"]
    parts = [part.shape[-1] for part in q.split.meta["val"]]
    head_size, kv_heads = values["head_size"], values["num_kv_heads"]
    value_size = values["kv_cache"].meta["val"].shape[-1] - head_size
    if row.dim() != 2 or parts != [values["num_heads"] * head_size, kv_heads * head_size, kv_heads * value_size]:
        return False
    return v.rotary is None and v.norm is None and same_rotary(q.rotary, k.rotary) and _norms_fit(q, k, values)


def _norms_fit(q: _Branch, k: _Branch, values: dict[str, object]) -> bool:
    """Whether what is normalized of q and k has a weight, and both are alike."""
    heads = [(branch.norm, num_heads) for branch, num_heads in ((q, "num_heads"), (k, "num_kv_heads")) if branch.norm]
    if any(norm["weight"] is None for norm, _ in heads):
        return False
    widths = [_norm_width(norm) for norm, _ in heads]
    per_head = [values["head_size"] for _ in heads]
    over_all = [values["head_size"] * values[num_heads] for _, num_heads in heads]
    alike = len({(norm["eps"], norm["offset"]) for norm, _ in heads}) <= 1
    return alike and widths in (per_head, over_all)


def _norm_width(norm: dict[str, object]) -> int:
    return norm["x"].meta["val"].shape[-1]


def _norm_kind(norm: dict[str, object], values: dict[str, object]) -> str:
    if not norm:
        return ""
    return "head" if _norm_width(norm) == values["head_size"] else "full"
