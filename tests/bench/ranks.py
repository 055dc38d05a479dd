"""A decode step on one process and on two tensor-parallel ranks, and what collectives take of it.

    python -m tests.bench.ranks SHAPE-OR-MODEL [--batch 1 8 32] [--context 128]

One process has all CPUs, two ranks half of them each. Prints the median step of each, and of the ranks' operators the
share of those that wait for another rank, which includes the time by which that one is late.
"""

import argparse
import os
import random
import statistics
import time

os.environ.setdefault("VLLM_MS_BACKEND", "mindspore")
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions for the ranks

from vllm import LLM, SamplingParams  # noqa: E402

from tests.bench import shapes  # noqa: E402

STEPS = 48
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


def begin_measuring(worker) -> None:
    from vllm_mindspore.ops import build

    build.load().vllm_ms_measure_steps(1)


def measured(worker) -> dict[str, float]:
    """Seconds by operator since measuring began."""
    from tests.bench.step import operators

    found: dict[str, float] = {}
    for (name, _), (_, seconds) in operators().items():
        found[name] = found.get(name, 0.0) + seconds
    return found


def decode(llm: LLM, batch: int, context: int) -> list[float]:
    """Seconds of the steps in which all requests decode."""
    engine, params = llm.llm_engine, SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
    for i in range(batch):
        prompt = random.Random(i).choices(range(7000), k=context)
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    seconds, started = [], set()
    while engine.has_unfinished_requests():
        all_decode, begin = len(started) == batch, time.perf_counter()
        if all_decode and not seconds:
            llm.collective_rpc(begin_measuring)
            begin = time.perf_counter()
        outputs = engine.step()
        if all_decode and len(outputs) == batch:
            seconds.append(time.perf_counter() - begin)
        started |= {output.request_id for output in outputs}
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"{', '.join(shapes.SHAPES)}, or a folder")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128)
    options = parser.parse_args()
    found: dict[int, list[float]] = {batch: [] for batch in options.batch}
    shares: dict[int, float] = {}
    for ranks in (1, 2):
        llm = LLM(
            str(shapes.find(options.model)), dtype="bfloat16", tensor_parallel_size=ranks, max_model_len=2048,
            max_num_seqs=64, enable_prefix_caching=False, disable_log_stats=True, distributed_executor_backend="mp",
        )  # fmt: skip
        for batch in options.batch:
            found[batch].append(statistics.median(decode(llm, batch, options.context)))
            spent = llm.collective_rpc(measured)[0]
            shares[batch] = sum(spent.get(name, 0.0) for name in COLLECTIVES) / sum(spent.values())
        llm.llm_engine.engine_core.shutdown()
    print("| batch | one process | two ranks | ranks / process | collectives' share |", "|---" * 5 + "|", sep="\n")
    for batch, (one, two) in found.items():
        print(f"| {batch} | {one * 1e3:.1f} ms | {two * 1e3:.1f} ms | {two / one:.2f} | {shares[batch]:.1%} |")


if __name__ == "__main__":
    main()
