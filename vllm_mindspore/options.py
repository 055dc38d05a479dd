"""The options of this backend: environment variables, and the `--backend` argument of vLLM's commands.

`--backend` is not a field of vLLM's EngineArgs, so its value travels in `VLLM_MS_BACKEND`, which child processes
inherit. It is checked in the parser, and again when a process configures the engine.
"""

import argparse
import os

BACKENDS = ("mindspore",)
BACKEND_VARIABLE = "VLLM_MS_BACKEND"
SERVER_MIDDLEWARE = "vllm_mindspore.serving.engine_watch.EngineWatch"

# name -> what it does. One line each: `vllm-mindspore env` and docs/configuration.md print this table.
ENVIRONMENT = {
    BACKEND_VARIABLE: "backend that runs the model, as --backend; supported: mindspore",
    "VLLM_MS_CACHE_DIR": "directory of compiled graphs (default: vllm_mindspore in $XDG_CACHE_HOME or ~/.cache)",
    "VLLM_MS_DISABLE_CACHE": "1: neither read nor write the cache of compiled graphs",
    "VLLM_MS_DISABLE_PASSES": "comma-separated names of graph passes to leave out (see `vllm-mindspore inspect`)",
    "VLLM_MS_NUM_THREADS": "threads of the CPU operators (default: CPUs this process may run on)",
    "VLLM_MS_CPU_ISA": "force a lower instruction set: portable, avx2, avx512 or amx",
    "VLLM_MS_KV_CACHE_GIB": "GiB of KV cache on CPU, of each rank (default: see docs/configuration.md)",
    "VLLM_MS_COLLECTIVE_TIMEOUT": "seconds that a rank may keep the others waiting in a step (default: 60)",
}


class UnknownBackendError(ValueError):
    """The chosen backend is not one this package provides."""

    def __init__(self, value: str, source: str):
        super().__init__(
            f"{source}: unknown backend {value!r}. Supported: {', '.join(BACKENDS)}. "
            "Leave it out to run on MindSpore, or uninstall vllm-mindspore to run vLLM's built-in platforms."
        )


def check_backend(value: str, source: str) -> str:
    """Return the backend's canonical name or raise `UnknownBackendError` naming `source`."""
    name = value.strip().lower()
    if name not in BACKENDS:
        raise UnknownBackendError(value, source)
    return name


def backend_from_environment() -> str:
    """The backend chosen by `VLLM_MS_BACKEND`; this package being installed chooses MindSpore."""
    return check_backend(os.environ.get(BACKEND_VARIABLE, BACKENDS[0]), BACKEND_VARIABLE)


class _BackendAction(argparse.Action):
    """Checks the value where the user typed it, and hands it to child processes."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            name = check_backend(values, option_string or "--backend")
        except UnknownBackendError as error:
            parser.error(str(error))
        os.environ[BACKEND_VARIABLE] = name
        setattr(namespace, self.dest, name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--backend` to one of vLLM's parsers (serve, run-batch; a YAML --config goes through it too)."""
    if parser.get_default("middleware") == []:
        parser.set_defaults(middleware=[SERVER_MIDDLEWARE])  # a user's --middleware is appended
    try:
        parser.add_argument_group("MindSpore").add_argument(
            "--backend",
            action=_BackendAction,
            metavar="{" + ",".join(BACKENDS) + "}",
            default=os.environ.get(BACKEND_VARIABLE, BACKENDS[0]),
            help="Framework that runs the model (environment: VLLM_MS_BACKEND).",
        )
    except argparse.ArgumentError:
        # `vllm bench throughput` has a --backend of its own; VLLM_MS_BACKEND still selects.
        return


def register_environment() -> None:
    """Make vLLM know our variables, so that it neither warns about them nor drops them for its workers."""
    import vllm.envs

    for name in ENVIRONMENT:
        vllm.envs.environment_variables.setdefault(name, lambda name=name: os.environ.get(name))


def disabled_passes() -> set[str]:
    """Names in `VLLM_MS_DISABLE_PASSES`."""
    return {name.strip() for name in os.environ.get("VLLM_MS_DISABLE_PASSES", "").split(",") if name.strip()}
