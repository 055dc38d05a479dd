"""Baichuan, a class of ours: told from its configuration which of the four models it is."""

from types import SimpleNamespace

import pytest

from vllm_mindspore import models
from vllm_mindspore.models import baichuan

from . import reference
from .engine import engine, prompt_logprobs
from .family import VOCAB_SIZE
from .reference import PROMPTS


@pytest.mark.parametrize("heads", [1, 5, 6, 8, 32, 40])
def test_alibi_slopes_are_those_of_the_paper(heads):
    assert baichuan.alibi_slopes(heads) == pytest.approx(reference.alibi_slopes(heads).tolist(), rel=1e-6)


@pytest.mark.parametrize(
    "name,hidden_size,alibi",
    [("BaiChuan", 4096, False), ("BaiChuan", 128, False), ("Baichuan", 4096, False), ("Baichuan", 5120, True)],
)
def test_spelling_and_hidden_size_say_whether_it_is_alibi(name, hidden_size, alibi):
    model_class = getattr(baichuan, f"{name}ForCausalLM")
    assert model_class.uses_alibi(SimpleNamespace(hidden_size=hidden_size)) == alibi


def test_what_vllm_has_is_not_replaced(monkeypatch):
    from vllm.model_executor.models.registry import ModelRegistry

    before = dict(ModelRegistry.models)
    monkeypatch.setitem(models.ARCHITECTURES, "LlamaForCausalLM", "vllm_mindspore.models.baichuan:BaichuanForCausalLM")
    models.register()
    assert ModelRegistry.models["LlamaForCausalLM"] is before["LlamaForCausalLM"]
    assert set(models.ARCHITECTURES) <= set(ModelRegistry.models)


def test_baichuan_2_normalizes_the_rows_of_its_head(monkeypatch):
    monkeypatch.setattr(baichuan, "NORMALIZED_HEAD_VOCABULARY", VOCAB_SIZE)
    expected = reference.reference("baichuan-13b")
    ids = PROMPTS[-1]
    with engine("baichuan-13b", max_logprobs=-1) as llm:
        found = prompt_logprobs(llm, ids, VOCAB_SIZE)
    logits = expected.logits(ids)[:-1]  # of the head as it is on disk
    norms = expected._model(logits.dtype).lm_head.weight.norm(dim=1)
    assert (norms - 1).abs().max() > 0.1, "the checkpoint's head is normalized already"
    assert (found - (logits / norms).log_softmax(-1)).abs().max() < 1e-4
