"""Which versions of the packages underneath can work, checked from their metadata, and what differs between them.

Importing this module imports nothing heavy; the functions at its end import what they need of vLLM.
"""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib import metadata

MINIMUM_PYTHON = (3, 11)


@dataclass(frozen=True)
class Requirement:
    """Versions of `distribution` from `minimum` (included) up to `below` (excluded), and why there is a limit."""

    distribution: str
    minimum: str
    below: str
    reason: str
    advice: str

    @property
    def supported(self) -> str:
        return f">={self.minimum},<{self.below}"


REQUIREMENTS = (
    Requirement(
        "vllm",
        "0.32",
        "0.34",
        "the worker and the platform follow the internals of vLLM 0.32 and 0.33",
        "See docs/installation.md for how to build vLLM without device kernels.",
    ),
    Requirement(
        "torch",
        "2.13",
        "2.15",
        "vLLM 0.32 is written for PyTorch 2.13, vLLM 0.33 for 2.14",
        "Install the CPU build: pip install 'torch==2.13.0' --index-url https://download.pytorch.org/whl/cpu",
    ),
    Requirement(
        "mindspore",
        "2.10",
        "2.11",
        "operators and graphs are built and tested against MindSpore 2.10",
        "pip install 'mindspore==2.10.0'",
    ),
    Requirement(
        "numpy",
        "1.25",
        "2",
        "MindSpore 2.10 is built for NumPy 1.x: under NumPy 2 its first operation fails with 'Numpy init failed'",
        "pip install 'numpy==1.26.4'",
    ),
)


class UnsupportedEnvironmentError(RuntimeError):
    """This Python environment cannot run vllm-mindspore; `problems` has one sentence per reason."""

    def __init__(self, problems: list[str]):
        super().__init__(
            "vllm-mindspore cannot run in this environment:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\n`vllm-mindspore env` prints all versions; docs/installation.md has the supported ones."
        )
        self.problems = problems


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution from its metadata, or None when it is not installed or unreadable."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The release numbers, so that a development or local build counts as its release: 0.32.0+empty -> (0, 32, 0)."""
    from packaging.version import Version

    return Version(version).release


def _problem(requirement: Requirement) -> str | None:
    name = requirement.distribution
    found = installed_version(name)
    needed = f"{name}{requirement.supported} is needed. {requirement.advice}"
    if found is None:
        return f"{name} is not installed; {needed}"
    try:
        release = _release(found)
    except ValueError:
        return f"{name} has the unreadable version {found!r}; {needed}"
    if _release(requirement.minimum) <= release < _release(requirement.below):
        return None
    return f"{name} {found} is not supported ({requirement.supported}): {requirement.reason}. {requirement.advice}"


def check_environment() -> list[str]:
    """One sentence per problem that keeps this package from running: what was found, what is supported, what to do."""
    problems = []
    if sys.version_info < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        problems.append(f"Python {sys.version.split()[0]} is not supported; Python {wanted} or later is needed.")
    problems.extend(problem for problem in map(_problem, REQUIREMENTS) if problem)
    return problems


def require_supported_environment() -> None:
    """Raise `UnsupportedEnvironmentError` with every problem that `check_environment` finds."""
    problems = check_environment()
    if problems:
        raise UnsupportedEnvironmentError(problems)


def _kv_cache_planning():
    """vLLM's module that sizes and groups KV caches: `kv_cache_utils` in 0.32, `kv_cache_planning` from 0.33 on."""
    moved = "vllm.v1.core.kv_cache_planning"
    return importlib.import_module(moved if importlib.util.find_spec(moved) else "vllm.v1.core.kv_cache_utils")


def kv_cache_groups(vllm_config, specs: dict) -> list:
    """The KV cache groups (`KVCacheGroupSpec`) that vLLM's engine forms from {layer name: `KVCacheSpec`}.

    From 0.33 on a builder, chosen by the platform, groups the layers, and lets models have a say.
    """
    planning = _kv_cache_planning()
    if not hasattr(planning, "get_kv_cache_groups_from_builder"):
        return planning.get_kv_cache_groups(vllm_config, specs)
    builder = importlib.import_module("vllm.v1.core.kv_cache_config_builder").get_kv_cache_config_builder(vllm_config)
    return planning.get_kv_cache_groups_from_builder(builder, vllm_config, specs)


def kv_cache_groups_of_stage(groups: list, specs: dict) -> list:
    """`groups` of all pipeline stages with only the layers in `specs`, which are one stage's."""
    return _kv_cache_planning()._project_kv_cache_groups_to_worker(groups, specs)


def kv_cache_config(vllm_config, groups: list, num_blocks: int):
    """vLLM's `KVCacheConfig` of `groups` with exactly `num_blocks` blocks, whatever --num-gpu-blocks-override says."""
    cache = vllm_config.cache_config
    override, cache.num_gpu_blocks_override = cache.num_gpu_blocks_override, num_blocks
    try:
        return _kv_cache_planning().get_kv_cache_config_from_groups(vllm_config, groups, available_memory=0)
    finally:
        cache.num_gpu_blocks_override = override


def safetensors_files(loader, model_config) -> list[str]:
    """The safetensors files that vLLM's `DefaultModelLoader` reads the model from, downloaded; [] if there are none."""
    _, files, safetensors, _ = loader._prepare_weights(
        model_config.model, None, model_config.revision, fall_back_to_pt=True, allow_patterns_overrides=None
    )
    return files if safetensors else []
