"""Weights in columns: the arrangement itself, and the operators that read it, against float64 and bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.ops.helpers import activate, current_isa, normalise, relative_error, stored, tensor
from vllm_mindspore.compiler.tensors import shared_parameter
from vllm_mindspore.ops import columns
from vllm_mindspore.ops.cpu import Recorder, in_columns

EPS = 1e-6
LINEAR = {"norm": "", "eps": EPS, "norm_offset": 0.0, "activation": ""}
EXPERTS = {**LINEAR, "interleaved": False, "alpha": 0.0, "beta": 0.0, "limit": 0.0, "weight_on_input": False}
READING = ("avx2", "avx512")
read = pytest.mark.skipif(current_isa() not in READING, reason=f"only kernels of {READING} read weights in columns")


def as_multiplied(x: np.ndarray) -> np.ndarray:
    """Activations as the products take them: AVX512-BF16 multiplies bf16."""
    return stored(x, "bfloat16") if current_isa() == "avx512" and x.size else x.astype(np.float64)


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random bf16 values of about the size that keeps products near 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)


def routed(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """Different experts for each token, and their weights: [tokens, 2 * top_k]."""
    rows = [[*rng.permutation(experts)[:top_k], *rng.random(top_k)] for _ in range(tokens)]
    return np.array(rows, np.float32).reshape(tokens, 2 * top_k)


class Recorded:
    """One operator on `inputs` of a step and on weights, of which those named in `turned` are put into columns."""

    def __init__(self, operator: str, operands: list, turned: tuple[int, ...], coded: bool = False, **attributes):
        run, self.kept = Recorder(), []
        recorded = []
        for number, operand in enumerate(operands):
            if isinstance(operand, torch.Tensor):
                self.kept.append(operand.clone())
                parameter = shared_parameter(self.kept[-1], f"w{number}")
                if number in turned:
                    columns.arrange(self.kept[-1])
                    assert not coded or columns.encode(self.kept[-1])
                    in_columns(parameter, coded)
                operand = parameter
            recorded.append(operand)
        names = [operand for operand in operands if isinstance(operand, str)]
        self.primitive, self.weights = run.primitive(names, run(operator, *recorded, **attributes))

    def __call__(self, *values: np.ndarray):
        return self.primitive(*map(tensor, values), *self.weights)


@pytest.mark.parametrize(("shape"), [(1, 2), (16, 2), (17, 6), (35, 32), (64, 130), (3, 32, 10), (2, 2, 16, 4)])
def test_pairs_of_a_group_of_rows_come_one_after_the_other(shape):
    before = weight(*shape)
    after = before.clone()
    columns.arrange(after)
    *_, n, k = shape
    expected = []
    for matrix in before.view(-1, n, k):
        for group in matrix.split(16):
            expected.append(group.view(len(group), k // 2, 2).transpose(0, 1).reshape(-1))
    assert torch.equal(after.view(-1), torch.cat(expected))
    columns.arrange(after, back=True)
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    ("shape", "parts", "fits"),
    [
        ((1, 2), 1, True), ((35, 64), 1, True), ((35, 63), 1, False), ((64, 8), 2, True), ((48, 8), 2, False),
        ((0, 8), 1, False), ((4, 35, 64), 1, False), ((4, 32, 64), 1, True), ((4, 32, 64), 2, True),
        ((4, 48, 64), 2, False),
    ],
)  # fmt: skip
def test_which_weights_fit(shape, parts, fits):
    assert columns.fits(shape, parts) == fits


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(16, 4), torch.zeros(16, 3, dtype=torch.bfloat16), torch.zeros(4, 16, dtype=torch.bfloat16).t()],
)
def test_other_tensors_are_refused(wrong):
    with pytest.raises(ValueError, match="cannot be in columns"):
        columns.arrange(wrong)


@pytest.mark.skipif(current_isa() in READING, reason="these kernels read them")
def test_kernels_that_do_not_read_columns_say_so():
    assert not columns.supported()
    op = Recorded("linear", ["x", weight(16, 8), None, None, None, None], (1,), **LINEAR)
    with pytest.raises(RuntimeError):
        op(np.zeros((1, 8), np.float32)).asnumpy()


@read
@pytest.mark.parametrize("activation", ["", "silu", "silu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize(("n", "k"), [(32, 2), (64, 34), (96, 260), (160, 1024), (32, 4100), (64, 8262)])
def test_linear_is_right(n, k, activation):
    w, bias, gamma = weight(n, k), weight(n, seed=1), weight(k, seed=2)
    settings = {**LINEAR, "norm": "rms", "activation": activation}
    op = Recorded("linear", ["x", w, bias, None, gamma, None], (1,), **settings)
    rng = np.random.default_rng(0)
    for tokens in (0, 1, 2, 3, 7, 12, 13, 25, 40):
        x = rng.standard_normal((tokens, k)).astype(np.float32)
        normed = normalise(x.astype(np.float64), "rms", EPS, gamma.double().numpy(), None, 0.0)
        expected = activate(as_multiplied(normed) @ w.double().numpy().T + bias.double().numpy(), activation)
        found = op(x)
        assert found.shape == expected.shape
        assert relative_error(found, expected) < 2e-5


@read
@pytest.mark.parametrize("n", [1, 5, 16, 17, 31, 33, 50])
def test_linear_of_any_number_of_columns(n):
    w, rng = weight(n, 66), np.random.default_rng(n)
    op = Recorded("linear", ["x", w, None, "residual", None, None], (1,), **LINEAR)
    for tokens in (1, 4, 29):
        x, residual = (rng.standard_normal((tokens, size)).astype(np.float32) for size in (66, n))
        expected = as_multiplied(x) @ w.double().numpy().T + residual
        assert relative_error(op(x, residual), expected) < 2e-5


@read
@pytest.mark.parametrize("k", [66, 4200])
def test_a_token_has_the_same_bits_alone_and_among_others(k):
    op = Recorded("linear", ["x", weight(80, k), None, None, None, None], (1,), **LINEAR)
    x = np.random.default_rng(5).standard_normal((40, k)).astype(np.float32)
    alone = np.concatenate([op(x[i : i + 1]).asnumpy() for i in range(len(x))])
    for begin, end in [(0, 40), (3, 8), (0, 12), (5, 18), (17, 40)]:
        np.testing.assert_array_equal(op(x[begin:end]).asnumpy(), alone[begin:end])


@read
@pytest.mark.parametrize(("vocabulary", "width"), [(1, 2), (40, 6), (48, 130)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_embedding_gives_the_rows(vocabulary, width, dtype):
    table = weight(vocabulary, width)
    op = Recorded("embedding", ["ids", table], (1,))
    ids = np.array([0, vocabulary - 1, vocabulary // 2, -1, vocabulary], dtype)
    expected = np.zeros((len(ids), width), np.float32)
    expected[:3] = table.float().numpy()[ids[:3]]
    np.testing.assert_array_equal(op(ids).asnumpy(), expected)


@read
@pytest.mark.parametrize("activation", ["silu_and_mul", "silu"])
@pytest.mark.parametrize(("experts", "hidden", "inter", "top_k"), [(1, 32, 16, 1), (8, 48, 48, 2), (5, 160, 16, 5)])
def test_experts_are_right_and_independent_of_the_batch(experts, hidden, inter, top_k, activation):
    gated = activation.endswith("_and_mul")
    w13, w2 = weight(experts, (2 if gated else 1) * inter, hidden), weight(experts, hidden, inter, seed=1)
    operands = ["x", "routing", w13, w2, None, None, None, None, None]
    op = Recorded("moe_experts", operands, (2, 3), **{**EXPERTS, "activation": activation})
    rng = np.random.default_rng(experts)
    for tokens in (0, 1, 6, 70):
        x = rng.standard_normal((tokens, hidden)).astype(np.float32)
        routing = routed(rng, tokens, experts, top_k)
        expected = np.zeros((tokens, hidden))
        for t, slot in itertools.product(range(tokens), range(top_k)):
            expert = int(routing[t, slot])
            inner = activate(as_multiplied(x[t]) @ w13[expert].double().numpy().T, activation)
            out = as_multiplied(inner) @ w2[expert].double().numpy().T
            expected[t] += routing[t, top_k + slot] * out
        found = op(x, routing)
        assert relative_error(found, expected) < 3e-3, "of which the rounding of what is between the products is most"
        for t in range(min(tokens, 6)):
            np.testing.assert_array_equal(op(x[t : t + 1], routing[t : t + 1]).asnumpy(), found[t : t + 1].asnumpy())


def odd(*shape: int, seed: int = 0) -> torch.Tensor:
    """As weight(), with a few values of unusual exponents: zeros, tiny and huge ones, infinity and NaN; half of them
    side by side in a row, the others scattered."""
    values = weight(*shape, seed=seed)
    flat, generator = values.view(-1), torch.Generator().manual_seed(seed + 1)
    specials = [0.0, -0.0, 1e-38, -1e-40, 3e38, float("inf"), float("-inf"), float("nan"), 2.0**-60]
    places = torch.randperm(len(flat), generator=generator)[: len(flat) // 1200]  # more would not be coded
    places[::2] = torch.arange(len(places[::2]))
    flat[places] = torch.tensor([specials[i % len(specials)] for i in range(len(places))]).to(torch.bfloat16)
    return values


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("shape", [(16, 16), (32, 40), (160, 1024), (3, 32, 104), (16, 5000)])
def test_coded_values_come_back_as_they_were(shape):
    before = odd(*shape)
    after = before.clone()
    columns.arrange(after)
    turned = after.clone()
    assert columns.encode(after)
    *_, n, k = shape
    assert not same_bits(after, turned)
    columns.decode(after)
    assert same_bits(after, turned)
    columns.arrange(after, back=True)
    assert same_bits(after, before)


def test_the_codes_are_what_is_said():
    turned = weight(16, 16)
    columns.arrange(turned)
    coded = turned.clone()
    assert columns.encode(coded)
    memory = coded.view(torch.uint8).view(-1).numpy()
    bits = turned.view(torch.int16).view(-1).numpy().astype(np.uint16)
    pairs = bits.reshape(2, 2, 2, 32)  # octets, their halves of two pairs, a pair's elements
    np.testing.assert_array_equal(memory[:256].reshape(2, 2, 32, 2), (pairs & 0xFF).transpose(0, 1, 3, 2))
    codes = memory[256:384].reshape(2, 32, 2)[:, :, ::-1]
    codes = np.stack([codes & 15, codes >> 4], 1).transpose(0, 1, 3, 2)
    upper = memory[384:448].reshape(4, 16)
    np.testing.assert_array_equal(upper[0][codes], pairs >> 8)
    np.testing.assert_array_equal(upper, upper[:1].repeat(4, 0))
    assert memory[448:452].view(np.uint32) == 0xFFFFFFFF


SPREAD = weight(64, 1024)
SPREAD[:, ::300] *= torch.logspace(-30, -10, 64)[:, None]


@pytest.mark.parametrize(
    "values", [weight(17, 64), weight(16, 68), weight(16, 8), SPREAD, weight(32, 64) * torch.logspace(-30, 30, 64)],
    ids=["rows left over", "half an octet", "no room", "too many exceptions", "no room for exceptions"],
)  # fmt: skip
def test_what_cannot_be_coded_is_left_alone(values):
    values = values.to(torch.bfloat16)
    before = values.clone()
    assert not columns.encode(values)
    assert same_bits(values, before)


@read
@pytest.mark.parametrize(
    ("n", "k", "activation"),
    [(48, 40, ""), *itertools.product([32, 96, 160, 64], [16, 264, 1024, 8264], ["", "silu_and_mul"])],
)
def test_linear_of_coded_weights_has_the_bits_of_columns(n, k, activation):
    w = weight(n, k) if activation else odd(n, k)
    settings = {**LINEAR, "activation": activation}
    operands = ["x", w, None, None, None, None]
    plain, coded = (Recorded("linear", operands, (1,), form, **settings) for form in (False, True))
    rng = np.random.default_rng(0)
    for tokens in (0, 1, 2, 3, 7, 12, 13, 25, 40, 90):
        x = rng.standard_normal((tokens, k)).astype(np.float32)
        np.testing.assert_array_equal(coded(x).asnumpy(), plain(x).asnumpy())


@read
def test_embedding_of_a_coded_table_gives_the_rows():
    table = odd(48, 136)
    op = Recorded("embedding", ["ids", table], (1,), coded=True)
    ids = np.array([*range(48), -1, 48], np.int64)
    found = op(ids).asnumpy()
    np.testing.assert_array_equal(found[:48].view(np.int32), table.float().numpy().view(np.int32))
    assert not found[48:].any()


@read
@pytest.mark.parametrize("activation", ["silu_and_mul", "silu"])
@pytest.mark.parametrize(("experts", "hidden", "inter", "top_k"), [(1, 32, 16, 1), (8, 48, 48, 2), (5, 160, 16, 5)])
def test_coded_experts_have_the_bits_of_columns(experts, hidden, inter, top_k, activation):
    gated = activation.endswith("_and_mul")
    w13, w2 = weight(experts, (2 if gated else 1) * inter, hidden), odd(experts, hidden, inter, seed=1)
    operands = ["x", "routing", w13, w2, None, None, None, None, None]
    settings = {**EXPERTS, "activation": activation}
    plain, coded = (Recorded("moe_experts", operands, (2, 3), form, **settings) for form in (False, True))
    rng = np.random.default_rng(experts)
    for tokens in (0, 1, 6, 70):
        x = rng.standard_normal((tokens, hidden)).astype(np.float32)
        routing = routed(rng, tokens, experts, top_k)
        np.testing.assert_array_equal(coded(x, routing).asnumpy(), plain(x, routing).asnumpy())
