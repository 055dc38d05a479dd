"""Where the time of a step goes: `make bench-step [SHAPES=dsv3-mini] [ARGS='--batch 1 8 32 --context 128']`.

One engine in this process. What is printed are means over the steps, in milliseconds: the parts of vLLM's step, and for
the graph every operator with the columns of its result. Steps that decode, or with `--prompts` those that read prompts.
"""

import argparse
import collections
import os
import random
import time
from collections.abc import Callable

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_MS_BACKEND", "mindspore")

from vllm import LLM, SamplingParams  # noqa: E402

from tests.bench import events, shapes  # noqa: E402


class Stopwatch:
    """Sums the time spent in methods, by name."""

    def __init__(self):
        self.seconds = collections.Counter()

    def watch(self, owner: object, method: str, name: str) -> None:
        function = getattr(owner, method)

        def timed(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        setattr(owner, method, timed)


def operators() -> dict[tuple[str, int], tuple[int, float]]:
    """{(operator, columns of its result): (calls, seconds)} since measuring began."""
    found = collections.defaultdict(list)
    for event in events.measured():
        found[event.name, event.columns].append(event.seconds)
    return {key: (len(seconds), sum(seconds)) for key, seconds in found.items()}


class Engine:
    """An engine in this process whose decode steps are taken apart: `parts` and `operators` of the last `steps`."""

    def __init__(self, model: str, longest: int, largest_batch: int, **options):
        """longest: tokens of a request, prompt and answer. options: of vLLM's LLM."""
        self.llm = LLM(
            model,
            max_model_len=longest + 16,
            max_num_seqs=largest_batch,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **{"dtype": "bfloat16", **options},
        )
        self.engine = self.llm.llm_engine
        self.vocabulary, self.draw = self.llm.get_tokenizer().vocab_size, random.Random(0)
        core = self.engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        self.watch = Stopwatch()
        self.watch.watch(core.scheduler, "schedule", "schedule")
        self.watch.watch(core.scheduler, "update_from_output", "update from output")
        self.watch.watch(runner, "execute_model", "run the model")
        self.watch.watch(runner, "_prepare_inputs", "prepare inputs")
        self.watch.watch(runner.model, "forward", "graph")
        self.watch.watch(runner, "sample_tokens", "sample")
        runner.population.wait()  # it would take CPU from the first steps

    def steps(self, batch: int, context: int, count: int) -> list[float]:
        """Seconds of each of `count` decode steps of `batch` requests with prompts of `context` random tokens."""
        self._add(batch, context, count + 8)
        running = set()
        while len(running) < batch:
            running |= {output.request_id for output in self.engine.step()}
        for _ in range(3):
            self.engine.step()
        seconds = self._measure(count, self.engine.step)
        self._finish()
        return seconds

    def prompt_steps(self, batch: int, context: int, count: int) -> list[float]:
        """Seconds of each of `count` steps that read `batch` prompts of `context` random tokens at once."""

        def read() -> None:
            self._add(batch, context, 1)
            self._finish()

        read()
        return self._measure(count, read)

    def _add(self, batch: int, context: int, tokens_out: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=tokens_out, ignore_eos=True)
        for i in range(batch):
            prompt = [self.draw.randrange(self.vocabulary) for _ in range(context)]
            self.engine.add_request(f"{time.monotonic()}-{i}", {"prompt_token_ids": prompt}, params)

    def _measure(self, count: int, step: Callable[[], object]) -> list[float]:
        self.watch.seconds.clear()
        events.measure(True)
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        events.measure(False)
        self.parts, self.operators = dict(self.watch.seconds), operators()
        return seconds

    def _finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.engine.step()


def report(engine: Engine, batch: int, context: int, count: int, prompts: bool) -> None:
    steps = engine.prompt_steps if prompts else engine.steps
    total = sum(steps(batch, context, count))
    parts = engine.parts
    parts["rest of running the model"] = parts.pop("run the model") - parts["prepare inputs"] - parts["graph"]
    parts["rest of the engine"] = total - sum(parts.values())
    print(f"\nbatch {batch}, {'prompts of' if prompts else 'context'} {context}: {total / count * 1e3:.2f} ms a step")
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {name:44}{seconds / count * 1e3:9.3f} ms")
    inside = sum(seconds for _, seconds in engine.operators.values())
    for (name, columns), (calls, seconds) in sorted(engine.operators.items(), key=lambda item: -item[1][1]):
        label = f"{name} → {columns}"
        print(f"    {label:32}{calls / count:6.1f} x {seconds / calls * 1e6:9.1f} us {seconds / count * 1e3:9.3f} ms")
    print(f"    {'launches and conversions':32}{'':21}{(parts['graph'] - inside) / count * 1e3:9.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"{', '.join(shapes.SHAPES)}, or a folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[128])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--prompts", action="store_true", help="take steps apart that read prompts of `context` tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization")
    options = parser.parse_args()
    longest = max(options.context) + options.steps
    settings = {"dtype": options.dtype, "quantization": options.quantization}
    if options.prompts:
        settings["max_num_batched_tokens"] = max(options.batch) * max(options.context)
    engine = Engine(str(shapes.find(options.model)), longest, max(options.batch), **settings)
    for context in options.context:
        for batch in options.batch:
            report(engine, batch, context, options.steps, options.prompts)


if __name__ == "__main__":
    main()
