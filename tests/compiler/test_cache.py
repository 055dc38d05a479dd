"""A damaged, incomplete or foreign cache entry is built again, never trusted."""

import json
import os
import stat
import subprocess
import sys

import pytest

from vllm_mindspore.compiler import cache
from vllm_mindspore.compiler.pipeline import Compiler


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("VLLM_MS_DISABLE_CACHE", raising=False)
    return tmp_path / "cache"


def build(key: str = "key") -> cache.CacheEntry:
    """Make and seal an entry of two files."""
    with cache.locked_entry(key) as (entry, usable):
        assert not usable
        (entry.path / "model.py").write_text("source")
        (entry.path / "rank_0").mkdir()
        (entry.path / "rank_0" / "graph.mindir").write_bytes(b"graph")
        entry.seal()
    return entry


def usable(key: str = "key") -> bool:
    with cache.locked_entry(key) as (_, found):
        return found


def test_an_intact_entry_is_used_again():
    build()
    assert usable()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "model.py").write_text("other"),
        lambda path: (path / "rank_0" / "graph.mindir").write_bytes(b"grap"),
        lambda path: (path / "rank_0" / "graph.mindir").unlink(),
        lambda path: (path / "stray.py").write_text("not ours"),
        lambda path: (path / "manifest.json").write_text("{"),
        lambda path: (path / "manifest.json").unlink(),
    ],
    ids=["edited", "truncated", "missing", "added", "manifest damaged", "manifest missing"],
)
def test_a_damaged_entry_is_emptied_and_built_again(damage):
    entry = build()
    damage(entry.path)
    with cache.locked_entry("key") as (again, found):
        assert not found
        assert again.files() == []


def test_an_entry_that_was_never_sealed_is_not_used():
    with cache.locked_entry("key") as (entry, _):
        (entry.path / "model.py").write_text("half of a source")
    assert not usable()


def test_the_key_changes_with_every_fact():
    facts = {"versions": {"torch": "1"}, "weights": {"w": [[2, 3], "float32"]}, "eager": False}
    keys = {cache.content_key(facts), cache.content_key({**facts, "eager": True})}
    keys.add(cache.content_key({**facts, "weights": {"w": [[2, 3], "bfloat16"]}}))
    keys.add(cache.content_key({**facts, "versions": {"torch": "2"}}))
    assert len(keys) == 4


def test_only_the_user_may_read_the_directory(directory):
    entry = build()
    for path in (directory / "graphs", entry.path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_disabled_cache_is_neither_read_nor_written(monkeypatch):
    build()
    monkeypatch.setenv("VLLM_MS_DISABLE_CACHE", "1")
    assert not usable()
    assert not cache.cache_enabled()
    monkeypatch.delenv("VLLM_MS_DISABLE_CACHE")
    assert usable()


def test_its_size_and_place_are_told(directory):
    build()
    info = cache.cache_info()
    assert info["path"] == str(directory)
    assert info["entries"] == 1
    assert info["bytes"] > len("source") + len("graph")


def test_an_entry_whose_building_failed_is_free_to_be_built_again():
    def compiler() -> Compiler:
        return Compiler({"model": "any"}, {}, [], device="cpu", eager=False)

    failed = compiler()
    with pytest.raises(ValueError, match="damaged weights"), failed.building():
        failed.open()
        raise ValueError("damaged weights")
    again = compiler()
    assert again.key == failed.key
    with again.building():
        assert not again.open()
        again.close()


def test_two_processes_do_not_build_an_entry_at_once(directory):
    program = """
import json, sys, time
from vllm_mindspore.compiler import cache
with cache.locked_entry("shared") as (entry, usable):
    if not usable:
        begun = entry.path / f"begun-{sys.argv[1]}"
        begun.write_text("")
        time.sleep(0.3)
        assert [path.name for path in entry.files()] == [begun.name], entry.files()
        entry.seal()
    print(json.dumps(usable))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(number)], stdout=subprocess.PIPE, env=dict(os.environ), text=True
        )
        for number in range(3)
    ]
    found = sorted(json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes)
    assert found == [False, True, True]
