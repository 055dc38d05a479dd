"""The operator table: schemas, torch definitions with fakes, and the errors of building."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_mindspore.ops import registry
from vllm_mindspore.ops.operator import Operator, Schema


def test_torch_side_needs_no_mindspore():
    code = (
        "import sys; from vllm_mindspore.ops import registry; assert 'torch' not in sys.modules;"
        "registry.define_all(); registry.define_all(); assert 'mindspore' not in sys.modules;"
        "import torch; print(*(hasattr(torch.ops.vllm_ms, name) for name in registry.OPERATORS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"True"}


@pytest.mark.parametrize("name", registry.OPERATORS)
def test_schemas_are_read_as_torch_reads_them(name):
    import torch

    registry.define_all()
    schema = registry.OPERATORS[name].schema
    theirs = getattr(torch.ops.vllm_ms, name).default._schema
    tensors = [argument for argument in theirs.arguments if "Tensor" in str(argument.type)]
    rest = [argument for argument in theirs.arguments if "Tensor" not in str(argument.type)]
    assert [t.name for t in schema.tensors] == [argument.name for argument in tensors]
    assert [t.optional for t in schema.tensors] == ["Optional" in str(argument.type) for argument in tensors]
    assert [t.mutated for t in schema.tensors] == [
        argument.alias_info is not None and argument.alias_info.is_write for argument in tensors
    ]
    assert [(a.name, a.type.__name__) for a in schema.attributes] == [
        (argument.name, str(argument.type)) for argument in rest
    ]
    assert list(theirs.arguments) == tensors + rest, "tensors come first: lowering relies on it"


def test_fakes_give_float32_of_the_contract_shapes():
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    registry.define_all()
    ops = torch.ops.vllm_ms
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, dtype=torch.bfloat16)
        weight = torch.empty(12, 8, dtype=torch.bfloat16)
        results = {
            (2, 3, 8): ops.rms_norm(x, None, 1e-6, 0.0),
            (2, 3, 12): ops.linear(x, weight, None, None, None, None, "", 0.0, 0.0, "relu"),
            (2, 3, 6): ops.linear(x, weight, None, None, None, None, "", 0.0, 0.0, "silu_and_mul"),
            (2, 3, 4): ops.activation(x, "gelu_and_mul"),
            (5, 8): ops.embedding(torch.empty(5, dtype=torch.int64), weight),
            (2, 3, 1, 8): ops.binary(x[:, :, None], torch.empty(8), "mul"),
        }
        assert tuple(ops.layer_norm(x, None, None, 1e-5).shape) == (2, 3, 8)
    for shape, result in results.items():
        assert tuple(result.shape) == shape
        assert result.dtype == torch.float32


def test_fakes_keep_a_symbolic_token_count():
    import torch

    registry.define_all()

    class Net(torch.nn.Module):
        def forward(self, x, weight):
            y = torch.ops.vllm_ms.linear(x, weight, None, None, None, None, "", 0.0, 0.0, "")
            return torch.ops.vllm_ms.binary(y, y, "add")

    tokens = torch.export.Dim("tokens")
    exported = torch.export.export(Net(), (torch.empty(5, 4), torch.empty(6, 4)), dynamic_shapes=({0: tokens}, None))
    (output,) = (node for node in exported.graph.nodes if node.target is torch.ops.vllm_ms.binary.default)
    assert isinstance(output.meta["val"].shape[0], torch.SymInt)


def test_build_refuses_what_it_does_not_know():
    with pytest.raises(registry.UnsupportedOperator, match="no operator 'conv'; known: .*linear"):
        registry.build("conv", "cpu")
    with pytest.raises(registry.UnsupportedOperator, match="'rms_norm': no device 'gpu'; supported: cpu, ascend"):
        registry.build("rms_norm", "gpu", (), eps=1e-6, offset=0.0)
    with pytest.raises(ValueError, match="not an optional tensor argument: x"):
        registry.build("rms_norm", "cpu", ("x",), eps=1e-6, offset=0.0)
    with pytest.raises(TypeError, match=r"\['eps'\] given"):
        registry.build("rms_norm", "cpu", (), eps=1e-6)


def test_an_operator_without_ascend_says_so(monkeypatch):
    operator = Operator("only_cpu", Schema.parse("(Tensor x) -> Tensor"), fake=lambda x: x, cpu="OnlyCpu")
    monkeypatch.setitem(registry.OPERATORS, "only_cpu", operator)
    with pytest.raises(registry.UnsupportedOperator, match="'only_cpu' has no implementation for ascend, only for cpu"):
        registry.build("only_cpu", "ascend")


@pytest.mark.parametrize("text", ["(Tensor x)", "(Tensor[] x) -> Tensor", "(Tensor x, complex c) -> Tensor"])
def test_unreadable_schemas_are_refused(text):
    with pytest.raises(ValueError, match="schema"):
        Schema.parse(text)
