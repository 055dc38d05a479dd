"""How the time of a decode step grows with batch, context and layers: `make bench-growth`.

    python -m tests.bench.growth MODEL batch|context|layers [--figure file.svg]

Each point is the mean of a few steps of an engine in this process; for the context it is the attention operator alone.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tests.bench import shapes
from tests.bench.figures import save

BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64)
CONTEXTS = (128, 255, 257, 511, 513, 1023, 1025, 2047, 2049, 4095, 4097, 8191, 8193, 16384, 32768)
LAYERS = (1, 2, 4, 8, 16, 28)
CONTEXT_LAYERS = 2  # enough for the attention of one layer, and prompts of 32k tokens are read in a minute
STEPS = 16


def by_batch(model: str) -> dict[int, float]:
    from tests.bench.step import Engine

    engine = Engine(model, 128 + 2 * STEPS + max(BATCHES), max(BATCHES))
    return {batch: engine.steps(batch, 128, STEPS) / STEPS for batch in BATCHES}


def by_context(model: str) -> dict[int, float]:
    from tests.bench.step import Engine

    overrides = {"num_hidden_layers": CONTEXT_LAYERS}
    engine = Engine(model, max(CONTEXTS) + 2 * STEPS, 1, hf_overrides=overrides, load_format="dummy")
    points = {}
    for context in CONTEXTS:
        engine.steps(1, context, STEPS)
        calls, seconds = next(spent for (name, _), spent in engine.operators.items() if "attention" in name)
        points[context] = seconds / calls
    return points


def of_layers(model: str, layers: int) -> float:
    from tests.bench.step import Engine

    engine = Engine(model, 128 + 2 * STEPS, 1, hf_overrides={"num_hidden_layers": layers}, load_format="dummy")
    return engine.steps(1, 128, STEPS) / STEPS


def by_layers(model: str) -> dict[int, float]:
    points = {}
    for layers in LAYERS:  # an engine of its own each, in a process of its own
        command = [sys.executable, "-m", "tests.bench.growth", model, "layers", "--only", str(layers)]
        points[layers] = float(subprocess.check_output(command, text=True).split()[-1])
    return points


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
    if options.figure:
        draw(points, options.what, options.figure)


if __name__ == "__main__":
    main()
