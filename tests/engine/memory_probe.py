"""Runs the Qwen3-0.6B shape with random weights in this process and prints its memory as JSON; see test_memory.py.

Run as a program: `python memory_probe.py CONFIG_FOLDER ROUNDS`.
"""

import json
import os
import sys

import psutil

BUDGET, KV_CACHE = 2048, 1 << 30


def resident() -> int:
    return psutil.Process().memory_info().rss


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import mindspore
    import vllm

    libraries = resident()
    llm = vllm.LLM(
        sys.argv[1],
        dtype="bfloat16",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_seqs=32,
        max_num_batched_tokens=BUDGET,
        kv_cache_memory_bytes=KV_CACHE,
        enable_prefix_caching=False,
    )
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    weights = sum({p.data_ptr(): p.numel() * p.element_size() for p in worker.get_model().parameters()}.values())
    parameters = vllm.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    measured = []
    for number in range(int(sys.argv[2])):
        lengths = [3000, 17, 1, 900 + number, *(40 + number + i for i in range(20))]
        prompts = [{"prompt_token_ids": [(i * 7 + number) % 1000 for i in range(length)]} for length in lengths]
        llm.generate(prompts, parameters, use_tqdm=False)
        measured.append(resident())
    kv_cache = sum(cache.numel() * cache.element_size() for cache in worker.model_runner.kv_caches)
    print(json.dumps(dict(libraries=libraries, weights=weights, kv_cache=kv_cache, measured=measured)))
    assert mindspore.__version__


if __name__ == "__main__":
    main()
