"""Engines with requests of their own that share a model's experts: a real server gives the reference's tokens."""

import pytest

from tests.distributed.layouts import served_greedy, server
from tests.models.reference import MAX_TOKENS, PROMPTS, reference

EXPERTS, TENSORS, STAGES = "--enable-expert-parallel", "--tensor-parallel-size=2", "--pipeline-parallel-size=2"
SHORT = {STAGES: "PP 2", TENSORS: "TP 2", EXPERTS: "EP"}
# `make test-slow` runs all.
FIRST = [("parallel-qwen3-moe", 2, EXPERTS)]
LAYOUTS = [
    *FIRST,
    ("parallel-qwen3-moe", 2),
    ("parallel-qwen3-moe", 4, EXPERTS),
    ("parallel-qwen3-moe", 2, EXPERTS, TENSORS),
    ("parallel-qwen3-moe", 2, TENSORS),
    ("parallel-qwen3-moe", 2, EXPERTS, STAGES),
    ("parallel-deepseek-v3", 2, EXPERTS),
    ("parallel-deepseek-v3", 2, EXPERTS, TENSORS),
    ("parallel-deepseek-v32", 2, EXPERTS),
    ("parallel-gpt-oss", 2),
    ("parallel-pangu-pro-moe", 2, EXPERTS),
    ("parallel-minimax-m2", 2, EXPERTS),
    ("parallel-deepseek-v3", 4, EXPERTS),
    ("parallel-deepseek-v3", 2, EXPERTS, STAGES),
    ("parallel-qwen3", 2),
]


@pytest.mark.parametrize(
    "ranks",
    [ranks if ranks in FIRST else pytest.param(ranks, marks=pytest.mark.slow) for ranks in LAYOUTS],
    ids=lambda ranks: " ".join(map(str, ranks)),
)
def test_a_server_gives_the_tokens_of_one_process(ranks, tmp_path, layout):
    name, engines, *options = ranks
    layout(name, ", ".join([f"DP {engines}", *(SHORT[option] for option in SHORT if option in options)]))
    expected = reference(name).generate(PROMPTS)
    with server(name, tmp_path / "server.log", f"--data-parallel-size={engines}", *options) as running:
        assert served_greedy(running, PROMPTS, MAX_TOKENS) == expected, "uneven numbers of tokens on all ranks"
        for prompt, tokens in zip(PROMPTS[:3], expected, strict=False):
            assert served_greedy(running, [prompt], MAX_TOKENS) == [tokens], "one rank works, the others are idle"
        assert served_greedy(running, PROMPTS[::-1], MAX_TOKENS) == expected[::-1]
