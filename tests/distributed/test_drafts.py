"""Drafts of several ranks, and through a server: the reference's tokens, and what was accepted in /metrics."""

import json
import re

import pytest

from tests.distributed.layouts import engine, served_greedy, server
from tests.models.engine import greedy
from tests.models.families import EVERY_FAMILY
from tests.models.reference import PROMPTS, Reference
from tests.support.drafts import checkpoint_with_draft, metrics
from tests.support.server import NAME

FAMILY, MAX_TOKENS = "parallel-deepseek-v3", 40
MTP = {"method": "mtp", "num_speculative_tokens": 2}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint_with_draft(FAMILY, tmp_path_factory.mktemp("draft") / FAMILY)


@pytest.fixture(scope="module")
def expected(folder):
    return Reference(EVERY_FAMILY[FAMILY], folder).generate(PROMPTS, MAX_TOKENS)


@pytest.mark.parametrize("experts", [False, True], ids=["in parts", "spread"])
def test_two_ranks(experts, folder, expected):
    options = dict(tensor_parallel_size=2, enable_expert_parallel=experts, speculative_config=MTP)
    options["disable_log_stats"] = False
    with engine(FAMILY, folder=folder, **options) as llm:
        assert greedy(llm, PROMPTS, MAX_TOKENS) == expected
        counted = metrics(llm)
        assert 0.1 < counted["accepted_tokens"] / counted["draft_tokens"] < 0.9
        counts = llm.collective_rpc("graph_statistics")
        experts_of_draft = llm.collective_rpc("tokens_of_experts")[0]
    assert len(counts) == 2
    for count in counts:
        assert {name: graph["compiles"] + graph["loads"] for name, graph in count.items()} == dict.fromkeys(
            ("model", "logits", "draft"), 1
        )
    assert f"model.layers.{EVERY_FAMILY[FAMILY].config().num_hidden_layers}.mlp.experts" in experts_of_draft


def accepted(running) -> dict[str, float]:
    text = running.http.get("/metrics").text
    found = re.findall(r"^vllm:spec_decode_num_(\w+)_total\{[^}]*\} ([\d.e+]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found if "per_pos" not in name}


@pytest.mark.parametrize("config", [MTP, {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2,
                                          "prompt_lookup_min": 1}], ids=["mtp", "ngram"])  # fmt: skip
def test_a_server_counts_what_was_accepted(config, folder, expected, tmp_path):
    options = ["--speculative-config", json.dumps(config)]
    with server(FAMILY, tmp_path / "server.log", *options, folder=folder) as running:
        assert accepted(running).get("draft_tokens", 0) == 0
        assert served_greedy(running, PROMPTS, MAX_TOKENS) == expected
        stream = running.openai.completions.create(
            model=NAME, prompt=PROMPTS[4], max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        for _, _ in zip(range(3), stream, strict=False):
            pass
        stream.close()  # the request is aborted, with drafts under way
        assert served_greedy(running, PROMPTS, MAX_TOKENS) == expected
        counted = accepted(running)
        assert 0 < counted["accepted_tokens"] < counted["draft_tokens"]
        assert counted["drafts"] <= counted["draft_tokens"]
