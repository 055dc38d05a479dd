"""Drafts of several ranks, and through a server: the reference's tokens, and what was accepted in /metrics."""

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.distributed.layouts import ONCE, SETTINGS, engine, served_greedy, server
from tests.models.engine import greedy
from tests.models.families import EVERY_FAMILY
from tests.models.reference import PROMPTS, Reference
from tests.support.drafts import checkpoint_with_draft, metrics
from tests.support.server import NAME, Server

FAMILY, SPARSE, MAX_TOKENS = "parallel-deepseek-v3", "parallel-deepseek-v32", 40
MTP = {"method": "mtp", "num_speculative_tokens": 2}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
EXPERTS, TENSORS = "--enable-expert-parallel", "--tensor-parallel-size=2"
# (family, drafts, options of two engines)
ENGINES = [
    (FAMILY, MTP, EXPERTS),
    (FAMILY, MTP),
    (FAMILY, {**MTP, "num_speculative_tokens": 1}, EXPERTS),
    (FAMILY, {**MTP, "num_speculative_tokens": 4}, EXPERTS, TENSORS),
    (FAMILY, NGRAM, EXPERTS),
    (SPARSE, MTP, EXPERTS),  # every rank has the whole indexer of the draft
    ("ernie-moe", MTP, EXPERTS),  # a draft without experts
    ("mimo", MTP),  # a dense model: engines share nothing
    ("mimo", NGRAM),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """checkpoints(family): with a draft, made once."""
    made = {}

    def with_draft(name: str):
        if name not in made:
            made[name] = checkpoint_with_draft(name, tmp_path_factory.mktemp("draft") / name)
        return made[name]

    return with_draft


def reference_of(name: str, folder) -> Reference:
    return Reference(EVERY_FAMILY["qwen2" if name == "mimo" else name], folder)


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        pytest.param(FAMILY, True, id=f"{FAMILY} spread"),
        pytest.param(FAMILY, False, id=f"{FAMILY} in parts", marks=pytest.mark.slow),
        pytest.param(SPARSE, True, id=f"{SPARSE} spread", marks=pytest.mark.slow),
        pytest.param(SPARSE, False, id=f"{SPARSE} in parts", marks=pytest.mark.slow),
    ],
)
def test_two_ranks(name, experts, checkpoints):
    options = dict(tensor_parallel_size=2, enable_expert_parallel=experts, speculative_config=MTP)
    options["disable_log_stats"] = False
    folder = checkpoints(name)
    expected = reference_of(name, folder).generate(PROMPTS, MAX_TOKENS)
    with engine(name, folder=folder, **options) as llm:
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
    assert f"model.layers.{EVERY_FAMILY[name].config().num_hidden_layers}.mlp.experts" in experts_of_draft


def counted(running: Server) -> Counter[tuple[str, str]]:
    """What /metrics counts of drafts, by engine and name."""
    pattern = r'^vllm:spec_decode_num_(\w+)_total\{.*engine="(\d+)".*\} ([\d.e+]+)$'
    found = re.findall(pattern, running.http.get("/metrics", headers=ONCE).text, re.MULTILINE)
    return Counter({(number, name): float(value) for name, number, value in found if "per_pos" not in name})


@pytest.mark.slow
@pytest.mark.parametrize("config", [MTP, NGRAM], ids=["mtp", "ngram"])
def test_a_server_counts_what_was_accepted(config, checkpoints, tmp_path):
    options, folder = ["--speculative-config", json.dumps(config)], checkpoints(FAMILY)
    expected = reference_of(FAMILY, folder).generate(PROMPTS, MAX_TOKENS)
    with server(FAMILY, tmp_path / "server.log", *options, folder=folder) as running:
        assert counted(running)["0", "draft_tokens"] == 0
        assert served_greedy(running, PROMPTS, MAX_TOKENS) == expected
        stream = running.openai.completions.create(
            model=NAME, prompt=PROMPTS[4], max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        for _, _ in zip(range(3), stream, strict=False):
            pass
        stream.close()  # the request is aborted, with drafts under way
        assert served_greedy(running, PROMPTS, MAX_TOKENS) == expected
        found = counted(running)
        assert 0 < found["0", "accepted_tokens"] < found["0", "draft_tokens"]
        assert found["0", "drafts"] <= found["0", "draft_tokens"]


def titles(layout: tuple) -> str:
    name, config, *options = layout
    return " ".join([name, config["method"], str(config["num_speculative_tokens"]), *options])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ENGINES, ids=titles)
def test_engines_with_requests_of_their_own(layout, checkpoints, tmp_path):
    """The ranks draft together, also where one of them has no request, or one that is too long for drafts."""
    name, config, *options = layout
    options += ["--data-parallel-size=2", "--speculative-config", json.dumps(config), "--max-num-batched-tokens=48"]
    folder, log = checkpoints(name), tmp_path / "server.log"
    answers = reference_of(name, folder)
    expected = answers.generate(PROMPTS, MAX_TOKENS)
    up_to_the_limit = SETTINGS["max_model_len"] - len(PROMPTS[-1])
    expected_long = answers.generate(PROMPTS[-1:], up_to_the_limit)
    with server(name, log, *options, folder=folder) as running:
        assert served_greedy(running, PROMPTS, MAX_TOKENS) == expected, "uneven numbers of tokens on both"
        for number in (0, 1):
            assert served_greedy(running, PROMPTS[:3], MAX_TOKENS, engine=number) == expected[:3], "the other is idle"
            before = counted(running)
            with ThreadPoolExecutor(1) as pool:
                others = pool.submit(served_greedy, running, PROMPTS[:-1], MAX_TOKENS, 1 - number)
                long = served_greedy(running, PROMPTS[-1:], up_to_the_limit, engine=number)
                assert others.result() == expected[:-1]
            assert long == expected_long, "the last steps have no drafts"
            drafted = counted(running) - before
            assert all(0 < drafted[i, "accepted_tokens"] < drafted[i, "draft_tokens"] for i in "01")
    graphs = re.findall(r"graph (\w+): (?:compiled|loaded from cache) in", log.read_text())
    programs = ["model", "logits", *(["draft"] if config["method"] == "mtp" else [])]
    processes = 2 * (2 if TENSORS in options else 1)
    assert Counter(graphs) == dict.fromkeys(programs, processes), "once in each process"
