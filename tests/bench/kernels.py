"""The kernels beside the machine: `make bench-kernels`, or one family with `make bench-kernels ARGS=attention`.

`VLLM_MS_CPU_ISA=avx2 make bench-kernels` measures another variant than the best one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vllm_mindspore.ops import build

FOLDER = Path(__file__).parent


def main() -> int:
    build.build(verbose=False)
    compiler = build.Compiler.find()
    kernels = build.kernel_jobs(compiler, build.LIB / "objects")
    build.compile_all(kernels, compiler)
    driver = build.LIB / "bench-kernels"
    flags = [*build.COMMON_FLAGS, "-march=native", *build.isa_macros(compiler.isa_flags()), f"-I{build.CSRC}"]
    objects = [str(job.object_file) for job in kernels]
    command = [*compiler.command, *flags, str(FOLDER / "kernels.cc"), *objects, "-pthread", "-o", str(driver)]
    subprocess.run(command, check=True)
    return subprocess.run([driver, *sys.argv[1:]]).returncode


if __name__ == "__main__":
    sys.exit(main())
