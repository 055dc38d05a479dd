"""Several operators as one: the same bits as one after the other, in both of MindSpore's modes, and clear errors."""

import mindspore as ms
import numpy as np
import pytest

from tests.bench import events
from vllm_mindspore.ops.cpu import Recorder, sequence
from vllm_mindspore.ops.registry import build

from .helpers import jit_with_dynamic_tokens, tensor

PLAIN = "norm= eps=0.0 norm_offset=0.0 activation="
PROGRAM = f"""
    up = linear x w_up b_up - gamma - norm=rms eps=1e-06 norm_offset=1.0 activation=silu_and_mul
    down = linear up w_down - x - - {PLAIN}
    out = linear down w_up - - - - {PLAIN}
"""
NAMES = "x w_up b_up gamma w_down"


def values(tokens: int, dtype: str) -> list[ms.Tensor]:
    random = np.random.default_rng(3)
    shapes = [(tokens, 33), (70, 33), (70,), (33,), (33, 35)]
    x, *weights = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return [tensor(x), *(tensor(weight, dtype) for weight in weights)]


def one_by_one(x, w_up, b_up, gamma, w_down):
    plain = {"norm": "", "eps": 0.0, "norm_offset": 0.0, "activation": ""}
    first = build("linear", "cpu", ("bias", "norm_weight"), norm="rms", eps=1e-6, norm_offset=1.0,
                  activation="silu_and_mul")  # fmt: skip
    down = build("linear", "cpu", ("residual",), **plain)(first(x, w_up, b_up, gamma), w_down, x)
    return build("linear", "cpu", (), **plain)(down, w_up)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_a_sequence_gives_the_bits_of_its_operators(tokens, dtype):
    arguments = values(tokens, dtype)
    found = sequence(NAMES, PROGRAM)(*arguments)
    assert found.shape == (tokens, 70)
    np.testing.assert_array_equal(found.asnumpy(), one_by_one(*arguments).asnumpy())


def test_a_compiled_sequence_takes_any_number_of_tokens():
    example = values(3, "float32")
    compiled = jit_with_dynamic_tokens(sequence(NAMES, PROGRAM), example, (0, None, None, None, None))
    for tokens in (1, 3, 17):
        arguments = values(tokens, "float32")
        np.testing.assert_array_equal(compiled(*arguments).asnumpy(), one_by_one(*arguments).asnumpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_read_where_they_are(dtype):
    x, *weights = values(5, dtype)
    declared = [
        f"{name} {dtype} {' '.join(map(str, w.shape))}" for name, w in zip(NAMES.split()[1:], weights, strict=True)
    ]
    step = sequence("x table", PROGRAM, "", "\n".join(declared))
    addresses = np.array([weight.asnumpy().ctypes.data for weight in weights], np.int64)
    expected = one_by_one(x, *weights).asnumpy()
    np.testing.assert_array_equal(step(x, tensor(addresses)).asnumpy(), expected)
    compiled = jit_with_dynamic_tokens(step, [x, tensor(addresses)], (0, None))
    np.testing.assert_array_equal(compiled(x, tensor(addresses)).asnumpy(), expected)
    for table in (addresses[:3], addresses.astype(np.int32)):
        with pytest.raises(RuntimeError):
            step(x, tensor(table)).asnumpy()


def test_more_inputs_than_a_bit_mask_has_bits():
    names = [f"x{i}" for i in range(70)]
    previous, lines = "x0", []
    for i, name in enumerate(names[1:]):
        lines.append(f"r{i} = binary {previous} {name} op=add")
        previous = f"r{i}"
    found = sequence(" ".join(names), "\n".join(lines))(*(tensor(np.full((2, 3), i, np.float32)) for i in range(70)))
    np.testing.assert_array_equal(found.asnumpy(), np.full((2, 3), sum(range(70)), np.float32))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("", "an empty program"),
        ("y = convolution x", "no operator 'convolution'"),
        ("y = activation z activation=relu", "activation: no input or earlier result 'z'"),
        ("y = activation x", "missing attribute 'activation'"),
        ("y = activation x relu", "'relu', expected name=value"),
        ("activation x activation=relu", "expected 'result = operator ...'"),
        (f"y = linear x w - - - {PLAIN}", "no input or earlier result 'norm='"),
        (f"y = activation x activation=relu\nz = linear y w - - - - {PLAIN}", "step 1, linear: .*: 5 against 4"),
    ],
)
def test_what_is_wrong_is_said(program, message):
    x, w = tensor(np.zeros((2, 5), np.float32)), tensor(np.zeros((3, 4), np.float32))
    with pytest.raises(RuntimeError, match=message):
        sequence("x w", program)(x, w).asnumpy()


