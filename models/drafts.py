"""What vLLM's classes of drafts lack."""

import torch


def complete(model: torch.nn.Module) -> None:
    """Add to a draft's layers what its forward reads and its class does not set.

    openPangu's layer has DeepSeek's forward, which asks the decoder layer in it whether tokens are cut into parts for
    the ranks. They never are here (`config._update`).
    """
    for module in model.modules():
        layer = getattr(module, "mtp_block", None)
        if layer is not None and not hasattr(layer, "use_sequence_parallel_moe"):
            layer.use_sequence_parallel_moe = False
