"""Captures and lowers a model without weights, an engine or MindSpore's compiler: for `vllm-mindspore inspect`."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import vllm.ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_mindspore import options
from vllm_mindspore.compiler import cache
from vllm_mindspore.compiler.emit import EmittedGraph
from vllm_mindspore.compiler.pipeline import lower
from vllm_mindspore.graph_passes import PASSES, GraphPass, PassManager, PassReport
from vllm_mindspore.ops import registry
from vllm_mindspore.worker import facts, kv_groups, layers, mla, model_capture


@dataclass(frozen=True)
class InspectedGraph:
    """A graph's passes with their texts, its emitted network, and the file that holds the source."""

    name: str
    passes: list[PassReport]
    emitted: EmittedGraph
    path: Path


def passes() -> list[GraphPass]:
    """The passes that are not disabled."""
    return PassManager(PASSES, options.disabled_passes()).passes


@contextmanager
def _single_process() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        try:
            yield
        finally:
            destroy_model_parallel()  # its groups are those of one model: only experts have theirs
            destroy_distributed_environment()


def inspect(vllm_config: VllmConfig) -> list[InspectedGraph]:
    """Both graphs of the model of `vllm_config`; sources go to `<cache>/inspected/<architecture>`."""
    registry.define_all()
    vllm.ir.set_default_torch_wrap(True)
    architecture = vllm_config.model_config.architecture
    folder = cache.cache_directory() / "inspected" / architecture
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with set_current_vllm_config(vllm_config), _single_process():
        layers.register()
        with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("cpu"):
            model = initialize_model(vllm_config=vllm_config)
        mla.adopt(model)
        groups = kv_groups.for_graphs(kv_groups.of_model(vllm_config))
        weights, graphs = facts.weights_of(facts.tensors_of(model)), []
        for captured in model_capture.capture_model(model, vllm_config):
            manager = PassManager(PASSES, options.disabled_passes(), keep_text=True)
            emitted, reports = lower(captured, manager, groups, weights, "cpu", architecture)
            path = folder / f"{captured.name}.py"
            path.write_text(emitted.source)
            graphs.append(InspectedGraph(captured.name, reports, emitted, path))
    return graphs
