"""What sparse attention cannot do is said by name, and so are layers of attention that nothing here knows."""

from types import SimpleNamespace

import pytest
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_mindspore.config import UnsupportedOptionError
from vllm_mindspore.worker import kv_groups, mla


def test_a_pipeline_stage_that_begins_without_an_indexer(monkeypatch):
    impl = mla.MindSporeSparseMLAImpl.__new__(mla.MindSporeSparseMLAImpl)
    context = SimpleNamespace(additional_kwargs={})
    monkeypatch.setattr(mla, "get_forward_context", lambda: context)
    context.additional_kwargs[mla.SELECTED] = "positions"
    assert impl.selected_positions() == "positions"
    context.additional_kwargs.clear()
    with pytest.raises(NotImplementedError, match="no indexer of its own.*--pipeline-parallel-size"):
        impl.selected_positions()


def test_an_unknown_layer_of_attention():
    class CompressedKeys(AttentionLayerBase):
        get_attn_backend = get_kv_cache_spec = None

    context = {"model.layers.1.attn": CompressedKeys()}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))
    with pytest.raises(UnsupportedOptionError, match=r"model\.layers\.1\.attn: found a layer of type CompressedKeys\."):
        kv_groups.specs_of_model(config)
