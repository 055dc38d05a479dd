"""A decode step on one process and on two tensor-parallel ranks, and what collectives take of it.

    python -m tests.bench.ranks SHAPE-OR-MODEL [--batch 1 8 32] [--context 128] [--experts] [--timeline FILE]

One process has all CPUs, two ranks half of them each. Prints the median step of each, the time of its operators, and
which part of it is spent in collectives: by each rank while it waits for one that comes later, and once all have come.
Where they begin and end apart, what ends them counts as waiting.
--timeline writes when each operator of each rank ran, in the form of Chrome's traces, which ui.perfetto.dev shows too.
"""

import argparse
import collections
import json
import os
import random
import statistics
import time
from pathlib import Path

os.environ.setdefault("VLLM_MS_BACKEND", "mindspore")
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions for the ranks

from vllm import LLM, SamplingParams  # noqa: E402

from tests.bench import events, shapes  # noqa: E402

STEPS = 48
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")
COLUMNS = ("two ranks", "ranks / process", "rank 0 waits", "rank 1 waits", "collectives without that")

Events = list[events.Event]


def finish_start(worker) -> None:
    """Until all memory is resident: a thread that sees to it would take CPU from the first steps."""
    worker.model_runner.population.wait()


def begin_measuring(worker) -> None:
    events.measure(True)


def measured(worker) -> Events:
    return events.measured()


def shares(ranks: list[Events]) -> tuple[list[float], float]:
    """(of each rank's time in operators the part that waits for a later rank, and of all the part after that)."""
    whole = [sum(event.end - event.begin for event in rank) for rank in ranks]
    waited = [sum(event.end - event.begin for event in rank if event.name.endswith("_wait")) for rank in ranks]
    rest = sum(event.end - event.begin for rank in ranks for event in rank if event.name.endswith("_start"))
    for together in zip(*([event for event in rank if event.name in COLLECTIVES] for rank in ranks), strict=True):
        last = max(event.begin for event in together)
        for rank, event in enumerate(together):
            waited[rank] += last - event.begin
            rest += event.end - last
    return [part / all_of_it for part, all_of_it in zip(waited, whole, strict=True)], rest / sum(whole)


def by_operator(rank: Events) -> collections.Counter[str]:
    """Seconds by operator."""
    spent = collections.Counter()
    for event in rank:
        spent[event.name] += event.seconds
    return spent


def write_timeline(file: Path, ranks: list[Events]) -> None:
    first = min(event.begin for rank in ranks for event in rank)
    trace = [
        {"name": event.name, "ph": "X", "pid": 0, "tid": rank, "ts": (event.begin - first) / 1e3,
         "dur": (event.end - event.begin) / 1e3, "args": {"columns": event.columns}}
        for rank, found in enumerate(ranks) for event in found
    ]  # fmt: skip
    file.write_text(json.dumps({"traceEvents": trace}))


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
    parser.add_argument("--experts", action="store_true", help="spread over the ranks (--enable-expert-parallel)")
    parser.add_argument("--timeline", type=Path, help="of the two ranks, with the last of the batches")
    options = parser.parse_args()
    steps: dict[int, list[list[float]]] = {batch: [] for batch in options.batch}
    found: dict[int, list[list[Events]]] = {batch: [] for batch in options.batch}
    for ranks in (1, 2):
        llm = LLM(
            str(shapes.find(options.model)), dtype="bfloat16", tensor_parallel_size=ranks, max_model_len=2048,
            max_num_seqs=64, enable_prefix_caching=False, disable_log_stats=True, distributed_executor_backend="mp",
            enable_expert_parallel=options.experts and ranks > 1,
        )  # fmt: skip
        llm.collective_rpc(finish_start)
        for batch in options.batch:
            steps[batch].append(decode(llm, batch, options.context))
            found[batch].append(llm.collective_rpc(measured))
        llm.llm_engine.engine_core.shutdown()
    print(f"| batch | one process | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|", sep="\n")
    for batch in options.batch:
        one, two = map(statistics.median, steps[batch])
        (first, second), rest = shares(found[batch][1])
        print(f"| {batch} | {one * 1e3:.1f} ms | {two * 1e3:.1f} ms | {two / one:.2f} | ", end="")
        print(f"{first:.1%} | {second:.1%} | {rest:.1%} |")
    for batch in options.batch:
        print(f"\nmilliseconds of a step of {batch} in operators: one process, and each of the ranks")
        of_each = [
            (by_operator(rank), len(seconds))
            for ranks, seconds in zip(found[batch], steps[batch], strict=True)
            for rank in ranks
        ]
        names = sorted({name for spent, _ in of_each for name in spent}, key=lambda name: -of_each[1][0][name])
        for name in names:
            print(f"  {name:28}", *(f"{spent[name] / count * 1e3:9.3f}" for spent, count in of_each))
    if options.timeline:
        write_timeline(options.timeline, found[batch][1])


if __name__ == "__main__":
    main()
