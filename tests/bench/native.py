"""Programs of this folder in C++, built with the kernels' sources as they are."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vllm_mindspore.ops import build

FOLDER = Path(__file__).parent


def built(source: str) -> Path:
    """The program of `source`, a file of this folder."""
    build.build(verbose=False)
    compiler = build.Compiler.find()
    kernels = build.kernel_jobs(compiler, build.LIB / "objects")
    build.compile_all(kernels, compiler)
    program = build.LIB / f"bench-{Path(source).stem}"
    flags = [*build.COMMON_FLAGS, "-march=native", *build.isa_macros(compiler.isa_flags()), f"-I{build.CSRC}"]
    objects = [str(job.object_file) for job in kernels]
    command = [*compiler.command, *flags, str(FOLDER / source), *objects, "-pthread", "-o", str(program)]
    subprocess.run(command, check=True)
    return program
