"""The one bridge between torch and MindSpore tensors: both views of the same host memory, never a copy."""

import math

import numpy as np
import torch


def to_mindspore(tensor: torch.Tensor):
    """A MindSpore tensor on the memory of a contiguous torch CPU tensor.

    Shared through numpy, not DLPack: in PyNative, MindSpore's operators write to a copy of a DLPack tensor.

    Raises:
        ValueError: the tensor is not contiguous (it could only be copied).
    """
    import mindspore as ms

    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and stride {tensor.stride()} cannot be shared")
    if tensor.dtype == torch.bfloat16:
        from mindspore.common import np_dtype

        return ms.Tensor.from_numpy(tensor.view(torch.uint16).numpy().view(np_dtype.bfloat16))
    return ms.Tensor.from_numpy(tensor.numpy())


def to_torch(tensor) -> torch.Tensor:
    """A torch tensor on the memory of a MindSpore tensor; waits until the tensor is computed."""
    return torch.from_numpy(tensor.asnumpy())


def unpack(vector: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Views of the tensors of these shapes that lie one after the other in `vector`."""
    parts = vector.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def array_to_mindspore(array: np.ndarray):
    """A MindSpore tensor on the memory of a contiguous numpy array."""
    import mindspore as ms

    return ms.Tensor.from_numpy(array)


def shared_parameter(tensor: torch.Tensor, name: str):
    """A MindSpore Parameter on the memory of a torch tensor (`Parameter(tensor)` would copy)."""
    import mindspore as ms
    from mindspore.common.initializer import initializer

    shared = to_mindspore(tensor.detach().as_subclass(torch.Tensor))  # vLLM's parameters are subclasses
    parameter = ms.Parameter(initializer("zeros", shared.shape, shared.dtype), name=name, requires_grad=False)
    parameter.set_data(shared)
    return parameter
