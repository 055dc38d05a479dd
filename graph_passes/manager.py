"""Runs the passes in order, counts their matches and, when asked, keeps the graph's text around each."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GraphPass:
    """A named rewrite: takes an FX graph, changes it in place, returns how many times it matched."""

    name: str
    run: Callable[[torch.fx.Graph], int]


@dataclass(frozen=True)
class PassReport:
    """What one pass did. `before` and `after` are the graph's text, empty unless the manager keeps it."""

    name: str
    matches: int
    seconds: float
    before: str = ""
    after: str = ""


class UnknownPassError(ValueError):
    """A pass named in `VLLM_MS_DISABLE_PASSES` does not exist."""


class PassManager:
    """Runs `passes` on graphs, without those in `disabled`.

    Raises:
        UnknownPassError: `disabled` names a pass that does not exist.
    """

    def __init__(self, passes: Sequence[GraphPass], disabled: Collection[str] = (), keep_text: bool = False):
        names = [graph_pass.name for graph_pass in passes]
        unknown = sorted(set(disabled) - set(names))
        if unknown:
            raise UnknownPassError(f"VLLM_MS_DISABLE_PASSES: unknown pass {unknown}; the passes are {names}")
        self.passes = [graph_pass for graph_pass in passes if graph_pass.name not in disabled]
        self.keep_text = keep_text

    def run(self, graph: torch.fx.Graph) -> list[PassReport]:
        """Run every pass once, in order; dead nodes are removed and the graph is checked after each."""
        reports = []
        for graph_pass in self.passes:
            before = str(graph) if self.keep_text else ""
            begin = time.perf_counter()
            matches = graph_pass.run(graph)
            graph.eliminate_dead_code()
            graph.lint()
            after = str(graph) if self.keep_text else ""
            reports.append(PassReport(graph_pass.name, matches, time.perf_counter() - begin, before, after))
        return reports
