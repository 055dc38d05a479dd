"""An emitted network with its weights: compiled once by MindSpore, then called every step.

`Counters` are what the tests and `/metrics` look at: a mixed workload must not compile anything again.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from vllm.logger import init_logger

from vllm_mindspore.compiler.emit import EmittedGraph
from vllm_mindspore.compiler.tensors import shared_parameter
from vllm_mindspore.ops.cpu import in_columns, renew_addresses

logger = init_logger("vllm.vllm_mindspore.compiler")

# MindSpore's name of the phase in which a compiled graph is called without matching its arguments anew.
FIXED_GRAPH_PHASE = "increment"


@dataclass
class Counters:
    """compiles: graphs MindSpore compiled; loads: graphs it took from the disk cache; calls: executions."""

    compiles: int = 0
    loads: int = 0
    calls: int = 0
    seconds: float = 0.0


def load_module(path: Path):
    """Import an emitted source file (MindSpore parses functions of real files only)."""
    name = f"vllm_mindspore_emitted_{path.parent.name.replace('-', '_')}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def compiled_graphs() -> int:
    """How many graphs MindSpore has compiled (or loaded) in this process."""
    from mindspore.graph.api import ms_compile_cache

    return len(ms_compile_cache)


class Program:
    """One graph: call it with the step's tensors in the order of `emitted.inputs`."""

    def __init__(
        self,
        emitted: EmittedGraph,
        path: Path,
        weights: dict[str, torch.Tensor],
        eager: bool,
        columns: Mapping[str, bool] = MappingProxyType({}),
    ):
        """weights: torch tensors by name, shared with MindSpore, never copied. eager: run in PyNative. columns: the
        weights that are in columns, and whether these are coded.

        Raises:
            KeyError: a weight the network reads is missing.
        """
        missing = [item.name for item in emitted.weights if item.name not in weights]
        if missing:
            raise KeyError(f"graph {emitted.name}: the model has no weights {missing}")
        self.emitted, self.path, self.eager = emitted, path, eager
        self.counters = Counters()
        parameters = {
            item.name: shared_parameter(weights[item.name].contiguous(), item.name) for item in emitted.weights
        }
        self.shared = {
            item.name: parameters[item.name].asnumpy().ctypes.data == weights[item.name].data_ptr()
            for item in emitted.weights
        }
        self._parameters = parameters
        self._set_columns(columns)
        self.network = load_module(path).Network(parameters)
        self.network.set_train(False)
        self._run = self.network.construct

    def _set_columns(self, columns: Mapping[str, bool]) -> None:
        self.columns = {name: coded for name, coded in columns.items() if name in self._parameters}
        for name, coded in self.columns.items():
            in_columns(self._parameters[name], coded)

    def weights_changed(self, columns: Mapping[str, bool]) -> None:
        """The weights in columns are the same with other values, and others of them may be coded."""
        self._set_columns(columns)
        renew_addresses(self.network)

    def compile(
        self, signature: list[tuple[tuple[int | None, ...], torch.dtype]], cached_files: Callable[[], object | None]
    ) -> None:
        """Set up the graph for inputs of these shapes (None: any size); compiled, or loaded, at the first call.

        cached_files: the state of MindSpore's disk cache; unchanged by a first call that only loads.
        """
        if self.eager:
            return
        import mindspore as ms

        types = {torch.int64: ms.int64, torch.int32: ms.int32, torch.float32: ms.float32}
        types.update({torch.bfloat16: ms.bfloat16, torch.float16: ms.float16})
        self.network.set_inputs(*(ms.Tensor(shape=list(shape), dtype=types[dtype]) for shape, dtype in signature))
        self.network.phase = FIXED_GRAPH_PHASE
        self._run = ms.jit(self.network.construct, capture_mode="ast", jit_level="O0")
        self._cached_files = cached_files

    def __call__(self, inputs: list):
        """Run with MindSpore tensors; returns one MindSpore tensor or a tuple of them."""
        if self.counters.calls == 0 and not self.eager:
            return self._first_call(inputs)
        self.counters.calls += 1
        return self._run(*inputs)

    def _first_call(self, inputs: list):
        begin, compiled_before, files_before = time.perf_counter(), compiled_graphs(), self._cached_files()
        result = self._run(*inputs)
        self.counters.calls += 1
        self.counters.seconds = time.perf_counter() - begin
        loaded = bool(files_before) and self._cached_files() == files_before
        count = compiled_graphs() - compiled_before
        self.counters.loads += count * loaded
        self.counters.compiles += count * (not loaded)
        verb = "loaded from cache" if loaded else "compiled"
        logger.info("graph %s: %s in %.1f s", self.emitted.name, verb, self.counters.seconds)
        return result
