"""rotary on CPU against float64."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from tests.ops import attention_reference as reference
from vllm_mindspore.ops import registry

DTYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16}


def run(positions, x, cos_sin, head_size, neox, dtype="float32"):
    op = registry.build("rotary", "cpu", (), head_size=head_size, rotary_dim=cos_sin.shape[1], neox=neox)
    return op(ms.Tensor(positions), ms.Tensor(x), ms.Tensor(cos_sin).astype(DTYPES[dtype])).asnumpy()


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_size,rotary_dim", [(64, 64), (80, 32), (96, 96), (128, 64), (256, 256), (20, 20), (20, 6), (33, 10), (2, 2)]
)
def test_equal_to_float64(head_size, rotary_dim, dtype, neox):
    rng = np.random.default_rng(head_size + rotary_dim)
    positions = rng.integers(0, 500, 7)
    x = rng.standard_normal((7, 3, head_size)).astype(np.float32)
    cos_sin = reference.make_cos_sin(500, rotary_dim)
    cos_sin = ms.Tensor(cos_sin).astype(DTYPES[dtype]).astype(ms.float32).asnumpy()
    want = reference.rotate(x, positions, cos_sin, neox)
    out = run(positions, x, cos_sin, head_size, neox, dtype)
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_array_equal(out[..., rotary_dim:], x[..., rotary_dim:])
    flat = run(positions, x.reshape(7, -1), cos_sin, head_size, neox, dtype)
    np.testing.assert_array_equal(flat, out.reshape(7, -1))


@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_bits_do_not_depend_on_the_number_of_tokens(tokens):
    rng = np.random.default_rng(tokens)
    positions = rng.integers(0, 2000, tokens)
    x = rng.standard_normal((tokens, 640)).astype(np.float32)
    cos_sin = reference.make_cos_sin(2000, 48)
    out = run(positions, x, cos_sin, 64, True)
    assert out.shape == x.shape
    for token in range(0, tokens, 97):
        one = slice(token, token + 1)
        np.testing.assert_array_equal(run(positions[one], x[one], cos_sin, 64, True), out[one])


@pytest.mark.parametrize("position", [-1, 50])
def test_position_beyond_the_table_is_named(capfd, position):
    cos_sin = reference.make_cos_sin(50, 8)
    with pytest.raises(RuntimeError):
        run(np.array([3, position]), np.zeros((2, 8), np.float32), cos_sin, 8, True)
    assert f"vllm_ms.rotary: position {position} of token 1" in capfd.readouterr().err


@pytest.mark.parametrize("rotary_dim", [0, 7, 66])
def test_impossible_rotary_dim_is_rejected(rotary_dim):
    with pytest.raises(ValueError, match=f"rotary_dim {rotary_dim}:"):
        registry.build("rotary", "cpu", (), head_size=64, rotary_dim=rotary_dim, neox=True)
