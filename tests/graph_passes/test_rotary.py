"""Rotary embedding written as arithmetic is recognized in both forms models have it, and nothing like it is."""

import pytest
import torch

from tests.compiler import networks
from vllm_mindspore.graph_passes import drop_noops, fuse_rotary
from vllm_mindspore.graph_passes.nodes import arguments, calls

from .graphs import captured, operators, run

HEADS, HEAD, ROWS = 3, 8, 32


def rotate_half(x, chunked=True):
    first, second = x.chunk(2, -1) if chunked else (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :])
    return torch.cat((-second, first), -1)


def rotated(x, cos, sin, rotary_dim=HEAD):
    """x: [..., head]; the form of Phi-3's LongRoPE: a part that passes through, possibly empty, is joined again."""
    part, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    return torch.cat((part * cos + rotate_half(part) * sin, rest), -1)


def indexed(x, positions, table, shift=0, rotary_dim=HEAD):
    """x [T, heads * head]; cos and sin from rows of a table."""
    rows = torch.index_select(table, 0, positions + torch.full_like(positions, shift) if shift else positions)
    cos, sin = (half.repeat(1, 2).unsqueeze(-2) for half in rows.chunk(2, -1))
    return rotated(x.view(-1, HEADS, HEAD), cos, sin, rotary_dim)


def computed(x, positions, frequencies, scaling=1.3):
    """x [T, heads * head] → [1, heads, T, head], with cos and sin of the positions: Hugging Face's form."""
    angles = positions[None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), -1)
    cos, sin = (function(angles).mul(scaling).unsqueeze(1) for function in (torch.cos, torch.sin))
    heads = x.view(1, -1, HEADS, HEAD).transpose(1, 2)
    return (heads * cos + rotate_half(heads, chunked=False) * sin).transpose(1, 2).reshape(-1, HEADS * HEAD)


@pytest.mark.parametrize("rotary_dim", [4, HEAD])
@pytest.mark.parametrize("shift", [0, 5])
def test_rows_of_a_table_are_read_by_the_operator(rotary_dim, shift):
    shapes = dict(x=(7, HEADS * HEAD), positions=(7,), table=(ROWS, rotary_dim))
    matches, left, graph = run(fuse_rotary, lambda *tensors: indexed(*tensors, shift, rotary_dim), **shapes)
    (rotary,) = (arguments(node) for node in calls(graph, "rotary"))
    assert matches == 1
    assert "vllm_ms.binary.default" not in left and "aten.index_select.default" not in left
    assert rotary["cos_sin"].op == "placeholder"
    assert (rotary["positions"].op == "placeholder") == (shift == 0)
    assert [node.name for node in graph.nodes if node.op == "placeholder"] == ["arg0_1", "arg1_1", "arg2_1"]
    assert (rotary["head_size"], rotary["rotary_dim"], rotary["neox"]) == (HEAD, rotary_dim, True)


def test_cos_and_sin_of_the_step_become_a_table_that_all_layers_share():
    shapes = dict(x=(7, HEADS * HEAD), positions=(7,), frequencies=(HEAD // 2,))

    def two_layers(x, positions, frequencies):
        angles = positions[None, :, None].float() * frequencies
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        for _ in range(2):
            heads = x.view(1, -1, HEADS, HEAD).transpose(1, 2)
            x = (heads * cos + rotate_half(heads) * sin).transpose(1, 2).reshape(-1, HEADS * HEAD)
        return x

    matches, left, graph = run(fuse_rotary, two_layers, **shapes)
    first, second = (arguments(node) for node in calls(graph, "rotary"))
    assert matches == 2
    assert left["aten.arange.default"] == 1
    assert (first["cos_sin"], first["positions"]) == (second["cos_sin"], second["positions"])


def test_the_transposes_of_hugging_faces_form_cancel():
    shapes = dict(x=(7, HEADS * HEAD), positions=(7,), frequencies=(HEAD // 2,))

    graph = captured(computed, **shapes).module.graph
    assert fuse_rotary.run(graph) == 1
    drop_noops.run(graph)
    graph.eliminate_dead_code()
    left = operators(graph)
    assert left["vllm_ms.rotary.default"] == 1
    assert "aten.transpose.int" not in left


def test_parts_of_a_split_are_as_good_as_slices():
    def function(x, positions, table):
        part, rest = x.view(-1, HEADS, HEAD).split([4, HEAD - 4], -1)
        cos, sin = (half.repeat(1, 2).unsqueeze(-2) for half in torch.index_select(table, 0, positions).chunk(2, -1))
        return torch.cat((part * cos + rotate_half(part) * sin, rest), -1)

    matches, left, graph = run(fuse_rotary, function, x=(7, HEADS * HEAD), positions=(7,), table=(ROWS, 4))
    assert matches == 1
    assert left == {"vllm_ms.rotary.default": 1, "aten.reshape.default": 1}


def test_arithmetic_on_scalars_is_left_alone():
    function = lambda x, s: x * s + x * torch.cat((-x[:, 3:], x[:, :3]), -1)  # noqa: E731
    assert run(fuse_rotary, function, x=(7, 6), s=())[0] == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x, cos, sin: x * cos - rotate_half(x) * sin,
        lambda x, cos, sin: x * cos + torch.cat((-x[..., 3:], x[..., :3]), -1) * sin,
        lambda x, cos, sin: x * cos + torch.cat((x[..., 4:], -x[..., :4]), -1) * sin,
        lambda x, cos, sin: x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin[..., :1],
        lambda x, cos, sin: (y := rotate_half(x) * sin) + x * cos + y,
    ],
    ids=["difference", "unequal parts", "other sign", "one sine a row", "product used twice"],
)
def test_what_only_looks_like_rotary_stays(function):
    def form(x, positions, table):
        rows = torch.index_select(table, 0, positions)
        cos, sin = (half.repeat(1, 2).unsqueeze(-2) for half in rows.chunk(2, -1))
        return function(x.view(-1, HEADS, HEAD), cos, sin)

    assert run(fuse_rotary, form, x=(7, HEADS * HEAD), positions=(7,), table=(ROWS, HEAD))[0] == 0


def test_values_that_differ_between_the_halves_stay():
    def form(x, positions, frequencies):
        angles = positions[:, None].float() * frequencies
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        return rotated(x.view(-1, HEADS, HEAD), cos, sin)

    assert run(fuse_rotary, form, x=(7, HEADS * HEAD), positions=(7,), frequencies=(HEAD,))[0] == 0


@pytest.mark.parametrize("passes", [True, False])
def test_results_are_those_of_the_arithmetic(tmp_path, passes):
    torch.manual_seed(0)
    x, positions = torch.randn(7, HEADS * HEAD), torch.tensor([0, 3, 1, 20, 20, 9, 26])
    weights = {"table": torch.randn(ROWS, 4), "frequencies": torch.rand(HEAD // 2)}

    def swapped(x, positions, table):
        sin, cos = (half.repeat(1, 2).unsqueeze(-2) for half in torch.index_select(table, 0, positions).chunk(2, -1))
        return rotated(x.view(-1, HEADS, HEAD), cos, sin, 4)

    def all_forms(x, positions, table, frequencies):
        rows = indexed(x, positions, table, 5, 4), swapped(x, positions, table)
        return *rows, computed(x, positions, frequencies)

    found = networks.run(tmp_path, all_forms, x, positions, weights=weights, passes=passes)
    for result, wanted in zip(found, all_forms(x, positions, **weights), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
