"""Each pass rewrites what its docstring shows, counts it, and leaves what only looks like it."""

import pytest
import torch

from vllm_mindspore.graph_passes import (
    PASSES,
    PassManager,
    drop_noops,
    fuse_activation,
    fuse_attention,
    fuse_bias,
    fuse_norm,
    fuse_residual,
    merge_duplicates,
)
from vllm_mindspore.graph_passes.manager import UnknownPassError
from vllm_mindspore.graph_passes.nodes import arguments, calls

from .graphs import captured, linear, own, run


def test_views_of_views_and_neutral_arithmetic_disappear():
    matches, left, _ = run(drop_noops, lambda x: (x.view(-1, 2, 3).view(-1, 6) * 1.0 + 0)[0:], x=(7, 6))
    assert left == {}
    assert matches >= 4


def test_a_transpose_and_its_inverse_disappear():
    function = lambda x: x.view(-1, 2, 3).transpose(1, 2).transpose(-1, -2)  # noqa: E731
    assert run(drop_noops, function, x=(7, 6))[1] == {"aten.reshape.default": 1}


def test_two_different_transposes_stay():
    function = lambda x: x.view(-1, 2, 3).transpose(1, 2).transpose(0, 1)  # noqa: E731
    assert run(drop_noops, function, x=(7, 6))[1]["aten.transpose.int"] == 2


def test_arithmetic_that_changes_the_type_stays():
    _, left, _ = run(drop_noops, lambda x: (x > 0).to(torch.int64) * 1.0, x=(7, 6))
    assert left["aten.mul.Tensor"] == 1


def test_a_slice_of_what_was_just_written_is_what_was_written():
    def scale_in_place(x):
        row = x[..., :5]
        row *= 0.5
        return row

    _, left, _ = run(drop_noops, scale_in_place, x=(7, 6))
    assert left == {"aten.slice.Tensor": 1, "aten.mul.Tensor": 1}


def test_a_slice_of_another_part_stays():
    _, left, _ = run(drop_noops, lambda x: torch.slice_scatter(x, x[:, :2], 1, 0, 2)[:, 1:3], x=(7, 6))
    assert left["aten.slice_scatter.default"] == 1


def test_equal_nodes_are_merged_and_different_constants_are_not():
    matches, left, _ = run(merge_duplicates, lambda x: (x.cos(), x.cos(), x + 1, x + 1.0), x=(7, 6))
    assert matches == 1
    assert left == {"aten.cos.default": 1, "aten.add.Tensor": 2}


def test_a_bias_the_model_adds_itself_is_folded():
    matches, left, graph = run(fuse_bias, lambda x, w, b: linear(x, w) + b, x=(7, 6), w=(4, 6), b=(4,))
    assert matches == 1
    assert left == {"vllm_ms.linear.default": 1}
    assert arguments(calls(graph, "linear")[0])["bias"].op == "placeholder"


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: linear(x, w, activation="relu") + b,
        lambda x, w, b: linear(x, w, bias=b) + b,
        lambda x, w, b: (y := linear(x, w)) + b + y,
        lambda x, w, b: linear(x, w) - b,
    ],
    ids=["after an activation", "second bias", "linear used twice", "subtraction"],
)
def test_other_additions_are_not_taken_for_a_bias(function):
    assert run(fuse_bias, function, x=(7, 6), w=(4, 6), b=(4,))[0] == 0


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh", "relu"])
def test_an_activation_moves_into_the_linear_before_it(name):
    matches, left, graph = run(fuse_activation, lambda x, w: own.activation(linear(x, w), name), x=(7, 6), w=(4, 6))
    assert matches == 1
    assert left == {"vllm_ms.linear.default": 1}
    (fused,) = calls(graph, "linear")
    assert arguments(fused)["activation"] == name
    assert fused.meta["val"].shape[1] == (2 if name.endswith("_and_mul") else 4)


def test_an_activation_after_a_residual_stays():
    function = lambda x, w, r: own.activation(linear(x, w, residual=r), "relu")  # noqa: E731
    assert run(fuse_activation, function, x=(7, 6), w=(4, 6), r=(7, 4))[0] == 0


def test_the_residual_is_added_by_the_linear_whichever_side_it_is_on():
    for function in (lambda x, w, r: linear(x, w) + r, lambda x, w, r: r + linear(x, w)):
        matches, left, graph = run(fuse_residual, function, x=(7, 6), w=(4, 6), r=(7, 4))
        assert matches == 1
        assert left == {"vllm_ms.linear.default": 1}
        assert arguments(calls(graph, "linear")[0])["residual"].name.startswith("arg2")


def test_a_broadcast_addition_is_no_residual():
    assert run(fuse_residual, lambda x, w, b: linear(x, w) + b, x=(7, 6), w=(4, 6), b=(4,))[0] == 0


def test_norms_move_into_every_linear_that_reads_them():
    def parallel(x, g, w):
        y = own.rms_norm(x, g, 1e-6, 1.0)
        return linear(y, w), linear(y, w, activation="relu")

    matches, left, graph = run(fuse_norm, parallel, x=(7, 6), g=(6,), w=(4, 6))
    assert matches == 1
    assert left == {"vllm_ms.linear.default": 2}
    settings = [(arguments(node)["norm"], arguments(node)["norm_offset"]) for node in calls(graph, "linear")]
    assert settings == [("rms", 1.0), ("rms", 1.0)]


