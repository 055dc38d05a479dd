"""Every mapped PyTorch operator means in MindSpore what it means in PyTorch."""

import pytest
import torch

from vllm_mindspore.compiler.expressions import UnmappedOperatorError
from vllm_mindspore.compiler.torch_map import TABLE

from .networks import lowered, run

torch.manual_seed(0)
X = torch.randn(7, 6)
Y = torch.randn(7, 6)
POSITIVE = X.abs() + 0.1
MATRIX = torch.randn(7, 3, 6)
IDS = torch.tensor([3, 0, 6, 2, 2, 5, 1])
ROWS = torch.randint(0, 6, (7, 2))
FLAGS = X > 0

# One function per row; together they must reach every entry of the table (checked below).
CASES = {
    "cos": (torch.cos, X),
    "sin": (torch.sin, X),
    "rsqrt": (torch.rsqrt, POSITIVE),
    "sqrt": (torch.sqrt, POSITIVE),
    "neg": (torch.neg, X),
    "abs": (torch.abs, X),
    "exp": (torch.exp, X),
    "log": (torch.log, POSITIVE),
    "tanh": (torch.tanh, X),
    "reciprocal": (torch.reciprocal, POSITIVE),
    "erf": (torch.erf, X),
    "floor": (torch.floor, X),
    "ceil": (torch.ceil, X),
    "round": (torch.round, X * 3),
    "sign": (torch.sign, X),
    "square": (torch.ops.aten.square.default, X),
    "softplus": (torch.nn.functional.softplus, X),
    "isnan": (torch.isnan, X.masked_fill(FLAGS, float("nan"))),
    "add": (lambda x: x + 2, X),
    "sub": (lambda x: x - 2.5, X),
    "mul": (lambda x: x * 3, X),
    "div": (lambda x: x / 4, X),
    "add int": (lambda i: i + i * 2, IDS),
    "sub int with alpha": (lambda i: torch.sub(i, i, alpha=3), IDS),
    "int div": (lambda i: i / 4, IDS),
    "eq": (lambda i: i == 2, IDS),
    "ne": (lambda i: i != 2, IDS),
    "le": (lambda x, y: x <= y, X, Y),
    "lt": (lambda x: x < 0.1, X),
    "ge": (lambda x, y: x >= y, X, Y),
    "gt": (lambda x: x > 0, X),
    "mixed comparison": (lambda x, i: x[:, 0] > i, X, IDS),
    "to": (lambda x: x.to(torch.int64), X * 5),
    "to float": (lambda i: i.to(torch.float32), IDS),
    "type_as": (lambda i, x: torch.ops.aten.type_as.default(i, x), IDS, X),
    "pow 2": (lambda x: x**2, X),
    "pow 1.5": (lambda x: x**1.5, POSITIVE),
    "pow tensor": (lambda x, y: torch.pow(x, y), POSITIVE, Y),
    "pow scalar base": (lambda x: torch.pow(2.0, x), X),
    "rsub": (lambda x: torch.rsub(x, 1.0), X),
    "floor_divide": (lambda i: i // 2, IDS),
    "div floor": (lambda x: torch.div(x, 0.3, rounding_mode="floor"), X),
    "div trunc": (lambda x: torch.div(x, 0.3, rounding_mode="trunc"), X),
    "remainder": (lambda i: (i - 3) % 2, IDS),
    "and": (lambda x, y: (x > 0) & (y > 0), X, Y),
    "and int": (lambda i: i & (i + 1), IDS),
    "or": (lambda x, y: (x > 0) | (y > 0), X, Y),
    "or int": (lambda i: i | (i + 1), IDS),
    "logical_and": (lambda x, y: torch.logical_and(x > 0, y > 0), X, Y),
    "logical_or": (lambda x, y: torch.logical_or(x > 0, y > 0), X, Y),
    "logical_not": (lambda x: torch.logical_not(x > 0), X),
    "bitwise_not": (lambda i: ~i, IDS),
    "bitwise_not bool": (lambda x: ~(x > 0), X),
    "where": (lambda x, y: torch.where(x > 0, x, y), X, Y),
    "where scalar": (lambda x: torch.where(x > 0, x, 0.0), X),
    "where scalar first": (lambda x: torch.where(x > 0, 1.0, x), X),
    "masked_fill": (lambda x: x.masked_fill(x > 0, -1.0), X),
    "clamp": (lambda x: x.clamp(-0.5, 0.5), X),
    "clamp_min": (lambda x: torch.ops.aten.clamp_min.default(x, 0.2), X),
    "clamp_max": (lambda x: torch.ops.aten.clamp_max.default(x, 0.2), X),
    "reshape": (lambda x: x.reshape(-1, 3, 2), X),
    "flatten": (lambda x: torch.flatten(x, 1), MATRIX),
    "unflatten": (lambda x: x.unflatten(-1, (2, 3)), X),
    "expand": (lambda x: x[:, None].expand(-1, 3, -1), X),
    "repeat": (lambda x: x.repeat(1, 2), X),
    "transpose": (lambda x: x.transpose(1, 2), MATRIX),
    "t": (lambda x: x.t() @ x, X),
    "permute": (lambda x: x.permute(0, 2, 1), MATRIX),
    "unsqueeze": (lambda x: x.unsqueeze(-1), X),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), X),
    "squeeze dims": (lambda x: torch.ops.aten.squeeze.dims(x.unsqueeze(1), [1]), X),
    "cat": (lambda x, y: torch.cat((x, y), -1), X, Y),
    "cat with empty": (lambda x: torch.cat((x[:, :0], x), 1), X),
    "stack": (lambda x, y: torch.stack((x, y), 1), X, Y),
    "slice": (lambda x: x[:, 1:5:2], X),
    "select": (lambda x: x[:, -1], X),
    "split": (lambda x: x.split([1, 2, 3], -1), X),
    "split equal": (lambda x: x.split(2, -1), X),
    "chunk": (lambda x: torch.chunk(x, 3, -1), X),
    "slice_scatter": (lambda x: torch.slice_scatter(x, x[:, :2] * 2, 1, 3, 5), X),
    "sym_size": (lambda x: torch.zeros(x.shape[0], 2), X),
    "index_select": (lambda x, i: x.index_select(0, i), X, IDS),
    "index": (lambda x, i: x[i], X, IDS),
    "index dim 1": (lambda x: x[:, torch.tensor([4, 1])], X),
    "gather": (lambda x, r: x.gather(1, r), X, ROWS),
    "scatter": (lambda x, r: x.scatter(1, r[:, :1], x[:, :1]), X, ROWS),
    "mean": (lambda x: x.mean(-1, keepdim=True), X),
    "sum": (lambda x: x.sum(1), X),
    "amax": (lambda x: x.amax(-1), X),
    "amin": (lambda x: x.amin(-1, keepdim=True), X),
    "argmax": (lambda x: x.argmax(-1), X),
    "cumsum": (lambda x: x.cumsum(1), X),
    "softmax": (lambda x: x.softmax(-1), X),
    "log_softmax": (lambda x: x.log_softmax(-1), X),
    "mm": (lambda x, y: x @ y.reshape(6, -1)[:, :7], X, Y),
    "bmm": (lambda x: torch.bmm(x, x.transpose(1, 2)), MATRIX),
    "topk": (lambda x: x.topk(2, -1), X),
    "arange": (lambda x: torch.arange(5) + 0 * x[:5, 0], X),
    "arange start": (lambda x: torch.arange(2, x.shape[0]), X),
    "arange step": (lambda x: torch.arange(1, 9, 3), X),
    "zeros": (lambda x: torch.zeros(3, 2), X),
    "new_zeros": (lambda x: x.new_zeros(x.shape[0], 2), X),
    "zeros_like": (torch.zeros_like, X),
    "ones": (lambda x: torch.ones(3, 2, dtype=torch.int64), X),
    "new_ones": (lambda x: x.new_ones(4), X),
    "ones_like": (torch.ones_like, X),
    "full": (lambda x: torch.full((3, 2), 1.5), X),
    "full_like": (lambda i: torch.full_like(i, 7), IDS),
    "scalar_tensor": (lambda x: torch.where(x > 0, x, torch.scalar_tensor(2.0)), X),
    # rewritten by legalization to operators of our library
    "broadcast add": (lambda x, w: x + w, X),
    "maximum": (torch.maximum, X, Y),
    "minimum": (torch.minimum, X, Y),
    "add with alpha": (lambda x, y: torch.add(x, y, alpha=0.5), X, Y),
    "relu": (torch.relu, X),
    "silu": (torch.nn.functional.silu, X),
    "sigmoid": (torch.sigmoid, X),
    "gelu": (torch.nn.functional.gelu, X),
    "gelu tanh": (lambda x: torch.nn.functional.gelu(x, approximate="tanh"), X),
    "layer_norm": (lambda x: torch.nn.functional.layer_norm(x, (6,)), X),
    "linear": (lambda x, w: torch.nn.functional.linear(x, w[None], w[:1]), X),
    "embedding": (lambda i, x: torch.nn.functional.embedding(i, x.detach()), IDS, X),
}
WEIGHT = torch.randn(6)


