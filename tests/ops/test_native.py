"""The kernels against float64 in C++, for every instruction set of this machine, and for aarch64 under qemu."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.ops.native_driver import SOURCES, build_driver
from vllm_mindspore.ops import build

CROSS_COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
SYSROOT = "/usr/aarch64-linux-gnu"


def run(command) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "0 failed checks" in done.stdout


def test_kernels_of_this_machine(request):
    build.build(verbose=False)
    folder = request.config.cache.mkdir("native")
    run([build_driver(build.Compiler.find(), build.LIB / "objects", folder)])


@pytest.mark.aarch64
@pytest.mark.skipif(
    not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)),
    reason=f"{CROSS_COMPILER} or {EMULATOR} is missing: apt-get install g++-aarch64-linux-gnu qemu-user",
)
def test_kernels_of_aarch64(request):
    folder = request.config.cache.mkdir("native-aarch64")
    driver = build_driver(build.Compiler.find(CROSS_COMPILER), folder, folder)
    run([EMULATOR, "-L", SYSROOT, driver, "-pool_works_after_fork"])  # qemu itself aborts when a threaded process forks


def test_a_failing_check_fails_the_driver(tmp_path):
    """The C++ harness itself: a wrong expectation is reported and sets the exit code."""
    wrong = tmp_path / "wrong.cc"
    wrong.write_text('#include "testing.h"\nTEST(wrong) { CHECK(1 + 1 == 3) << "sum"; }\n')
    compiler = build.Compiler.find()
    sources = [wrong, SOURCES / "main.cc", build.CSRC / "isa.cc", build.CSRC / "parallel.cc"]
    command = [*compiler.command, "-std=c++17", "-pthread", f"-I{build.CSRC}", f"-I{SOURCES}", *sources]
    subprocess.run([*command, "-o", tmp_path / "driver"], check=True)
    done = subprocess.run([tmp_path / "driver"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAIL wrong" in done.stdout and "sum" in done.stderr
