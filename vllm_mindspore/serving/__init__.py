"""Around vLLM's API server."""
