"""Operators on CPU: our C++ kernels as MindSpore AOT custom operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from vllm_mindspore.ops import build
from vllm_mindspore.ops.operator import Operator
from vllm_mindspore.ops.registry import OPERATORS

TABLE = "addresses_of_weights"
CODED = 1  # wrappers/sequence.cc


@functools.lru_cache(maxsize=1)
def _checked_library() -> str:
    build.load()
    return str(build.LIBRARY)


@functools.cache
def _registration(function: str, inputs: int) -> dict:
    from mindspore.ops import CustomRegOp, DataType

    # MindSpore keeps one registration per name, so each number of inputs needs a name of its own
    registration = CustomRegOp(f"VllmMs{function}{inputs}")
    for i in range(inputs):
        registration = registration.input(i, f"x{i}")
    registration = registration.output(0, "y").dtype_format(*[DataType.None_None] * (inputs + 1))
    return registration.target("CPU").get_op_info()


def aot_primitive(operator: Operator, given: tuple[str, ...], attributes: dict[str, Any]) -> Callable:
    """The primitive calling `operator.cpu` of the built library. Raises build.BuildError when that cannot be used."""
    positions = {tensor.name: i for i, tensor in enumerate(operator.schema.tensors)}
    present = sum(1 << positions[name] for name in given)
    ordered = operator.schema.mutates or operator.ordered
    return _primitive(operator.cpu, len(given), ordered, {"present": present, **attributes})


def sequence(inputs: str, program: str, results: str = "", weights: str = "") -> Callable:
    """Several operators as one primitive, for MindSpore's runtime costs more per operator than a small one takes.

    inputs: names of its tensors, separated by spaces. program: a line `result = operator operands attributes` per
    operator, an operand (or `-`) for each tensor of its schema, attributes as name=value. results: what the primitive
    returns, by default the last line's result; several are returned one after the other in one vector. The others live
    in memory that is reused. weights: a line `name dtype dimensions` for each tensor that the last input has the
    address of. Raises build.BuildError when the library cannot be used; what is wrong in a program is reported when
    its shapes are first inferred.
    """
    attributes = {"present": -1, "inputs": inputs, "program": program, "results": results, "weights": weights}
    return _primitive("Sequence", len(inputs.split()), True, attributes)


class Recorder:
    """Writes calls of operators down, to run them as one primitive.

    A call `run(operator, *tensors, **attributes)` takes for each tensor of the operator's schema the name of an input
    of each step, a Parameter, what an earlier call returned, or None if it is absent; it returns its result's name.
    """

    def __init__(self):
        self._lines: list[str] = []
        self._parameters: dict[str, Any] = {}

    def __call__(self, operator: str, *tensors: Any, **attributes: Any) -> str:
        """Raises ValueError or TypeError for arguments that do not fit the operator's schema."""
        schema = OPERATORS[operator].schema
        if len(tensors) != len(schema.tensors):
            raise TypeError(f"{operator}: {len(tensors)} tensors given, schema {schema.text}")
        operands = " ".join(self._name(tensor) for tensor in tensors)
        settings = "".join(f" {name}={value}" for name, value in schema.convert(attributes).items())
        result = f"%{len(self._lines)}"
        self._lines.append(f"{result} = {operator} {operands}{settings}")
        return result

    def _name(self, tensor: Any) -> str:
        if tensor is None or isinstance(tensor, str):
            return tensor or "-"
        self._parameters[tensor.name] = tensor
        return tensor.name

    def primitive(self, inputs: list[str], *results: str) -> tuple[Callable, Any]:
        """(the primitive, its weights): call it with the inputs of a step, then the weights.

        inputs: their names, in the order they are passed. results: of the recorded calls, what it returns; several as
        one vector, one after the other.

        One tensor stands for all weights, the table of their addresses: each that MindSpore passes itself costs time in
        every step. The table keeps them alive.
        """
        from mindspore import ParameterTuple

        if not self._parameters:
            return sequence(" ".join(inputs), "\n".join(self._lines), " ".join(results)), ParameterTuple(())
        declared = [
            " ".join([name, _storage(parameter), *map(str, parameter.shape)])
            for name, parameter in self._parameters.items()
        ]
        names = " ".join([*inputs, TABLE])
        primitive = sequence(names, "\n".join(self._lines), " ".join(results), "\n".join(declared))
        return primitive, ParameterTuple((_address_table(list(self._parameters.values())),))


def in_columns(parameter: Any, coded: bool = False) -> Any:
    """The Parameter, known to have its values in columns (`ops/columns.py`), or also coded, wherever it is recorded."""
    parameter.in_columns, parameter.coded = True, coded
    return parameter


def _storage(parameter: Any) -> str:
    dtype = str(parameter.dtype).lower()
    return f"{dtype}_columns" if getattr(parameter, "in_columns", False) else dtype


def _address_table(parameters: list) -> Any:
    """A Parameter with the parameters' addresses, [len(parameters)] int64; they live as long as it does."""
    from mindspore import Parameter, Tensor

    addresses = _addresses(parameters)
    table = Parameter(Tensor(addresses), name=TABLE, requires_grad=False)
    table.set_data(Tensor.from_numpy(addresses))  # its memory, to be written again: Parameter() has copied it
    table.addressed, table.addresses = tuple(parameters), addresses
    return table


def renew_addresses(network: Any) -> None:
    """Tell a network's recorded operators which of its weights are coded by now (`in_columns`)."""
    for table in network.get_parameters():
        if hasattr(table, "addressed"):
            table.addresses[:] = _addresses(table.addressed)


def _addresses(parameters: Iterable) -> Any:
    """Where the parameters' memory is.

    CODED is added for coded weights: that depends on their values, of which a compiled graph knows
    nothing.
    """
    import numpy as np

    return np.array(
        [parameter.asnumpy().ctypes.data + CODED * getattr(parameter, "coded", False) for parameter in parameters],
        np.int64,
    )


def _primitive(function: str, inputs: int, ordered: bool, attributes: dict[str, Any]) -> Callable:
    from mindspore import float32, ops

    primitive = ops.Custom(
        f"{_checked_library()}:{function}",
        out_shape=None,  # inferred by the library
        out_dtype=float32,
        func_type="aot",
        reg_info=_registration(function, inputs),
    )
    for name, value in attributes.items():
        primitive.add_prim_attr(name, value)
    if ordered:
        primitive.add_prim_attr("side_effect_mem", True)  # keeps program order around the mutated tensor
    return primitive