def test_a_layer_norm_takes_its_bias_along():
    function = lambda x, g, b, w: linear(own.layer_norm(x, g, b, 1e-5), w)  # noqa: E731
    matches, _, graph = run(fuse_norm, function, x=(7, 6), g=(6,), b=(6,), w=(4, 6))
    (fused,) = calls(graph, "linear")
    assert matches == 1
    assert arguments(fused)["norm"] == "layer"
    assert arguments(fused)["norm_bias"] is not None


@pytest.mark.parametrize(
    "function",
    [
        lambda x, g, w: (y := own.rms_norm(x, g, 1e-6, 0.0)) + linear(y, w),
        lambda x, g, w: linear(x, w, residual=own.rms_norm(x, g, 1e-6, 0.0)),
        lambda x, g, w: own.rms_norm(x, g, 1e-6, 0.0),
    ],
    ids=["another user", "norm is the residual", "no linear"],
)
def test_a_norm_with_another_use_stays(function):
    assert run(fuse_norm, function, x=(7, 6), g=(6,), w=(6, 6))[0] == 0


HEADS, KV_HEADS, HEAD = 4, 2, 8


def attention(qkv, positions, cos_sin, g, cache, slots, table, start, lens, sink_kv=None, *, norm=("q", "k"),
              rotate_key=True, split=None, key_eps=1e-6):  # fmt: skip
    """The attention of a decoder layer as vLLM's models write it."""
    q, k, v = qkv.split(split or [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], -1)
    if "q" in norm:
        q = own.rms_norm(q.view(-1, HEADS, HEAD), g, 1e-6, 0.0).view(-1, HEADS * HEAD)
    if "k" in norm:
        k = own.rms_norm(k.view(-1, KV_HEADS, HEAD), g, key_eps, 0.0).view(-1, KV_HEADS * HEAD)
    q = own.rotary(positions, q, cos_sin, HEAD, HEAD, True)
    if rotate_key:
        k = own.rotary(positions, k, cos_sin, HEAD, HEAD, True)
    own.kv_write(cache, k.view(-1, KV_HEADS, HEAD), v.view(-1, KV_HEADS, HEAD), slots)
    sizes = (HEADS, KV_HEADS, HEAD, 0.3, 16, 5 if sink_kv is None else 0, 2.0)
    return own.paged_attention(q.view(-1, HEADS, HEAD), cache, table, start, lens, None, None, sink_kv, *sizes)


ATTENTION_SHAPES = dict(
    qkv=(7, 64), positions=(7,), cos_sin=(99, HEAD), g=(HEAD,), cache=(7, KV_HEADS, 2 * HEAD), slots=(7,), table=(7, 3),
    start=(7,), lens=(7,),
)  # fmt: skip


@pytest.mark.parametrize("norm", ["qk", "q", "k", ""])
def test_rotary_kv_write_and_attention_become_one_operator(norm):
    function = lambda *tensors: attention(*tensors, norm=norm)  # noqa: E731
    matches, left, graph = run(fuse_attention, function, **ATTENTION_SHAPES)
    assert matches == 1
    assert left == {"vllm_ms.qkv_attention.default": 1}
    values = arguments(calls(graph, "qkv_attention")[0])
    expected = dict(norm="head" if norm else "", rotary_dim=HEAD, neox=True, sliding_window=5, soft_cap=2.0, scale=0.3)
    assert {name: values[name] for name in expected} == expected
    assert [name for name in ("q_norm", "k_norm") if values[name] is not None] == [f"{part}_norm" for part in norm]
    assert values["norm_eps"] == (1e-6 if norm else 0.0)


def test_learned_keys_and_values_are_read_by_the_one_operator():
    shapes = {**ATTENTION_SHAPES, "sink_kv": (3, KV_HEADS, 2 * HEAD)}
    matches, left, graph = run(fuse_attention, attention, **shapes)
    assert (matches, left) == (1, {"vllm_ms.qkv_attention.default": 1})
    assert arguments(calls(graph, "qkv_attention")[0])["sink_kv"].op == "placeholder"


@pytest.mark.parametrize(
    "options",
    [{"rotate_key": False}, {"key_eps": 1e-5}, {"split": [16, 16, 32]}],
    ids=["key not rotated", "norms with different eps", "not q, k, v"],
)
def test_attention_of_another_form_stays_as_it_is(options):
    if "split" in options:

        def function(qkv, *rest):
            k, v, q = qkv.split(options["split"], -1)
            return attention(torch.cat((q, k, v), -1), *rest)

    else:

        def function(*tensors):
            return attention(*tensors, **options)

    matches, left, _ = run(fuse_attention, function, **ATTENTION_SHAPES)
    assert matches == (1 if "split" in options else 0)
    assert ("vllm_ms.paged_attention.default" in left) == ("split" not in options)


def test_the_manager_leaves_out_named_passes_and_refuses_unknown_names():
    manager = PassManager(PASSES, {"fuse_norm"})
    assert "fuse_norm" not in [graph_pass.name for graph_pass in manager.passes]
    with pytest.raises(UnknownPassError, match="VLLM_MS_DISABLE_PASSES.*fuse_everything.*fuse_norm"):
        PassManager(PASSES, {"fuse_everything"})


def test_the_manager_keeps_the_graph_around_each_pass_when_asked():
    graph = captured(lambda x, w, r: linear(x, w) + r, x=(7, 6), w=(4, 6), r=(7, 4)).module.graph
    report = next(report for report in PassManager(PASSES, keep_text=True).run(graph) if report.name == "fuse_residual")
    assert report.matches == 1
    assert "binary" in report.before and "binary" not in report.after
