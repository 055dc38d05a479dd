"""Every attribute of vLLM or torch that this package replaces at run time. The target is an empty list.

Each patch names the hook whose existence would remove it. `vllm-mindspore env` prints their number.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """One replaced attribute: where it is, why, and which hook would remove it."""

    attribute: str
    reason: str
    hook_wanted: str
    apply: Callable[[], None]


def _accelerator_cache() -> None:
    import torch

    if torch.accelerator.is_available():
        return

    def nothing(*args, **kwargs) -> None:
        """There is no accelerator, so no cache of one."""

    torch.accelerator.empty_cache = nothing


def _accelerator_host_cache() -> None:
    import torch

    if torch.accelerator.is_available() or not hasattr(torch.accelerator, "empty_host_cache"):
        return

    def nothing(*args, **kwargs) -> None:
        """There is no accelerator, so no host cache of one."""

    torch.accelerator.empty_host_cache = nothing


PATCHES = [
    Patch(
        "torch.accelerator.empty_cache",
        "vLLM calls it at model load and shutdown on all platforms but its own CPU one; it needs an accelerator",
        "a Platform.empty_cache() method in vLLM",
        _accelerator_cache,
    ),
    Patch(
        "torch.accelerator.empty_host_cache",
        "as above, at shutdown",
        "a Platform.empty_host_cache() method in vLLM",
        _accelerator_host_cache,
    ),
]


def apply_all() -> None:
    """Apply every patch; idempotent."""
    for patch in PATCHES:
        patch.apply()
