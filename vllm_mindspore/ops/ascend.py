"""Operators on Ascend: cells of MindSpore's own primitives. Checked by export on any machine, never run by our tests.

Results are computed in the weights' type and returned in the activations'. `given` names a call's tensors in order.
"""

from __future__ import annotations

from mindspore import float32 as ms_float32
from mindspore import nn, ops
from mindspore.ops.auto_generate import gen_ops_prim as prim


class _Operator(nn.Cell):
    """A cell called with the tensors named by `given`; `position` of the others is -1."""

    def __init__(self, given: tuple[str, ...]):
        super().__init__()
        self.positions = {name: i for i, name in enumerate(given)}
        self.cast = ops.Cast()

    def position(self, name: str) -> int:
        return self.positions.get(name, -1)


class RmsNorm(_Operator):
    """x [..., width], weight [width]: x / sqrt(mean(x^2) + eps) * (weight + offset)."""

    def __init__(self, given, eps, offset):
        super().__init__(given)
        self.weight = self.position("weight")
        self.eps = eps
        self.offset = offset
        self.fused = prim.RmsNorm(eps)

    def construct(self, *tensors):
        x = tensors[0]
        if self.weight < 0:
            return x * ops.rsqrt(ops.mean(ops.square(x), -1, True) + self.eps)
        gamma = self.cast(tensors[self.weight], x.dtype)
        if self.offset != 0.0:
            gamma = gamma + self.offset
        return self.fused(x, gamma)[0]


class LayerNorm(_Operator):
    """x [..., width], weight and bias [width]."""

    def __init__(self, given, eps):
        super().__init__(given)
        self.weight = self.position("weight")
        self.bias = self.position("bias")
        self.eps = eps
        self.fused = prim.LayerNormExt()

    def construct(self, *tensors):
        x = tensors[0]
        shape = (x.shape[-1],)
        # export cannot infer LayerNormExt with None for these
        weight, bias = ops.ones(shape, x.dtype), ops.zeros(shape, x.dtype)
        if self.weight >= 0:
            weight = self.cast(tensors[self.weight], x.dtype)
        if self.bias >= 0:
            bias = self.cast(tensors[self.bias], x.dtype)
        return self.fused(x, shape, weight, bias, self.eps)[0]


class Activation(_Operator):
    """x [..., width]; gated names halve the last dimension."""

    def __init__(self, given, activation):
        super().__init__(given)
        self.kind = activation.removesuffix("_and_mul")
        self.gated = activation.endswith("_and_mul")
        self.fused = activation == "silu_and_mul"
        self.swiglu = prim.Swiglu()
        self.silu = prim.SiLU()
        self.gelu = prim.GeluExt()
        self.relu = prim.ReLU()

    def activate(self, x):
        if self.kind == "silu":
            return self.silu(x)
        if self.kind == "gelu":
            return self.gelu(x, "none")
        if self.kind == "gelu_tanh":
            return self.gelu(x, "tanh")
        if self.kind == "relu":
            return self.relu(x)
        if self.kind == "relu2":
            return ops.square(self.relu(x))
        if self.kind == "sigmoid":
            return ops.sigmoid(x)
        return x

    def construct(self, *tensors):
        x = tensors[0]
        if self.fused:
            return self.swiglu(x, -1)
        if self.gated:
            gate, up = ops.chunk(x, 2, -1)
            return self.activate(gate) * up
        return self.activate(x)


class Linear(_Operator):
    """act(norm(x) @ weight^T + bias) + residual."""

    def __init__(self, given, norm, eps, norm_offset, activation):
        super().__init__(given)
        self.bias = self.position("bias")
        self.residual = self.position("residual")
        self.norm_weight = self.position("norm_weight")
        self.norm_bias = self.position("norm_bias")
        norm_given = ("x",)
        if self.norm_weight >= 0:
            norm_given += ("weight",)
        if self.norm_bias >= 0:
            norm_given += ("bias",)
        self.normed = norm != ""
        self.norm = RmsNorm(norm_given, eps, norm_offset) if norm == "rms" else LayerNorm(norm_given, eps)
        self.activation = Activation(("x",), activation)
        self.dense = prim.Dense()

    def normalise(self, x, tensors):
        if not self.normed:
            return x
        if self.norm_weight >= 0 and self.norm_bias >= 0:
            return self.norm(x, tensors[self.norm_weight], tensors[self.norm_bias])
        if self.norm_weight >= 0:
            return self.norm(x, tensors[self.norm_weight])
        if self.norm_bias >= 0:
            return self.norm(x, tensors[self.norm_bias])
        return self.norm(x)

    def construct(self, *tensors):
        x, weight = tensors[0], tensors[1]
        bias = None
        if self.bias >= 0:
            bias = self.cast(tensors[self.bias], weight.dtype)
        y = self.dense(self.cast(self.normalise(x, tensors), weight.dtype), weight, bias)
        y = self.activation(self.cast(y, x.dtype))
        if self.residual >= 0:
            y = y + tensors[self.residual]
        return y


class Embedding(_Operator):
    """ids [T], weight [V, H]; zeros for an id not in [first, first + V). float32, like all activations."""

    def __init__(self, given, first=0):
        super().__init__(given)
        self.first = first  # id of the weight's first row
        self.gather = prim.Gather()

    def construct(self, *tensors):
        ids, weight = tensors[0] - self.first, tensors[1]
        valid = ops.logical_and(ids >= 0, ids < weight.shape[0])
        rows = self.gather(weight, ops.select(valid, ids, ops.zeros_like(ids)), 0)
        rows = self.cast(rows, ms_float32)
        return rows * ops.expand_dims(self.cast(valid, ms_float32), -1)


_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "maximum": "Maximum", "minimum": "Minimum"}


class Binary(_Operator):
    """x op y in float32, broadcasting."""

    def __init__(self, given, op):
        super().__init__(given)
        self.apply = getattr(ops, _BINARY[op])()

    def construct(self, *tensors):
        return self.apply(self.cast(tensors[0], ms_float32), self.cast(tensors[1], ms_float32))


class BinaryScalar(_Operator):
    """x op a constant in float32."""

    def __init__(self, given, y, op):
        super().__init__(given)
        self.y = y
        self.apply = getattr(ops, _BINARY[op])()

    def construct(self, *tensors):
        return self.apply(self.cast(tensors[0], ms_float32), self.y)


class Concat(_Operator):
    """Rows of x [..., N] and y [..., M] side by side."""

    def construct(self, *tensors):
        return ops.cat((self.cast(tensors[0], ms_float32), self.cast(tensors[1], ms_float32)), -1)
