"""vLLM's V1 worker on MindSpore: worker, model runner, attention backend, memory."""
