"""What model families need beyond vLLM's own definitions; installed as `vllm_mindspore.models`."""
