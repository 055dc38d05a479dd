"""Starts an engine in this process, generates a few tokens, and prints what was compiled as JSON.

Run as a program: `python start_probe.py CHECKPOINT [QUANTIZATION|"" [OPTIONS AS JSON]]`; see test_restart.py.
"""

import json
import os
import sys


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    quantization = (sys.argv[2] if len(sys.argv) > 2 else None) or None
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    sizes = dict(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64)
    llm = LLM(sys.argv[1], dtype="float32", quantization=quantization, **sizes, **options)
    parameters = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (1, 40, 7)]
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    statistics = llm.collective_rpc("graph_statistics")[0]
    counts = {name: {key: graph[key] for key in ("compiles", "loads", "calls")} for name, graph in statistics.items()}
    print(
        json.dumps(
            {
                "graphs": counts,
                "sources": [graph["source"] for graph in statistics.values()],
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            }
        )
    )


if __name__ == "__main__":
    main()
