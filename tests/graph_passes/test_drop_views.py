"""What attention reads comes without views of its heads, as far as it is rows."""

import pytest
import torch

from vllm_mindspore.graph_passes import drop_views
from vllm_mindspore.graph_passes.nodes import calls

from .graphs import captured, linear, operators, own, run

HEADS, KV_HEADS, HEAD = 4, 2, 8
SHAPES = dict(
    x=(7, 6), q=(HEADS * HEAD, 6), kv=(KV_HEADS * HEAD, 6), cache=(7, KV_HEADS, 2 * HEAD), slots=(7,), table=(7, 3),
    start=(7,), lens=(7,),
)  # fmt: skip


def model(prepare):
    """Attention of projections that `prepare` makes heads of."""

    def attention(x, q, kv, cache, slots, *step):
        key, value = (prepare(linear(x, kv), KV_HEADS) for _ in range(2))
        own.kv_write(cache, key, value, slots)
        sizes = (HEADS, KV_HEADS, HEAD, 0.3, 16, 0, 0.0)
        return own.paged_attention(prepare(linear(x, q), HEADS), cache, *step, None, None, None, *sizes)

    return attention


def test_views_of_heads_disappear():
    matches, found, graph = run(drop_views, model(lambda y, heads: y.view(-1, heads, HEAD)), **SHAPES)
    assert matches == 3 and "aten.reshape.default" not in found
    (write,), (attend,) = calls(graph, "kv_write"), calls(graph, "paged_attention")
    assert [node.meta["val"].dim() for node in (*write.args[1:3], attend.args[0])] == [2, 2, 2]


@pytest.mark.parametrize(
    "prepare",
    [
        lambda y, heads: y,
        lambda y, heads: y.view(-1, HEAD, heads).transpose(1, 2),
        lambda y, heads: own.rms_norm(y.view(-1, heads, HEAD), None, 1e-6, 0.0),
        lambda y, heads: torch.cat((y, y), 1).view(-1, heads, HEAD),
    ],
    ids=["no views", "transposed", "heads that something else needs", "another number of rows"],
)
def test_others_stay(prepare):
    before = operators(captured(model(prepare), **SHAPES).module.graph)
    matches, after, _ = run(drop_views, model(prepare), **SHAPES)
    assert (matches, after) == (0, before)