@pytest.mark.parametrize("name", CASES)
def test_it_means_what_it_means_in_pytorch(name, tmp_path):
    function, *tensors = CASES[name]
    weights = {"w": WEIGHT} if name in ("broadcast add", "linear") else {}
    found = run(tmp_path, function, *tensors, weights=weights)
    wanted = function(*tensors, **weights)
    for ours, theirs in zip(_tuple(found), _tuple(wanted), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, equal_nan=True)


def _tuple(result):
    return result if isinstance(result, (tuple, list)) else (result,)


# Operators whose result is only ever overwritten, so that no function of theirs has a value to compare.
UNSPECIFIED_VALUES = {"aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default"}


def test_every_entry_of_the_table_is_tested():
    reached = set()
    for name, (function, *tensors) in CASES.items():
        weights = {"w": WEIGHT} if name in ("broadcast add", "linear") else {}
        reached |= set(lowered(function, tensors, weights, passes=False)[0].operators)
    variants = {name.rsplit(".", 1)[0] for name in reached}  # e.g. add.Tensor is tested with a number, as add.Scalar
    missing = [name for name in TABLE if name not in UNSPECIFIED_VALUES and name.rsplit(".", 1)[0] not in variants]
    assert not missing


def test_an_unmapped_operator_is_named(tmp_path):
    with pytest.raises(UnmappedOperatorError, match=r"test graph.*aten\.special_bessel_j0\.default.*CONTRIBUTING"):
        run(tmp_path, torch.special.bessel_j0, X)
