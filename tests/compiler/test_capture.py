"""Capture: a module called once with symbolic sizes, its weights as named inputs and left as they were."""

import pytest
import torch

from vllm_mindspore.compiler.capture import Capture, CaptureError
from vllm_mindspore.worker import facts
from vllm_mindspore.worker.model_capture import replaced_weights


class Tied(torch.nn.Module):
    """Two layers with one weight, and a submodule that is shared."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4, bias=False)
        self.second = torch.nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.shared = torch.nn.ModuleDict({"a": torch.nn.BatchNorm1d(4)})
        self.again = self.shared["a"]
        self.slopes = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])]

    def forward(self, x):
        y = self.second(self.first(x)) + self.slopes[0] + self.slopes[1]
        return y + self.shared["a"].running_mean + self.again.running_var


def capture(module: torch.nn.Module, function=None):
    collected, tensors_of_module = Capture("test"), facts.tensors_of(module)
    positions = collected.add_weights(tensors_of_module)
    collected.add_input("tensor", "x", (9, 4), torch.float32, dynamic=(0,))

    def call(tensors):
        with replaced_weights(module, tensors_of_module, {name: tensors[i] for name, i in positions.items()}):
            return (function or module.forward)(tensors[-1])

    return collected.trace(call)


def test_tied_weights_and_shared_modules_are_one_input_and_restored():
    module = Tied().eval()
    before = {name: (tensor, id(tensor)) for name, tensor in module.state_dict(keep_vars=True).items()}
    graph = capture(module)
    weights = [item.name for item in graph.inputs if item.kind == "weight"]
    assert weights == ["first.weight", "shared.a.running_mean", "shared.a.running_var"]
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][1], f"{name} was not put back"


def test_equal_constants_become_one_input():
    graph = capture(Tied().eval())
    assert len(graph.constants) == 1
    assert next(iter(graph.constants.values())).tolist() == [1.0, 2.0, 3.0, 4.0]


class Aside(torch.nn.Module):
    """A weight that something that is no module refers to, as attention implementations do."""

    def __init__(self, part: slice):
        super().__init__()
        self.sinks = torch.nn.Parameter(torch.randn(4))
        self.holder = [self.sinks[part] if part != slice(None) else self.sinks]

    def forward(self, x):
        return x + self.holder[0]


def test_a_weight_that_is_kept_aside_is_read_like_the_others():
    graph = capture(Aside(slice(None)))
    assert [(item.kind, item.name) for item in graph.inputs] == [("weight", "sinks"), ("tensor", "x")]
    assert not graph.constants, "its values are not known yet"


def test_a_part_of_a_weight_that_is_kept_aside_is_refused():
    with pytest.raises(CaptureError, match="part of its weight sinks"):
        capture(Aside(slice(3, 4)))


def test_half_precision_weights_are_captured_as_float32():
    graph = capture(Tied().eval().to(torch.bfloat16))
    types = {node.meta["val"].dtype for node, item in graph.placeholders.items() if item.kind == "weight"}
    assert types == {torch.float32}


def test_the_number_of_tokens_stays_a_symbol():
    graph = capture(Tied().eval())
    (x,) = [node for node, item in graph.placeholders.items() if item.kind == "tensor"]
    assert isinstance(x.meta["val"].shape[0], torch.SymInt)


def test_a_forward_that_looks_at_values_is_refused_with_its_reason():
    with pytest.raises(CaptureError, match="capturing test: .*tensor values"):
        capture(Tied().eval(), lambda x: x if x.sum() > 0 else -x)
