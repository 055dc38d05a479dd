"""Entry points that vLLM calls in each of its processes. Nothing heavy may be imported here.

`register_platform` is found through `vllm.platform_plugins` (called twice a process, lazily) and `register` through
`vllm.general_plugins` (API process, engine core, workers, and the subprocess that inspects model classes).
"""

import contextlib
import os

PLATFORM = "vllm_mindspore.platform.MindSporePlatform"

# Read by vLLM when it is imported or configured; a value the user has set wins.
DEFAULT_ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the worker implements the V1 runner contract
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork after any MindSpore operation hangs
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1",  # no device streams on a host CPU
}


def register_platform() -> str:
    """Name the platform class: this package being installed chooses MindSpore.

    Raises:
        SystemExit: an installed package's version cannot work, or `VLLM_MS_BACKEND` names no backend of ours. vLLM
            swallows ordinary exceptions of this function and would go on without a platform.
    """
    from vllm_mindspore import compat, options, processes

    try:
        compat.require_supported_environment()
        options.backend_from_environment()
    except (compat.UnsupportedEnvironmentError, options.UnknownBackendError) as error:
        raise SystemExit(str(error)) from None
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    processes.use_private_socket_directory()
    _load_operators_early()
    return PLATFORM


def _load_operators_early() -> None:
    """Put the operators' library before the hundreds that vLLM and MindSpore bring.

    MindSpore opens it by name before each launch of an operator, and the linker looks through what is loaded in order.
    """
    from vllm_mindspore.ops import build

    with contextlib.suppress(build.BuildError):  # said where the operators are needed
        build.load()


def register() -> None:
    """Register what vLLM's own registries take: environment variables, models and quantization methods of ours."""
    from vllm_mindspore import models, options, processes, quantization

    options.register_environment()
    models.register()
    quantization.register()
    processes.exit_with_parent()
