"""The compile pipeline of one engine: capture → legalize → passes → bind → emit → compile, or the disk cache.

A `Compiler` belongs to one model runner. Nothing here is global: two engines in one process have two compilers.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vllm.logger import init_logger

from vllm_mindspore import options
from vllm_mindspore.compiler import arrangement, cache
from vllm_mindspore.compiler.bind import KVGroup, bind_kv_groups
from vllm_mindspore.compiler.capture import CapturedGraph, GraphInput
from vllm_mindspore.compiler.emit import EmittedGraph, emit
from vllm_mindspore.compiler.legalize import legalize
from vllm_mindspore.compiler.program import Program, compiled_graphs
from vllm_mindspore.graph_passes import PASSES, PassManager, PassReport
from vllm_mindspore.ops import columns

logger = init_logger("vllm.vllm_mindspore.compiler")

GRAPHS_FILE, CONSTANTS_FILE = "graphs.json", "constants.safetensors"


@dataclass
class LoweredGraph:
    """An emitted network, where its source is, and the constants it needs beside the model's weights."""

    emitted: EmittedGraph
    path: Path
    passes: dict[str, int] = field(default_factory=dict)


def lower(
    captured: CapturedGraph,
    passes: PassManager,
    groups: list[KVGroup],
    weights: dict[str, tuple[tuple[int, ...], torch.dtype]],
    device: str,
    title: str,
) -> tuple[EmittedGraph, list[PassReport]]:
    """Legalize, optimize, bind and write a captured graph; its constants are renamed to be unique among graphs.

    Raises:
        UnmappedOperatorError: an operator of the model has no meaning in MindSpore.
    """
    name = captured.name
    legalize(captured)
    reports = passes.run(captured.module.graph)
    bind_kv_groups(captured, groups)
    captured.inputs = [
        GraphInput(item.kind, f"{name}.{item.name}") if item.kind == "constant" else item for item in captured.inputs
    ]
    captured.constants = {f"{name}.{key}": value for key, value in captured.constants.items()}
    stored = {key: dtype for key, (_, dtype) in weights.items()}
    stored.update({key: value.dtype for key, value in captured.constants.items()})
    return emit(captured, stored, device, f"{title}: the {name} graph."), reports


