"""The one bridge between torch and MindSpore tensors: both views of the same host memory, never a copy."""

import numpy as np
import torch

NUMPY_TYPES = (torch.float32, torch.int64, torch.int32, torch.uint8, torch.int8, torch.float16, torch.float64)


def to_mindspore(tensor: torch.Tensor):
    """A MindSpore tensor on the memory of a contiguous torch CPU tensor.

    Raises:
        ValueError: the tensor is not contiguous (it could only be copied).
    """
    import mindspore as ms

    tensor = tensor.detach()
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and stride {tensor.stride()} cannot be shared")
    if tensor.dtype in NUMPY_TYPES:
        return ms.Tensor.from_numpy(tensor.numpy())
    return ms.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(tensor))


def to_torch(tensor) -> torch.Tensor:
    """A torch tensor on the memory of a MindSpore tensor; waits until the tensor is computed."""
    return torch.from_numpy(tensor.asnumpy())


def array_to_mindspore(array: np.ndarray):
    """A MindSpore tensor on the memory of a contiguous numpy array."""
    import mindspore as ms

    return ms.Tensor.from_numpy(array)


def shared_parameter(tensor: torch.Tensor, name: str):
    """A MindSpore Parameter on the memory of a torch tensor (`Parameter(tensor)` would copy)."""
    import mindspore as ms
    from mindspore.common.initializer import initializer

    shared = to_mindspore(tensor.as_subclass(torch.Tensor))  # vLLM's parameters are subclasses
    parameter = ms.Parameter(initializer("zeros", shared.shape, shared.dtype), name=name, requires_grad=False)
    parameter.set_data(shared)
    return parameter
