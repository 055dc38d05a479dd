"""The disk cache of emitted networks and compiled graphs, keyed by content.

    <cache>/graphs/<key>/model.py, logits.py     the emitted sources
                         graphs.json             what to feed them, what the passes did
                         constants.safetensors   tensors that are neither parameters nor buffers of the model
                         rank_0/graph_cache/     MindSpore's own compile cache (MindIR)
                         manifest.json           SHA-256 of every file above, written last

An entry without a manifest, or with any file that does not match it, is deleted and built again. No file is a pickle.
The directory belongs to the user (mode 0700); one process builds an entry at a time.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm.logger import init_logger

logger = init_logger("vllm.vllm_mindspore.cache")

MANIFEST = "manifest.json"
PACKAGE = Path(__file__).resolve().parent.parent


def cache_directory() -> Path:
    """`VLLM_MS_CACHE_DIR`, else `$XDG_CACHE_HOME/vllm_mindspore`, else `~/.cache/vllm_mindspore`."""
    explicit = os.environ.get("VLLM_MS_CACHE_DIR")
    if explicit:
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_mindspore"


def cache_info() -> dict[str, object]:
    """Where the cache is, how many bytes and entries it holds, and whether it is used."""
    root = cache_directory()
    files = [path for path in root.rglob("*") if path.is_file()] if root.is_dir() else []
    entries = [path for path in (root / "graphs").glob("*") if path.is_dir()]
    return {
        "path": str(root),
        "bytes": sum(path.stat().st_size for path in files),
        "entries": len(entries),
        "enabled": cache_enabled(),
    }


def cache_enabled() -> bool:
    return os.environ.get("VLLM_MS_DISABLE_CACHE", "0") in ("", "0")


def content_key(facts: dict[str, object]) -> str:
    """A key of 32 hexadecimal digits that changes whenever any of `facts` does."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source_hash() -> str:
    """Hash of every Python and C++ source of this package: a change of the compiler makes old entries unreachable."""
    import vllm_mindspore.graph_passes
    import vllm_mindspore.models

    roots = [PACKAGE, Path(vllm_mindspore.graph_passes.__file__).parent, Path(vllm_mindspore.models.__file__).parent]
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(path for suffix in ("*.py", "*.cc", "*.h") for path in root.rglob(suffix)):
            digest.update(f"{root.name}/{path.relative_to(root)}".encode() + path.read_bytes())
    return digest.hexdigest()


class CacheEntry:
    """One directory of the cache; `sealed` when its manifest matches its files."""

    def __init__(self, path: Path):
        self.path = path

    def files(self) -> list[Path]:
        return sorted(path for path in self.path.rglob("*") if path.is_file() and path.name != MANIFEST)

    def check(self) -> str:
        """Why the entry cannot be used, or an empty string."""
        if not self.path.is_dir():
            return "empty"
        if self.path.stat().st_uid != os.getuid():
            return f"belongs to user {self.path.stat().st_uid}"
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            return "incomplete" if self.files() else "empty"
        try:
            expected = json.loads(manifest.read_text())
        except ValueError:
            return "its manifest is damaged"
        found = {str(path.relative_to(self.path)): file_hash(path) for path in self.files()}
        if found != expected:
            changed = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            return f"changed since it was written: {', '.join(changed)}"
        return ""

    def clear(self) -> None:
        """Delete everything in the entry."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def seal(self) -> None:
        """Write the manifest: from now on the entry is trusted."""
        text = json.dumps({str(path.relative_to(self.path)): file_hash(path) for path in self.files()}, indent=1)
        temporary = self.path.parent / f".{self.path.name}.manifest"
        temporary.write_text(text)
        temporary.replace(self.path / MANIFEST)

    def compiled_files(self) -> dict[str, int]:
        """MindSpore's own files in the entry and when each was written (nanoseconds): equal before and after a load."""
        return {str(path): path.stat().st_mtime_ns for path in self.files() if path.suffix in (".mindir", ".hash")}


@contextmanager
def locked_entry(key: str) -> Iterator[tuple[CacheEntry, bool]]:
    """(entry, usable): an intact entry under a shared lock, or an emptied one, to be built, under an exclusive lock.

    With the cache disabled the entry is a directory of this process alone.
    """
    root = cache_directory() / "graphs"
    if not cache_enabled():
        entry = CacheEntry(cache_directory() / "uncached" / f"{key}-{os.getpid()}")
        entry.clear()
        yield entry, False
        return
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    entry = CacheEntry(root / key)
    with open(root / f".{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        problem = entry.check()
        if problem:
            fcntl.flock(lock, fcntl.LOCK_EX)
            problem = entry.check()  # another process may have built it meanwhile
        if problem:
            if problem != "empty":
                logger.warning("cache entry %s: %s; building it again", entry.path, problem)
            entry.clear()
        yield entry, not problem
