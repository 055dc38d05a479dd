"""The second start of a model captures and compiles nothing; a damaged cache entry is built again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.checkpoints import checkpoint
from tests.support.drafts import checkpoint_with_draft

PROBE = Path(__file__).with_name("start_probe.py")


@pytest.fixture(scope="module")
def cache_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start(cache_directory: Path, arguments: tuple = (), **environment: str) -> tuple[dict, str]:
    """(what start_probe.py printed, its log) of one start of a tiny model with this cache.

    arguments: of start_probe.py, if it is another model.
    """
    command = [sys.executable, str(PROBE), *map(str, arguments or (checkpoint("qwen3"),))]
    environment = {**os.environ, "VLLM_MS_CACHE_DIR": str(cache_directory), **environment}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1]), finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def first(cache_directory) -> dict:
    """The start that fills the cache."""
    found, log = start(cache_directory)
    assert "captured in" in log
    assert [(graph["compiles"], graph["loads"]) for graph in found["graphs"].values()] == [(1, 0), (1, 0)]
    return found


def test_the_second_start_captures_and_compiles_nothing(cache_directory, first):
    second, log = start(cache_directory)
    assert "captured in" not in log
    assert [(graph["compiles"], graph["loads"]) for graph in second["graphs"].values()] == [(0, 1), (0, 1)]
    assert second["tokens"] == first["tokens"]


@pytest.mark.slow
def test_the_second_start_with_a_draft_captures_and_compiles_nothing(cache_directory, tmp_path):
    folder = checkpoint_with_draft("deepseek-v3-moe", tmp_path / "model")
    options = json.dumps({"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}})
    first, log = start(cache_directory, (folder, "", options))
    assert "captured in" in log
    second, log = start(cache_directory, (folder, "", options))
    assert "captured in" not in log
    for started, counts in ((first, (1, 0)), (second, (0, 1))):
        found = {name: (graph["compiles"], graph["loads"]) for name, graph in started["graphs"].items()}
        assert found == dict.fromkeys(("model", "logits", "draft"), counts)
    plain, log = start(cache_directory, (folder,))
    assert "captured in" in log  # another entry
    assert plain["tokens"] == first["tokens"] == second["tokens"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("model.py", marks=pytest.mark.slow),
        pytest.param("compile_cache_0.mindir", marks=pytest.mark.slow),
        "graphs.json",
    ],
)
def test_a_damaged_entry_is_built_again_and_serves_the_same_tokens(cache_directory, first, name):
    entry = Path(first["sources"][0]).parent
    (damaged,) = entry.rglob(name)
    damaged.write_bytes(damaged.read_bytes()[:-7] + b"damaged")
    after, log = start(cache_directory)
    assert "building it again" in log and name in log
    assert [graph["compiles"] for graph in after["graphs"].values()] == [1, 1]
    assert after["tokens"] == first["tokens"]


def test_other_passes_are_another_entry(cache_directory, first):
    unfused, log = start(cache_directory, VLLM_MS_DISABLE_PASSES="fuse_attention,fuse_norm,fuse_residual")
    assert "captured in" in log
    assert Path(unfused["sources"][0]).parent != Path(first["sources"][0]).parent
    assert unfused["tokens"] == first["tokens"]


def test_a_disabled_cache_compiles_every_time(cache_directory):
    found, log = start(cache_directory, VLLM_MS_DISABLE_CACHE="1")
    assert "captured in" in log
    assert [graph["compiles"] for graph in found["graphs"].values()] == [1, 1]


@pytest.mark.usefixtures("first")
def test_no_file_of_the_cache_is_a_pickle(cache_directory):
    kinds = {path.suffix for path in cache_directory.rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert kinds <= {".py", ".json", ".mindir", ".hash", ".safetensors", ".pyc"}