class Compiler:
    """Turns captured functions into programs and keeps them on disk.

    facts: everything the graphs depend on (model configuration, versions, …). weights: shape and storage type of each
    of the model's parameters and buffers. groups: the KV cache groups. All are hashed into the cache key.
    """

    def __init__(
        self,
        facts: dict[str, object],
        weights: dict[str, tuple[tuple[int, ...], torch.dtype]],
        groups: list[KVGroup],
        device: str,
        eager: bool,
    ):
        self.weights, self.groups, self.device, self.eager = weights, groups, device, eager
        self.passes = PassManager(PASSES, options.disabled_passes())
        signature = {
            "weights": {name: [list(shape), str(dtype)] for name, (shape, dtype) in weights.items()},
            "groups": [[list(group.layers), group.block_size] for group in groups],
            "passes": [graph_pass.name for graph_pass in self.passes.passes],
            "device": device,
            "eager": eager,
            "columns": device == "cpu" and columns.supported(),
        }
        self.key = cache.content_key({**facts, **signature})
        self.graphs: dict[str, LoweredGraph] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.columns: dict[str, bool] = {}
        self.programs: dict[str, Program] = {}
        self.from_cache = False
        self.seconds = 0.0
        self._resources = ExitStack()

    def open(self) -> bool:
        """Lock this model's cache entry and load the lowered graphs; False when they must be built."""
        self.entry, self.from_cache = self._resources.enter_context(cache.locked_entry(self.key))
        if self.from_cache:
            self._load()
            logger.info("graphs of this model found in %s", self.entry.path)
        return self.from_cache

    def add(self, captured: CapturedGraph, title: str) -> None:
        """Legalize, optimize and write a captured graph.

        Raises:
            UnmappedOperatorError: an operator of the model has no meaning in MindSpore.
        """
        begin = time.perf_counter()
        name = captured.name
        emitted, reports = lower(captured, self.passes, self.groups, self.weights, self.device, title)
        path = self.entry.path / f"{name}.py"
        path.write_text(emitted.source)
        self.constants.update(captured.constants)
        self.graphs[name] = LoweredGraph(emitted, path, {report.name: report.matches for report in reports})
        self._save()
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        logger.info("graph %s lowered in %.1f s (%s): %s", name, seconds, _summary(reports), path)

    def arrange(self, weights: dict[str, torch.Tensor]) -> None:
        """Put weights into the order in which the graphs' operators read them fastest, in place.

        weights: all tensors of the model by name, with their values.
        """
        emitted = [graph.emitted for graph in self.graphs.values()]
        groups = arrangement.chosen((graph.columns, (item.name for item in graph.weights)) for graph in emitted)
        begin = time.perf_counter()
        self.columns = arrangement.arrange(groups, weights)
        logger.info(
            "%d weights in columns, %d of them coded in 12 bits, in %.1f s",
            len(self.columns),
            sum(self.columns.values()),
            time.perf_counter() - begin,
        )

    @contextmanager
    def in_rows(self, weights: dict[str, torch.Tensor]) -> Iterator[None]:
        """While vLLM reads or writes weights: in the order that it knows. Programs go on with the new values."""
        arrangement.to_rows(self.columns, weights)
        try:
            yield
        finally:
            self.arrange(weights)
            for program in self.programs.values():
                program.weights_changed(self.columns)

    def program(self, name: str, weights: dict[str, torch.Tensor]) -> Program:
        """The program of a lowered graph, on the memory of `weights`."""
        graph = self.graphs[name]
        program = Program(graph.emitted, graph.path, {**weights, **self.constants}, self.eager, self.columns)
        self.programs[name] = program
        return program

    @contextmanager
    def mindspore_cache(self) -> Iterator[None]:
        """While the graphs run for the first time: MindSpore reads and writes its compile cache in our entry.

        MindSpore numbers the graphs of a process and binds its cache directory once, so only the first engine of a
        process that compiles nothing else before uses it; others compile.
        """
        import mindspore.graph.api

        usable = not self.eager and cache.cache_enabled() and compiled_graphs() == 0
        if not usable:
            yield
            return
        script = mindspore.graph.api.entry_script_path
        mindspore.graph.api.entry_script_path = str(self.graphs["model"].path)
        os.environ.update(MS_COMPILER_CACHE_ENABLE="1", MS_COMPILER_CACHE_PATH=str(self.entry.path))
        try:
            yield
        finally:
            mindspore.graph.api.entry_script_path = script
            os.environ["MS_COMPILER_CACHE_ENABLE"] = "0"

    def compiled_files(self) -> dict[str, int] | None:
        """State of MindSpore's files in the entry, or None when it does not use them."""
        return self.entry.compiled_files() if os.environ.get("MS_COMPILER_CACHE_ENABLE") == "1" else None

    @contextmanager
    def building(self) -> Iterator[None]:
        """Work on the entry: after a failure its lock is released, and the next start builds it again."""
        try:
            yield
        except BaseException:
            self._resources.close()
            raise

    def close(self) -> None:
        """Seal the entry and release its lock."""
        if cache.cache_enabled() and self.entry.check():
            self.entry.seal()
        self._resources.close()

    def _save(self) -> None:
        graphs = {
            name: {
                "passes": graph.passes,
                "weights": [asdict(item) for item in graph.emitted.weights],
                "inputs": [asdict(item) for item in graph.emitted.inputs],
                "outputs": graph.emitted.outputs,
                "packed": graph.emitted.packed,
                "columns": graph.emitted.columns,
                "layer_classes": graph.emitted.layer_classes,
                "operators": graph.emitted.operators,
            }
            for name, graph in self.graphs.items()
        }
        (self.entry.path / GRAPHS_FILE).write_text(json.dumps(graphs, indent=1))
        if self.constants:
            save_file(
                {name: value.contiguous() for name, value in self.constants.items()}, self.entry.path / CONSTANTS_FILE
            )

    def _load(self) -> None:
        for name, graph in json.loads((self.entry.path / GRAPHS_FILE).read_text()).items():
            path = self.entry.path / f"{name}.py"
            weights, inputs = (tuple(GraphInput(**item) for item in graph[kind]) for kind in ("weights", "inputs"))
            outputs = tuple(map(tuple, graph["outputs"]))
            groups = tuple(map(tuple, graph["columns"]))
            rest = (graph[field] for field in ("layer_classes", "operators"))
            emitted = EmittedGraph(name, path.read_text(), weights, inputs, outputs, graph["packed"], groups, *rest)
            self.graphs[name] = LoweredGraph(emitted, path, graph["passes"])
        constants = self.entry.path / CONSTANTS_FILE
        self.constants = load_file(constants) if constants.is_file() else {}


def _summary(reports: list[PassReport]) -> str:
    return ", ".join(f"{report.name} {report.matches}" for report in reports) or "no passes"