def record(arguments):
    """The program above as a recording, and what to call it with."""
    tokens, *tensors = arguments
    run, weights = Recorder(), [ms.Parameter(value, name=f"w.{i}") for i, value in enumerate(tensors)]
    w_up, b_up, gamma, w_down = weights
    plain = {"norm": "", "eps": 0.0, "norm_offset": 0.0, "activation": ""}
    up = run("linear", "x", w_up, b_up, None, gamma, None, norm="rms", eps=1e-6, norm_offset=1.0,
             activation="silu_and_mul")  # fmt: skip
    down = run("linear", up, w_down, None, "x", None, None, **plain)
    run("linear", down, w_up, None, None, None, None, **plain)
    primitive, found = run.primitive(["x"])
    (table,) = found
    places = [weight.asnumpy().ctypes.data for weight in weights]
    assert list(table.asnumpy()) == places, "each weight once, in the order of their first use"
    return primitive, (tokens, *found)


def test_a_recording_gives_the_bits_of_its_operators():
    arguments = values(5, "bfloat16")
    primitive, operands = record(arguments)
    np.testing.assert_array_equal(primitive(*operands).asnumpy(), one_by_one(*arguments).asnumpy())


@pytest.mark.parametrize("rows", [1, 7, 0])
def test_several_results_are_one_vector(rows):
    x, w = tensor(np.ones((rows, 5), np.float32)), tensor(np.full((3, 5), 2, np.float32))
    program = f"y = linear x w - - - - {PLAIN}\nz = activation y activation=relu\nu = activation x activation=relu"
    found = sequence("x w", program, "u y")(x, w).asnumpy()
    np.testing.assert_array_equal(found, np.repeat(np.float32([1, 10]), [rows * 5, rows * 3]))
    np.testing.assert_array_equal(sequence("x w", program, "z")(x, w).asnumpy(), np.full((rows, 3), 10, np.float32))


def test_a_result_that_no_step_has_is_refused():
    x = tensor(np.ones((2, 5), np.float32))
    with pytest.raises(RuntimeError, match="no step has the result 'x'"):
        sequence("x", "y = activation x activation=relu", "x")(x).asnumpy()


def test_a_recorder_checks_its_calls():
    run = Recorder()
    with pytest.raises(TypeError, match="linear: 2 tensors given, schema"):
        run("linear", "x", None, norm="", eps=0.0, norm_offset=0.0, activation="")
    with pytest.raises(TypeError, match="attributes .* given, schema"):
        run("activation", "x", kind="silu")


def test_operators_are_timed_when_asked():
    x, w = tensor(np.ones((2, 5), np.float32)), tensor(np.ones((3, 5), np.float32))
    step = sequence("x w", f"y = linear x w - - - - {PLAIN}\nz = activation y activation=relu")
    step(x, w).asnumpy()
    events.measure(True)
    for _ in range(3):
        step(x, w).asnumpy()
    events.measure(False)
    step(x, w).asnumpy()
    found = events.measured()
    names = [(event.name, event.columns) for event in found]
    assert names == [("linear", 3), ("activation", 3)] * 3, "in order, of the measured time only"
    times = [time for event in found for time in (event.begin, event.end)]
    assert times == sorted(times) and all(event.seconds > 0 for event in found)
