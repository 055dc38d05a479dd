"""One vLLM engine on MindSpore in this process, for tests that compare its output."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from .checkpoints import checkpoint
from .families import EVERY_FAMILY


@contextmanager
def engine(name: str, dtype: str = "float32", folder: Path | None = None, **options) -> Iterator:
    """A `vllm.LLM` serving the checkpoint of family `name` in `dtype`; its memory is released afterwards.

    folder: another checkpoint of the family.

    The engine lives in this process, which is faster, except for families that vLLM serves by rewriting Hugging Face's
    own classes: the reference needs them as they were.
    """
    from vllm.platforms import current_platform

    assert current_platform.device_name  # chosen now: the environment variables it sets must outlive the patch below
    rewrites_classes = EVERY_FAMILY[name].vllm_class.startswith("Transformers")
    with mock.patch.dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING=str(int(rewrites_classes))):
        stored = "bfloat16" if dtype == "bfloat16" else "float32"
        yield from _engine(name, folder or checkpoint(name, stored), dtype, options)


def _engine(name: str, folder: Path, dtype: str, options: dict) -> Iterator:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = dict(max_model_len=256, max_num_seqs=8, max_num_batched_tokens=512, disable_log_stats=True, seed=0)
    llm = LLM(str(folder), dtype=dtype, **{**settings, **EVERY_FAMILY[name].llm, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        gc.freeze()  # the next two collections, half a second each with all modules
        cleanup_dist_env_and_memory()


def greedy(llm, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy continuations of prompts batched together, end-of-text ignored."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompt_logprobs(llm, ids: list[int], vocab_size: int) -> torch.Tensor:
    """log p of every vocabulary entry after every token of `ids` but the last: [len(ids) - 1, vocab_size] float32."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)
    rows = torch.empty(len(ids) - 1, vocab_size)
    for position, entries in enumerate(output.prompt_logprobs[1:]):
        for token, entry in entries.items():
            rows[position, token] = entry.logprob
    return rows


def statistics(llm) -> dict:
    """The worker's `graph_statistics`."""
    return llm.collective_rpc("graph_statistics")[0]
