"""Embedding: rows of a table by index."""

from __future__ import annotations

from vllm_mindspore.ops import columns
from vllm_mindspore.ops.fakes import like_input
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell


def _fake(ids, weight, first=0):
    return like_input(weight, (*ids.shape, weight.shape[1]))


def _columns(shapes, attributes):
    return {"weight"} if columns.fits(shapes["weight"]) else set()


OPERATORS = [
    Operator(
        # ids [T] int32 or int64, weight [V, H]; [T, H] f32, zeros where an id is not in [0, V)
        name="embedding",
        schema=Schema.parse("(Tensor ids, Tensor weight) -> Tensor"),
        fake=_fake,
        cpu="Embedding",
        ascend=ascend_cell("Embedding"),
        columns=_columns,
    ),
    Operator(
        # weight: rows first, first + 1, ... of a table that several ranks share; zeros where an id is in none of them
        name="embedding_shard",
        schema=Schema.parse("(Tensor ids, Tensor weight, int first) -> Tensor"),
        fake=_fake,
        cpu="EmbeddingShard",
        ascend=ascend_cell("Embedding"),
        columns=_columns,
    ),
]
