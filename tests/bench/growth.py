"""How the time of a decode step grows with batch, context and layers: `make bench-growth`.

    python -m tests.bench.growth MODEL batch|context|layers [--figure file.svg]

Each point is the median over the decode steps of some rounds, each of which goes through all points; for the context it
is the attention operator alone, each round's mean. An edge is a pair of neighbours, like 8 and 9 requests.
"""

import argparse
import collections
import json
import statistics
import subprocess
import sys
from pathlib import Path

from tests.bench import shapes
from tests.bench.figures import save

BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 24, 25, 31, 32, 33, 36, 37, 48, 49, 63, 64)
CONTEXTS = (128, 255, 257, 511, 513, 1023, 1025, 2047, 2049, 4095, 4097, 8191, 8193, 16384, 32768)
LAYERS = (1, 2, 4, 8, 16, 28)
CONTEXT_LAYERS = 2  # enough for the attention of one layer, and prompts of 32k tokens are read in a minute
STEPS = 16
ROUNDS = 3


def by_batch(model: str) -> dict[int, float]:
    from tests.bench.step import Engine

    engine = Engine(model, 128 + 2 * STEPS + max(BATCHES), max(BATCHES))
    points = collections.defaultdict(list)
    for _ in range(ROUNDS):
        for batch in BATCHES:
            points[batch] += engine.steps(batch, 128, STEPS)
    return medians(points)


def by_context(model: str) -> dict[int, float]:
    from tests.bench.step import Engine

    overrides = {"num_hidden_layers": CONTEXT_LAYERS}
    engine = Engine(model, max(CONTEXTS) + 2 * STEPS, 1, hf_overrides=overrides, load_format="dummy")
    points = collections.defaultdict(list)
    for _ in range(ROUNDS):
        for context in CONTEXTS:
            engine.steps(1, context, STEPS)
            calls, seconds = next(spent for (name, _), spent in engine.operators.items() if "attention" in name)
            points[context].append(seconds / calls)
    return medians(points)


def of_layers(model: str, layers: int) -> float:
    from tests.bench.step import Engine

    engine = Engine(model, 128 + 2 * STEPS, 1, hf_overrides={"num_hidden_layers": layers}, load_format="dummy")
    return statistics.median(engine.steps(1, 128, ROUNDS * STEPS))


def by_layers(model: str) -> dict[int, float]:
    points = {}
    for layers in LAYERS:  # an engine of its own each, in a process of its own
        command = [sys.executable, "-m", "tests.bench.growth", model, "layers", "--only", str(layers)]
        points[layers] = float(subprocess.check_output(command, text=True).split()[-1])
    return points


def medians(points: dict[int, list[float]]) -> dict[int, float]:
    return {size: statistics.median(seconds) for size, seconds in points.items()}


def edges(points: dict[int, float]) -> dict[tuple[int, int], float]:
    """{(size, next size): how much more time the next one takes}, where they are at most a fiftieth or 1 apart."""
    sizes = list(points)
    return {
        (a, b): points[b] / points[a] - 1 for a, b in zip(sizes, sizes[1:], strict=False) if b - a <= max(1, a // 50)
    }


def draw(points: dict[int, float], what: str, file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    axes.plot(list(points), [seconds * 1e3 for seconds in points.values()], marker="o", markersize=3)
    if what == "context":
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    axes.set_xlabel({"batch": "requests", "context": "tokens of context", "layers": "layers"}[what])
    axes.set_ylabel("attention of a layer, ms" if what == "context" else "decode step, ms")
    axes.set_ylim(bottom=None if what == "context" else 0)
    save(figure, axes, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("what", choices=("batch", "context", "layers"))
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if options.only:
        print(of_layers(options.model, options.only))
        return
    model = str(shapes.find(options.model))
    points = {"batch": by_batch, "context": by_context, "layers": by_layers}[options.what](model)
    print(json.dumps(points))
    for size, seconds in points.items():
        print(f"{size:8} {seconds * 1e3:9.3f} ms")
    for (a, b), more in edges(points).items():
        print(f"{a:8} to {b}: {more:+.1%}")
    if options.figure:
        draw(points, options.what, options.figure)


if __name__ == "__main__":
    main()
