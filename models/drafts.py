"""What vLLM's classes of drafts lack."""

from collections.abc import Iterable

import torch

# By class: parts of tensor names in checkpoints, and what the class calls them. vLLM's class of the model itself knows.
TENSOR_NAMES = {"OpenPanguMTP": {"mlp.e_score_correction_bias": "mlp.gate.e_score_correction_bias"}}


def complete(draft: torch.nn.Module) -> None:
    """Add to a draft what its forward reads and its class does not set, and the tensor names that it does not know.

    openPangu's layer has DeepSeek's forward, which asks the decoder layer in it whether tokens are cut into parts for
    the ranks. They never are here (`config._update`).
    """
    for module in draft.modules():
        layer = getattr(module, "mtp_block", None)
        if layer is not None and not hasattr(layer, "use_sequence_parallel_moe"):
            layer.use_sequence_parallel_moe = False
    names = TENSOR_NAMES.get(type(draft).__name__, {})
    load_weights = draft.load_weights

    def load_renamed(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights((_renamed(name, names), tensor) for name, tensor in weights)

    if names:
        draft.load_weights = load_renamed


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name
