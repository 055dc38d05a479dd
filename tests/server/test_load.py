"""Many requests at once: no error, and every answer is what the request gets alone."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.server import NAME

CLIENTS = 32
WORDS = "return the list of files in a directory that match this pattern or raise OSError".split()


def prompts(count: int) -> list[str]:
    """Prompts of 3 to 150 words."""
    source = random.Random(0)
    return [" ".join(source.choices(WORDS, k=3 + 147 * i // count)) for i in range(count)]


def test_32_concurrent_requests_answer_as_each_alone(server, complete):
    alone = [complete(prompt, max_tokens=48, ignore_eos=True).choices[0].text for prompt in prompts(CLIENTS)]

    def stream(prompt: str) -> str:
        chunks = complete("" + prompt, max_tokens=48, ignore_eos=True, stream=True, cache_salt="fresh")
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(stream, prompts(CLIENTS)))
    assert together == alone


def test_more_requests_than_the_engine_runs_at_once_wait_their_turn(server, complete):
    with ThreadPoolExecutor(80) as pool:
        answers = list(pool.map(lambda p: complete(p, max_tokens=12, ignore_eos=True), prompts(80)))
    assert all(answer.usage.completion_tokens == 12 for answer in answers)
    assert server.metric("num_requests_running") == 0 == server.metric("num_requests_waiting")


def test_mixed_sampling_in_one_batch_repeats_with_its_seeds(complete):
    def call(i: int) -> str:
        options = [{"temperature": 0.0}, {"temperature": 1.0, "seed": i}, {"temperature": 0.8, "seed": i, "top_k": 20}]
        return complete(f"{i}. Return", max_tokens=24, ignore_eos=True, **options[i % 3]).choices[0].text

    with ThreadPoolExecutor(24) as pool:
        first, second = (list(pool.map(call, range(24))) for _ in range(2))
    assert first == second and len(set(first)) > 12


@pytest.mark.slow
def test_32_concurrent_requests_on_the_shape_of_qwen3_0_6b(start_server, large_checkpoint):
    command = ["vllm", "serve", str(large_checkpoint), "--backend", "mindspore", "--served-model-name", NAME,
               "--max-model-len", "2048", "--max-num-seqs", str(CLIENTS)]  # fmt: skip
    large = start_server(command)

    def call(prompt: str) -> int:
        answer = large.openai.completions.create(
            model=NAME, prompt=prompt, max_tokens=32, temperature=0.0, extra_body={"ignore_eos": True}, timeout=900
        )
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert list(pool.map(call, prompts(CLIENTS))) == [32] * CLIENTS
