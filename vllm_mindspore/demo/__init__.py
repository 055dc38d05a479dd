"""The embedded demo model: a small Qwen3 that has learnt Python's documentation, served when no model is named."""

from pathlib import Path


def model_path() -> Path:
    """The folder of the checkpoint, as installed; usable as the MODEL of vLLM and of transformers. No heavy import."""
    return Path(__file__).parent / "pydoc-4m"
