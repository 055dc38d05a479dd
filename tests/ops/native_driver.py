"""Builds the C++ test driver of tests/ops/native with the library's kernels, for this machine or another."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vllm_mindspore.ops import build

SOURCES = Path(__file__).parent / "native"


def build_driver(compiler: build.Compiler, kernel_objects: Path, folder: Path) -> Path:
    """Compile what is not up to date and link. Kernel objects go to `kernel_objects`, the rest to `folder`."""
    kernels = build.kernel_jobs(compiler, kernel_objects)
    macros = build.isa_macros(compiler.isa_flags())
    flags = [*build.COMMON_FLAGS, "-O1", *macros, f"-I{build.CSRC}", f"-I{SOURCES}"]
    tests = [
        build.CompileJob(source, tuple(flags), folder / f"{source.stem}.o") for source in sorted(SOURCES.glob("*.cc"))
    ]
    build.compile_all([*kernels, *tests], compiler)
    driver = folder / "driver"
    objects = [str(job.object_file) for job in (*kernels, *tests)]
    subprocess.run([*compiler.command, "-pthread", *objects, "-o", str(driver)], check=True)
    return driver
