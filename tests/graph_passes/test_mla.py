"""fuse_mla: latent attention as vLLM's wrapper writes it becomes one operator; anything else stays."""

import pytest

from tests.graph_passes.graphs import captured, linear, operators, own
from vllm_mindspore.graph_passes import drop_noops, fuse_mla, merge_duplicates, take_columns
from vllm_mindspore.graph_passes.nodes import arguments, calls

HEADS, NOPE, ROPE, V, LORA, QUERY_LATENT = 4, 6, 4, 5, 16, 12
SHAPES = dict(
    x=(7, 32), positions=(7,), w_a=(QUERY_LATENT + LORA + ROPE, 32), w_q=(HEADS * (NOPE + ROPE), QUERY_LATENT),
    g=(LORA,), cos_sin=(99, ROPE), kv_b=(HEADS * (NOPE + V), LORA), cache=(7, 1, LORA + ROPE), slots=(7,),
    table=(7, 3), start=(7,), lens=(7,),
)  # fmt: skip


def layer(x, positions, w_a, w_q, g, cos_sin, kv_b, cache, slots, table, start, lens, *, norm=True, rotate_query=True,
          rotate_key=True, first=NOPE, key_first=False):  # fmt: skip
    """The attention of a DeepSeek layer; the options make it something else."""
    q_c, kv = linear(x, w_a).split([QUERY_LATENT, LORA + ROPE], -1)
    if key_first:
        k_pe, kv_c = kv.split([ROPE, LORA], -1)
    else:
        kv_c, k_pe = kv.split([LORA, ROPE], -1)
    q = linear(q_c, w_q).view(-1, HEADS, NOPE + ROPE)
    k_pe = k_pe.unsqueeze(1)
    if norm:
        kv_c = own.rms_norm(kv_c, g, 1e-6, 1.0)
    if rotate_query:
        q[..., first : first + ROPE] = own.rotary(positions, q[..., first : first + ROPE], cos_sin, ROPE, ROPE, False)
    if rotate_key:
        k_pe = own.rotary(positions, k_pe, cos_sin, ROPE, ROPE, False)
    own.mla_kv_write(cache, kv_c, k_pe, slots)
    return own.mla_attention(q, kv_b, cache, table, start, lens, None, HEADS, NOPE, ROPE, V, LORA, 0.3, 16)


def fuse(function):
    """(matches, operators afterwards, graph) after what stands before the pass in the pipeline."""
    graph = captured(function, **SHAPES).module.graph
    for earlier in (drop_noops, merge_duplicates):
        earlier.run(graph)
        graph.eliminate_dead_code()
    matches = fuse_mla.run(graph)
    graph.eliminate_dead_code()
    take_columns.run(graph)  # the latent of the queries, cut out of the same projection
    graph.eliminate_dead_code()
    graph.lint()
    return matches, operators(graph), graph


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
def test_norm_rotary_kv_write_and_attention_become_one_operator(norm, rotated):
    function = lambda *tensors: layer(*tensors, norm=norm, rotate_query=rotated, rotate_key=rotated)  # noqa: E731
    matches, left, graph = fuse(function)
    assert matches == 1
    assert left == {"vllm_ms.linear.default": 2, "vllm_ms.columns.default": 1, "vllm_ms.mla_qkv_attention.default": 1}
    (fused,), (columns,) = calls(graph, "mla_qkv_attention"), calls(graph, "columns")
    values = arguments(fused)
    expected = dict(kv_column=QUERY_LATENT, neox=not rotated, norm_eps=1e-6 * norm, norm_offset=1.0 * norm, scale=0.3)
    assert {name: values[name] for name in expected} == expected
    assert (values["kv_norm"] is not None, values["cos_sin"] is not None) == (norm, rotated)
    assert arguments(columns) == {"x": values["kv_a"], "begin": 0, "end": QUERY_LATENT, "parts": 1}


def test_a_projection_of_its_own_is_read_from_its_first_column():
    def function(x, positions, w_a, w_q, g, cos_sin, *rest):
        kv_c, k_pe = linear(x, w_a[QUERY_LATENT:]).split([LORA, ROPE], -1)
        own.mla_kv_write(rest[1], kv_c, k_pe, rest[2])
        q = linear(x[:, :QUERY_LATENT], w_q).view(-1, HEADS, NOPE + ROPE)
        return own.mla_attention(q, rest[0], rest[1], *rest[3:], None, HEADS, NOPE, ROPE, V, LORA, 0.3, 16)

    matches, left, graph = fuse(function)
    assert matches == 1
    assert "vllm_ms.columns.default" not in left
    assert arguments(calls(graph, "mla_qkv_attention")[0])["kv_column"] == 0


@pytest.mark.parametrize(
    "options",
    [{"rotate_key": False}, {"rotate_query": False}, {"first": 1}, {"key_first": True}],
    ids=["key not rotated", "queries not rotated", "another part rotated", "key part before the latent"],
)
def test_attention_of_another_form_stays_as_it_is(options):
    matches, left, _ = fuse(lambda *tensors: layer(*tensors, **options))
    assert matches == 0
    assert left["vllm_ms.mla_attention.default"] == left["vllm_ms.mla_kv_write.default"] == 1


def test_a_second_reader_of_the_written_latent_keeps_it():
    def function(*tensors):
        x, w_a = tensors[0], tensors[2]
        return layer(*tensors), linear(x, w_a)[:, QUERY_LATENT : QUERY_LATENT + LORA]

    matches, left, _ = fuse(function)
    assert matches == 1
    assert left["vllm_ms.columns.default"] == 2
