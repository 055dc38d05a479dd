"""Builds the C++ operators: `python -m vllm_mindspore.ops.build [--check]`.

By convention of place: `csrc/*.cc` and `csrc/wrappers/*.cc` (MindSpore AOT operators) are compiled once,
`csrc/kernels/*.cc` once per instruction set. Objects that are up to date are kept. Needs GCC (g++ or $CXX) only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parent / "csrc"
LIB = Path(__file__).parent / "lib"
LIBRARY = LIB / "libvllm_ms_cpu.so"
BUILD_INFO = LIB / "build_info.json"

MINIMUM_GCC = 9  # vector extensions: __builtin_convertvector

# The old std::string ABI is MindSpore's. GCC 12 sees uninitialised values in its own AVX-512 intrinsics.
COMMON_FLAGS = (
    "-std=c++17 -O3 -fPIC -pthread -fvisibility=hidden -ffp-contract=off -fno-math-errno -D_GLIBCXX_USE_CXX11_ABI=0"
    " -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized"
).split()
LINK_FLAGS = "-shared -pthread -Wl,-z,nodelete -Wl,--as-needed -Wl,--exclude-libs,ALL".split()

AVX2_FLAGS = "-mavx2 -mfma -mf16c".split()
AVX512_FLAGS = [
    *AVX2_FLAGS,
    *"-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512bf16 -mavx512vnni".split(),
    "-mprefer-vector-width=512",
]

# Machine -> instruction-set variants, the portable one (no flags) first. See csrc/isa.h.
ISA_FLAGS = {
    "x86_64": {
        "portable": [],
        "avx2": AVX2_FLAGS,
        "avx512": AVX512_FLAGS,
        "amx": [*AVX512_FLAGS, "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": {"portable": []},
}


class BuildError(RuntimeError):
    """The library cannot be built, or the built one cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Compiler:
    """A GCC and the machine it compiles for."""

    command: tuple[str, ...]
    version: str
    machine: str

    @classmethod
    def find(cls, command: str | None = None) -> Compiler:
        """The compiler of `command`, $CXX or g++. Raises BuildError when it does not run or is too old."""
        words = tuple(shlex.split(command or os.environ.get("CXX") or "g++"))
        name = " ".join(words)
        try:
            version, target, release = (
                subprocess.run([*words, option], capture_output=True, text=True, check=True).stdout.strip()
                for option in ("--version", "-dumpmachine", "-dumpversion")
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise BuildError(f"C++ compiler {name!r} does not run ({error}): install g++ or set CXX") from None
        title = version.splitlines()[0]
        if "clang" in version or int(release.split(".")[0]) < MINIMUM_GCC:
            raise BuildError(f"C++ compiler {name!r} is {title}; GCC {MINIMUM_GCC} or newer is needed: set CXX")
        machine = target.split("-")[0]
        if machine not in ISA_FLAGS:
            raise BuildError(f"no kernels for machine {machine!r}; supported: {', '.join(ISA_FLAGS)}")
        return cls(words, title, machine)

    def isa_flags(self) -> dict[str, list[str]]:
        """Instruction-set variants that this compiler can build, with their flags."""
        supported = {}
        for isa, flags in ISA_FLAGS[self.machine].items():
            probe = [*self.command, *flags, "-x", "c++", "-E", os.devnull]
            if subprocess.run(probe, capture_output=True).returncode == 0:
                supported[isa] = flags
        return supported


@dataclass(frozen=True)
class CompileJob:
    """One object file: a source with its flags."""

    source: Path
    flags: tuple[str, ...]
    object_file: Path

    def command(self, compiler: Compiler) -> list[str]:
        return [*compiler.command, *self.flags, "-c", str(self.source), "-o", str(self.object_file)]

    def run(self, compiler: Compiler) -> bool:
        """Compile unless the object is up to date; true when it was compiled. Raises BuildError with the output."""
        record_file = self.object_file.with_suffix(".json")
        key = {"command": self.command(compiler), "compiler": compiler.version}
        if self.object_file.exists() and _up_to_date(record_file, key):
            return False
        dependency_file = self.object_file.with_suffix(".d")
        command = [*self.command(compiler), "-MMD", "-MF", str(dependency_file)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise BuildError(f"{shlex.join(command)}\n{result.stderr}")
        if result.stderr:
            print(result.stderr, file=sys.stderr)
        dependencies = dependency_file.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        record_file.write_text(json.dumps({**key, "files": {path: _file_hash(path) for path in dependencies}}))
        return True


def _file_hash(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _up_to_date(record_file: Path, key: dict) -> bool:
    try:
        record = json.loads(record_file.read_text())
        same_key = all(record[name] == value for name, value in key.items())
        return same_key and all(_file_hash(path) == digest for path, digest in record["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def compile_all(jobs: Iterable[CompileJob], compiler: Compiler) -> int:
    """Run `jobs` in parallel, one per CPU of the affinity mask. Returns how many were compiled (not up to date)."""
    jobs = list(jobs)
    for job in jobs:
        job.object_file.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return sum(pool.map(lambda job: job.run(compiler), jobs))


def kernel_jobs(compiler: Compiler, objects: Path, extra_flags: Iterable[str] = ()) -> list[CompileJob]:
    """The objects without MindSpore: `csrc/*.cc` and every variant of `csrc/kernels/*.cc`."""
    variants = compiler.isa_flags()
    common = [*COMMON_FLAGS, *extra_flags, *isa_macros(variants)]
    jobs = [CompileJob(source, tuple(common), objects / f"{source.stem}.o") for source in sorted(CSRC.glob("*.cc"))]
    # wide variants first: they compile longest
    for isa, flags in reversed(variants.items()):
        for source in sorted((CSRC / "kernels").glob("*.cc")):
            all_flags = (*common, *flags, f"-DVLLM_MS_ISA={isa}")
            jobs.append(CompileJob(source, all_flags, objects / f"kernels-{source.stem}-{isa}.o"))
    return jobs


def isa_macros(variants: Iterable[str]) -> list[str]:
    """Preprocessor flags that tell csrc/isa.h which variants are built."""
    return [f"-DVLLM_MS_HAVE_{isa.upper()}" for isa in variants if isa != "portable"]


def wrapper_jobs(compiler: Compiler, objects: Path) -> list[CompileJob]:
    """The MindSpore AOT wrappers, `csrc/wrappers/*.cc`."""
    flags = (*COMMON_FLAGS, *isa_macros(compiler.isa_flags()))
    sources = sorted((CSRC / "wrappers").glob("*.cc"))
    return [CompileJob(source, flags, objects / f"wrappers-{source.stem}.o") for source in sources]


def source_hash() -> str:
    """Hash of what determines the library: sources and flags."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".cc", ".h"):
            digest.update(str(path.relative_to(CSRC)).encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(json.dumps([COMMON_FLAGS, LINK_FLAGS, ISA_FLAGS], sort_keys=True).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    LIB.mkdir(parents=True, exist_ok=True)
    with open(LIB / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build(verbose: bool = True) -> Path:
    """Build the library if it is not up to date and return its path. Safe against a concurrent build."""
    start = time.monotonic()
    with _locked():
        info = read_build_info()
        digest = source_hash()
        if LIBRARY.exists() and info.get("source_hash") == digest:
            if verbose:
                print(f"C++ operators up to date: {LIBRARY}")
            return LIBRARY
        compiler = Compiler.find()
        objects = LIB / "objects"
        jobs = [*wrapper_jobs(compiler, objects), *kernel_jobs(compiler, objects)]
        if verbose:
            print(f"Building C++ operators with {compiler.version} ...", flush=True)
        compiled = compile_all(jobs, compiler)
        temporary = LIBRARY.with_suffix(f".{os.getpid()}.tmp")
        link = [*compiler.command, *LINK_FLAGS, *(str(job.object_file) for job in jobs), "-o", str(temporary)]
        result = subprocess.run(link, capture_output=True, text=True)
        if result.returncode != 0:
            raise BuildError(f"{shlex.join(link)}\n{result.stderr}")
        os.replace(temporary, LIBRARY)
        info = {"compiler": compiler.version, "isa_variants": list(compiler.isa_flags()), "source_hash": digest}
        BUILD_INFO.write_text(json.dumps(info, indent=2) + "\n")
        if verbose:
            print(f"Built {LIBRARY} in {time.monotonic() - start:.0f} s ({compiled} of {len(jobs)} objects compiled)")
    return LIBRARY


def read_build_info() -> dict:
    """What the last build recorded: compiler, isa_variants, source_hash; {} when there is none."""
    try:
        return json.loads(BUILD_INFO.read_text())
    except (OSError, ValueError):
        return {}


def load() -> ctypes.CDLL:
    """The built library, checked: environment valid, instruction set available. Raises BuildError."""
    _check_num_threads()
    if not LIBRARY.exists():
        raise BuildError(f"{LIBRARY} is not built: run `python -m vllm_mindspore.ops.build`")
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise BuildError(f"{LIBRARY} does not load ({error}): run `python -m vllm_mindspore.ops.build`") from None
    text = ctypes.create_string_buffer(256)
    if library.vllm_ms_cpu_isa(text, len(text)) != 0:
        raise BuildError(text.value.decode())
    return library


def _check_num_threads() -> None:
    text = os.environ.get("VLLM_MS_NUM_THREADS", "")
    if text and not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1024):
        raise BuildError(f"VLLM_MS_NUM_THREADS={text!r}: expected a number from 1 to 1024")


def kernel_info() -> dict:
    """The state of the C++ operators, for bug reports.

    Keys: built (bool), path, up_to_date (bool), compiler, isa_variants (list), isa (the one in use), threads, machine,
    problem (None or what is wrong).
    """
    info = {"built": LIBRARY.exists(), "path": str(LIBRARY), "machine": platform.machine(), "problem": None}
    recorded = read_build_info()
    info["up_to_date"] = info["built"] and recorded.get("source_hash") == source_hash()
    info["compiler"] = recorded.get("compiler")
    info["isa_variants"] = recorded.get("isa_variants", [])
    info["isa"] = info["threads"] = None
    try:
        library = load()
    except BuildError as error:
        info["problem"] = str(error)
        return info
    text = ctypes.create_string_buffer(256)
    library.vllm_ms_cpu_isa(text, len(text))
    info["isa"] = text.value.decode()
    info["threads"] = library.vllm_ms_num_threads()
    if not info["up_to_date"]:
        info["problem"] = "the library is older than its sources: run `python -m vllm_mindspore.ops.build`"
    return info


def check() -> None:
    """Raise BuildError unless the library is built from the present sources and loads."""
    info = kernel_info()
    if info["problem"]:
        raise BuildError(info["problem"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_mindspore.ops.build", description="Build the C++ operators.")
    parser.add_argument("--check", action="store_true", help="only verify that the built library is current and loads")
    options = parser.parse_args(arguments)
    try:
        if not options.check:
            build()
        check()
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.check:
        print(f"C++ operators up to date: {LIBRARY}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
