"""The emitted network: repeated layers once, one graph for every token count, and the same numbers as PyTorch."""

import pytest
import torch

from vllm_mindspore.compiler import program

from . import networks
from .networks import lowered, run

torch.manual_seed(0)


def stack(kinds: str, size: int = 6) -> tuple:
    """A model of layers, one letter each ("a": relu, "b": silu), and its weights named as vLLM would name them."""
    weights = {f"layers.{i}.mlp.weight": torch.randn(size, size) for i in range(len(kinds))}
    weights |= {"norm.weight": torch.randn(size)}

    def model(x, **w):
        for i, kind in enumerate(kinds):
            y = torch.nn.functional.linear(x, w[f"layers.{i}.mlp.weight"])
            x = x + (torch.relu(y) if kind == "a" else torch.nn.functional.silu(y))
        return torch.nn.functional.layer_norm(x, (size,), w["norm.weight"])

    return model, weights


@pytest.mark.parametrize(("kinds", "classes"), [("aaaa", 1), ("abab", 2), ("a", 0), ("ab", 2), ("aab", 2)])
def test_each_kind_of_layer_is_written_once(kinds, classes):
    model, weights = stack(kinds)
    emitted, _ = lowered(model, [torch.randn(5, 6)], weights, passes=True)
    assert emitted.layer_classes == classes
    assert emitted.source.count("class Layer") == classes


@pytest.mark.parametrize(("device", "lines"), [("cpu", 1), ("ascend", 2)])
def test_the_source_grows_with_the_number_of_layers_by_a_line_or_two(device, lines, monkeypatch):
    monkeypatch.setattr(networks, "DEVICE", device)
    sizes = [len(lowered(*_arguments(kinds), passes=True)[0].source.splitlines()) for kinds in ("a" * 4, "a" * 14)]
    assert sizes[1] - sizes[0] == lines * 10


def _arguments(kinds):
    model, weights = stack(kinds)
    return model, [torch.randn(5, 6)], weights


@pytest.mark.parametrize("kinds", ["aaaa", "abab", "a"])
@pytest.mark.parametrize("eager", [True, False], ids=["PyNative", "graph"])
def test_the_network_computes_what_the_model_computes(kinds, eager, tmp_path):
    model, weights = stack(kinds)
    x = torch.randn(9, 6)
    found = run(tmp_path, model, x, weights=weights, eager=eager)
    torch.testing.assert_close(found, model(x, **weights), rtol=1e-5, atol=1e-5)


def test_half_precision_weights_are_read_where_they_are(tmp_path):
    model, weights = stack("ab")
    halves = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    found = run(tmp_path, model, x, weights=halves)
    wanted = model(x, **{name: weight.float() for name, weight in halves.items()})
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_one_compile_serves_every_number_of_tokens(tmp_path):
    model, weights = stack("aab")
    x = torch.randn(300, 6)
    before = program.compiled_graphs()
    sizes = [1, 2, 300, 17, 64, 1]
    found = run(tmp_path, model, x, weights=weights, eager=False, sizes=sizes)
    assert program.compiled_graphs() - before == 1
    for size, rows in zip(sizes, found, strict=True):
        torch.testing.assert_close(rows, model(x[:size], **weights), rtol=1e-5, atol=1e-5)


def test_consecutive_operators_are_written_as_one_up_to_what_is_not_ours():
    def model(x, **w):
        a = torch.nn.functional.linear(x, w["a.weight"])
        b = torch.nn.functional.linear(torch.relu(a), w["b.weight"])
        return torch.nn.functional.linear(torch.cumsum(b, -1), w["c.weight"]), b

    weights = {f"{name}.weight": torch.randn(6, 6) for name in "abc"}
    emitted, _ = lowered(model, [torch.randn(5, 6)], weights, passes=True)
    assert emitted.source.count("= sequence(") == 1, "the first two, with the activation between them"
    assert emitted.source.count("Recorder()") == 1, "the last one, after cumsum"
    assert emitted.operators["vllm_ms.linear.default"] == 3


def test_a_graph_without_layers_is_recorded_too(tmp_path):
    def head(x, weight):
        return torch.nn.functional.linear(x, weight)

    arguments = {"weights": {"weight": torch.randn(9, 6)}}
    emitted, _ = lowered(head, [x := torch.randn(5, 6)], **arguments, passes=True)
    assert emitted.source.count("Recorder()") == 1 and "build(" not in emitted.source
    for eager in (True, False):
        found = run(tmp_path, head, x, **arguments, eager=eager)
        torch.testing.assert_close(found, head(x, **arguments["weights"]), rtol=1e-5, atol=1e-5)


def test_layers_are_recorded_into_one_operator():
    emitted, _ = lowered(*_arguments("abab"), passes=True)
    assert emitted.source.count("Recorder()") == 1
    assert "build(" not in emitted.source and "sequence(" not in emitted.source


def test_layers_with_other_operators_are_not_recorded(tmp_path):
    weights = {f"layers.{i}.weight": torch.randn(6, 6) for i in range(3)}

    def model(x, **w):
        for weight in w.values():
            x = torch.cumsum(torch.nn.functional.linear(x, weight), -1)
        return x

    emitted, _ = lowered(model, [x := torch.randn(5, 6)], weights, passes=True)
    assert "Recorder()" not in emitted.source and "class Layer(nn.Cell)" in emitted.source
    torch.testing.assert_close(run(tmp_path, model, x, weights=weights), model(x, **weights), rtol=1e-4, atol=1e-4)


def test_what_follows_a_returned_result_is_not_recorded(tmp_path):
    weights = {f"layers.{i}.weight": torch.randn(6, 6) for i in range(3)} | {"head.weight": torch.randn(9, 6)}

    def model(x, **w):
        for name in list(weights)[:3]:
            x = torch.nn.functional.linear(x, w[name])
        return x, torch.relu(torch.nn.functional.linear(torch.nn.functional.silu(x), w["head.weight"])).tanh()

    emitted, _ = lowered(model, [x := torch.randn(5, 6)], weights, passes=True)
    assert emitted.source.count("Recorder()") == emitted.source.count("sequence(") == 1
    for found, wanted in zip(run(tmp_path, model, x, weights=weights, eager=False), model(x, **weights), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_all_results_of_a_graph_of_own_operators_are_recorded_together(tmp_path):
    weights = {f"layers.{i}.weight": torch.randn(6, 6) for i in range(3)} | {"head.weight": torch.randn(9, 6)}

    def model(x, **w):
        for name in list(weights)[:3]:
            x = torch.nn.functional.linear(x, w[name])
        return x, torch.nn.functional.linear(torch.nn.functional.silu(x), w["head.weight"])

    emitted, _ = lowered(model, [x := torch.randn(5, 6)], weights, passes=True)
    assert emitted.packed and emitted.outputs == ((None, 6), (None, 9))
    assert emitted.source.count("Recorder()") == 1 and "sequence(" not in emitted.source
    for found in run(tmp_path, model, x, weights=weights, eager=False, sizes=[5, 3, 0, 1]):
        for part, wanted in zip(found, model(x[: len(found[0])], **weights), strict=True):
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-4)


def test_operators_stay_apart_on_ascend(monkeypatch):
    monkeypatch.setattr(networks, "DEVICE", "ascend")
    emitted, _ = lowered(*_arguments("aaaa"), passes=True)
    assert "sequence" not in emitted.source and "Recorder" not in emitted.source
    assert 'build("linear"' in emitted.source
