"""Capture vLLM's model, lower it to a readable MindSpore network, compile it, and keep both on disk."""
