"""One engine that runs phases as it is told, a line of JSON each way: the child process of compare.py.

Runs in our environment and in a rival's: it may import nothing but vLLM and what comes with it.
"""

import json
import os
import random
import sys
import time

VOCABULARY = 7000  # of the prompts' random tokens: below every shape's and tokenizer's


class Engine:
    def __init__(self, model: str, options: dict):
        from vllm import LLM

        options = {
            "dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": 64,
            "enable_prefix_caching": False, "disable_log_stats": True, **options,
        }  # fmt: skip
        self.engine = LLM(model, **options).llm_engine
        self.draw, self.requests = random.Random(0), 0

    def run(self, batch: int, tokens_in: int, tokens_out: int) -> tuple[list[float], float, float]:
        """(seconds of the steps in which all requests decode, until all have a token, until all have ended)."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens_out, ignore_eos=True)
        begin = time.perf_counter()
        for _ in range(batch):
            self.requests += 1
            prompt = [self.draw.randrange(VOCABULARY) for _ in range(tokens_in)]
            self.engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, params)
        steps, seen, first = [], set(), 0.0
        while self.engine.has_unfinished_requests():
            decoding, started = len(seen) == batch, time.perf_counter()
            outputs = self.engine.step()
            if decoding and len(outputs) == batch:
                steps.append(time.perf_counter() - started)
            seen |= {output.request_id for output in outputs}
            if not first and len(seen) == batch:
                first = time.perf_counter() - begin
        return steps, first, time.perf_counter() - begin

    def phase(self, kind: str, batch: int, tokens_in: int, tokens_out: int) -> list[float]:
        """Seconds: of each decode step, of the first token (3 times), or of the whole run."""
        if kind == "decode":
            return self.run(batch, tokens_in, tokens_out)[0]
        if kind == "first":
            return [self.run(batch, tokens_in, 1)[1] for _ in range(3)]
        return [self.run(batch, tokens_in, tokens_out)[2]]


def resident_bytes() -> int:
    import psutil

    me = psutil.Process()
    return sum(process.memory_info().rss for process in [me, *me.children(recursive=True)])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints is not an answer

    def answer(**fields) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    begin = time.perf_counter()
    engine = Engine(sys.argv[1], json.loads(sys.argv[2]))
    engine.run(1, 16, 1)
    answer(seconds=[time.perf_counter() - begin], bytes=resident_bytes())
    for line in sys.stdin:
        answer(seconds=engine.phase(*json.loads(line)), bytes=resident_bytes())


if __name__ == "__main__":
    main()
