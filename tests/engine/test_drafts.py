"""Speculative decoding: the text stays the same, drafts are what they should be, and nothing is compiled on the way."""

import random

import pytest

from tests.models.engine import engine, greedy, statistics
from tests.models.families import EVERY_FAMILY
from tests.models.reference import PROMPTS, Reference, reference
from tests.support.drafts import DraftReference, checkpoint_with_draft, metrics
from vllm_mindspore.worker.draft import DraftProposer

MAX_TOKENS = 40
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
MTP = {"method": "mtp", "num_speculative_tokens": 2}
OTHERS = [
    "deepseek-r1",
    "deepseek-v32",
    "glm-moe-dsa",
    "pangu-ultra-moe",
    "glm46-moe",
    "glm4-moe-lite",
    "mimo",
    "hy-v3",
    "ernie-moe",
]
CHUNKS = dict(max_num_batched_tokens=48)  # the longest prompts come in several steps


def compiled(llm) -> dict[str, int]:
    return {name: graph["compiles"] + graph["loads"] for name, graph in statistics(llm).items()}


def mixed_work(llm) -> None:
    """Batches of all sizes, prompts cut short by the prefix cache, seeds, top-p, logprobs, penalties, a grammar."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    parameters = [
        SamplingParams(temperature=0.9, top_p=0.8, seed=3, max_tokens=9, logprobs=2),
        SamplingParams(temperature=1.2, top_k=20, max_tokens=17, presence_penalty=0.5),
        SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=1),
        SamplingParams(max_tokens=12, structured_outputs=StructuredOutputsParams(regex="[a-z]{3,9}")),
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(temperature=0, max_tokens=20, bad_words=["the"], min_tokens=3),
    ]
    for count in (1, 3, 6):
        prompts = [{"prompt_token_ids": ids} for ids in PROMPTS[-count:]]
        for output in llm.generate(prompts, parameters[:count], use_tqdm=False):
            assert 1 <= len(output.outputs[0].token_ids) <= 20


def test_tokens_of_the_prompt_as_drafts():
    repeated = PROMPTS[3][:7] * 4
    prompts = [*PROMPTS, repeated]
    with engine("qwen3", disable_log_stats=False, speculative_config=NGRAM, **CHUNKS) as llm:
        assert greedy(llm, prompts, MAX_TOKENS) == reference("qwen3").generate(prompts, MAX_TOKENS)
        counted = metrics(llm)
        assert 0 < counted["accepted_tokens"] < counted["draft_tokens"]
        mixed_work(llm)
        assert compiled(llm) == {"model": 1, "logits": 1}


@pytest.fixture
def proposals(monkeypatch) -> list[tuple[int, list[int]]]:
    """(position of the last token, drafted tokens) of each proposal, while there is one request."""
    noted, propose = [], DraftProposer.propose

    def noting(self, *args, **arguments):
        drafted = propose(self, *args, **arguments)
        if len(drafted) == 1:
            noted.append((int(arguments["target_positions"][-1]), drafted[0].tolist()))
        return drafted

    monkeypatch.setattr(DraftProposer, "propose", noting)
    return noted


@pytest.mark.parametrize("name", ["deepseek-v3-moe", "parallel-deepseek-v32"])
def test_multi_token_prediction(name, tmp_path, proposals):
    """Text and every single draft as Hugging Face's layers have them; with an indexer, more tokens than it selects."""
    folder = checkpoint_with_draft(name, tmp_path / name)
    with engine(name, folder=folder, disable_log_stats=False, speculative_config=MTP, **CHUNKS) as llm:
        model = Reference(EVERY_FAMILY[name], folder)
        expected = model.generate(PROMPTS, MAX_TOKENS)
        for _ in range(2):  # the second time, the prefix cache has the prompts
            assert greedy(llm, PROMPTS, MAX_TOKENS) == expected
        counted = metrics(llm)
        assert 0.3 < counted["accepted_tokens"] / counted["draft_tokens"] < 0.98
        proposals.clear()
        assert greedy(llm, PROMPTS[5:6], MAX_TOKENS) == expected[5:6]
        tokens, drafts = [*PROMPTS[5], *expected[5]], DraftReference(folder, model.config())
        generated = [(last, drafted) for last, drafted in proposals if last + 1 >= len(PROMPTS[5])]
        assert 10 < len(generated) < MAX_TOKENS
        for last, drafted in generated:
            if last + 1 < len(tokens):
                assert drafted == drafts.drafts(tokens[: last + 1], tokens[last + 1], 2), f"after token {last}"
        mixed_work(llm)
        assert compiled(llm) == {"model": 1, "logits": 1, "draft": 1}
        graphs = statistics(llm)
        assert all(graph["weights"] == graph["weights_shared"] for graph in graphs.values())
        others = {name for name in graphs["draft"]["operators"] if not name.startswith("vllm_ms.")}
        assert others == {"aten.eq.Scalar", "aten.masked_fill.Scalar"}  # of ids, before the one recorded operator
        assert len(llm.collective_rpc("tokens_of_experts")[0]) == 3  # two layers of the model, and the draft's


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("number", [1, 3])
def test_text_of_other_drafts(name, number, tmp_path):
    folder = checkpoint_with_draft(name, tmp_path / name)
    name = "qwen2" if name == "mimo" else name
    config = {"method": "mtp", "num_speculative_tokens": number}
    with engine(name, folder=folder, disable_log_stats=False, speculative_config=config) as llm:
        expected = Reference(EVERY_FAMILY[name], folder).generate(PROMPTS, MAX_TOKENS)
        assert greedy(llm, PROMPTS, MAX_TOKENS) == expected
        counted = metrics(llm)
        assert 0.1 < counted["accepted_tokens"] / counted["draft_tokens"] < 0.99
        assert set(compiled(llm).values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ngram", "mtp", "mtp with probabilities"])
def test_seeds_give_the_same_text(method, tmp_path):
    """A request's seed decides as without drafts; where the draft samples too, the text is another."""
    from vllm import SamplingParams

    name = "deepseek-v3-moe"
    folder = checkpoint_with_draft(name, tmp_path / name)
    numbers = random.Random(1)
    parameters = [
        SamplingParams(temperature=numbers.choice([0.3, 0.8, 1.3]), top_p=numbers.choice([1.0, 0.7]),
                       top_k=numbers.choice([0, 12]), seed=seed, max_tokens=MAX_TOKENS, ignore_eos=True)
        for seed in range(len(PROMPTS))
    ]  # fmt: skip
    config = {**(NGRAM if method == "ngram" else MTP)}
    if method == "mtp with probabilities":
        config["draft_sample_method"] = "probabilistic"
    texts = []
    for speculative in (None, config):
        with engine(name, folder=folder, disable_log_stats=False, speculative_config=speculative) as llm:
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], parameters, use_tqdm=False)
            texts.append([list(output.outputs[0].token_ids) for output in outputs])
            if speculative is not None:
                assert metrics(llm)["accepted_tokens"] > 0
    if method == "mtp with probabilities":
        assert texts[0] != texts[1] and all(len(text) == MAX_TOKENS for text in texts[1])
    else:
        assert texts[0] == texts[1]
