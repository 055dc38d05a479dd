"""What all tests share: no network, and one cache of test checkpoints for every process of a run."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the checkpoints under pytest's cache, unless VLLM_MS_TEST_CACHE names another folder."""
    if "VLLM_MS_TEST_CACHE" not in os.environ and hasattr(config, "cache"):
        os.environ["VLLM_MS_TEST_CACHE"] = str(config.cache.mkdir("checkpoints"))


@pytest.fixture(scope="session")
def session_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run, for what several tests use and nobody keeps."""
    return tmp_path_factory.mktemp("session")
