"""A model of experts on one process and on two ranks, through real servers: `python -m tests.bench.layouts SHAPE`.

    python -m tests.bench.layouts SHAPE-OR-MODEL [--clients 32] [--layouts 'one process' 'TP 2']

All layouts have the same threads in total: two ranks have half of the CPUs each. One server runs at a time, asked by
`vllm bench serve` with so many clients at once, after a warm-up. Prints what each layout gives, and its throughput over
that of one process.
"""

import argparse
import tempfile
from pathlib import Path

from tests.bench import shapes
from tests.bench.serve import OPTIONS, ask
from tests.support import commands
from tests.support.server import Server

LAYOUTS = {
    "one process": [],
    "TP 2": ["--tensor-parallel-size", "2"],
    "TP 2, EP": ["--tensor-parallel-size", "2", "--enable-expert-parallel"],
    "DP 2, EP": ["--data-parallel-size", "2", "--enable-expert-parallel"],
}
COLUMNS = {"total tokens/s": "total_token_throughput", "TPOT, ms": "median_tpot_ms", "TTFT, ms": "median_ttft_ms"}


def measure(model: Path, options: list[str], clients: int) -> dict[str, float]:
    command = ["vllm", "serve", str(model), "--backend", "mindspore", *OPTIONS, *options]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        with Server(command, commands.free_port(), folder / "server.log") as server:
            asked = dict(tokens_in=256, tokens_out=64, clients=clients)
            ask(server, model, folder, prompts=clients, **asked)
            result = ask(server, model, folder, prompts=2 * clients, **asked)
    return {name: result[key] for name, key in COLUMNS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"{', '.join(shapes.SHAPES)}, or a folder")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    options = parser.parse_args()
    model, first = shapes.find(options.model), None
    print(f"| {options.model} | {' | '.join(COLUMNS)} | throughput / one process |", "|---" * 5 + "|", sep="\n")
    for name in options.layouts:
        found = measure(model, LAYOUTS[name], options.clients)
        first = first or found["total tokens/s"]
        figures = " | ".join(f"{value:.1f}" for value in found.values())
        print(f"| {name} | {figures} | {found['total tokens/s'] / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
