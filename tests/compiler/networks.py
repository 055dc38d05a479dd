"""Runs a PyTorch function through the whole compiler, to compare it with PyTorch's own result."""

import itertools
from pathlib import Path

import torch

from vllm_mindspore.compiler.capture import Capture
from vllm_mindspore.compiler.emit import EmittedGraph, emit
from vllm_mindspore.compiler.legalize import legalize
from vllm_mindspore.compiler.program import Program
from vllm_mindspore.compiler.tensors import to_mindspore, to_torch, unpack
from vllm_mindspore.graph_passes import PASSES, PassManager
from vllm_mindspore.ops import registry

registry.define_all()
DEVICE = "cpu"
_numbers = itertools.count()


def lowered(function, tensors: list[torch.Tensor], weights: dict[str, torch.Tensor], passes: bool) -> EmittedGraph:
    """Capture `function(*tensors, **weights)`; the first size of each tensor is symbolic."""
    capture = Capture("test")
    for number, tensor in enumerate(tensors):
        capture.add_input("tensor", f"x{number}", tuple(tensor.shape), tensor.dtype, dynamic=(0,))
    for name, tensor in weights.items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        capture.add_input("weight", name, tuple(tensor.shape), dtype)
    count = len(tensors)
    graph = capture.trace(lambda inputs: function(*inputs[:count], **dict(zip(weights, inputs[count:], strict=True))))
    legalize(graph)
    if passes:
        PassManager(PASSES).run(graph.module.graph)
    stored = {name: tensor.dtype for name, tensor in weights.items()} | {k: v.dtype for k, v in graph.constants.items()}
    emitted = emit(graph, stored, DEVICE, "test")
    return emitted, graph.constants


def run(
    folder: Path, function, *tensors: torch.Tensor, weights: dict[str, torch.Tensor] | None = None, eager: bool = True,
    passes: bool = True, sizes: list[int] | None = None, columns: dict[str, bool] | None = None,
):  # fmt: skip
    """MindSpore's results of `function`: a tensor or a tuple. With `sizes`, one result per first size of the inputs."""
    weights = weights or {}
    emitted, constants = lowered(function, list(tensors), weights, passes)
    path = folder / f"network{next(_numbers)}.py"
    path.write_text(emitted.source)
    program = Program(emitted, path, {**weights, **constants}, eager, columns or {})
    if not eager:
        program.compile([((None, *tensor.shape[1:]), tensor.dtype) for tensor in tensors], lambda: None)
    results = [
        _results(emitted, program([to_mindspore(tensor[:size].contiguous()) for tensor in tensors]), size)
        for size in sizes or [len(tensors[0])]
    ]
    return results if sizes else results[0]


def _results(emitted: EmittedGraph, result, size: int):
    if not emitted.packed:
        return _to_torch(result)
    shapes = [tuple(size if length is None else length for length in shape) for shape in emitted.outputs]
    return tuple(unpack(_to_torch(result), shapes))


def _to_torch(result):
    if isinstance(result, (tuple, list)):
        return tuple(map(_to_torch, result))
    array = result.asnumpy()
    return torch.from_numpy(array.copy()) if array.dtype != bool else torch.tensor(array)


__all__ = ["lowered", "run", "to_torch"]
