"""The build of the C++ operators: what is compiled when, what is in the objects, and what is said when it is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

from vllm_mindspore.ops import build


@pytest.fixture(scope="module", autouse=True)
def built():
    build.build(verbose=False)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


def objects(pattern: str) -> list:
    found = sorted((build.LIB / "objects").glob(pattern))
    assert found
    return found


def test_kernel_info_describes_the_library():
    info = build.kernel_info()
    assert info["built"] and info["up_to_date"] and info["problem"] is None
    assert info["isa"] in info["isa_variants"]
    assert info["compiler"] == build.Compiler.find().version
    assert info["threads"] == int(os.environ.get("VLLM_MS_NUM_THREADS", len(os.sched_getaffinity(0))))


def test_variants_share_no_code():
    """A weak symbol in two variants' objects would be linked once, perhaps with instructions the CPU lacks."""
    for path in objects("kernels-*.o"):
        isa = path.stem.rsplit("-", 1)[1]
        listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            kind, name = line[17:].split(" ", 1)
            if kind in "WVu" and "__gxx_personality_v0" not in name:
                assert f"::{isa}::" in name, f"{path.name}: {name}"


@pytest.mark.skipif(build.platform.machine() != "x86_64", reason="about x86 registers")
def test_only_the_variants_use_wide_registers():
    narrow = [path for path in objects("*.o") if not re.search(r"-(avx\w+|amx)$", path.stem)]
    for path in [*narrow, *objects("kernels-*-avx2.o")]:
        listing = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        assert "zmm" not in listing, path.name
        assert path.stem.endswith("-avx2") or "ymm" not in listing, path.name


def test_no_unsafe_flags():
    flags = [*build.COMMON_FLAGS, *build.LINK_FLAGS]
    flags += [flag for variants in build.ISA_FLAGS.values() for isa in variants.values() for flag in isa]
    assert not {"-ffast-math", "-Ofast", "-march=native", "-funsafe-math-optimizations"} & set(flags)


def test_objects_are_compiled_only_when_something_changed(tmp_path):
    source, header = tmp_path / "one.cc", tmp_path / "one.h"
    header.write_text("#define VALUE 1\n")
    source.write_text('#include "one.h"\nint value() { return VALUE; }\n')
    compiler = build.Compiler.find()
    job = build.CompileJob(source, ("-O1",), tmp_path / "one.o")
    assert job.run(compiler)
    assert not job.run(compiler)
    header.write_text("#define VALUE 2\n")
    assert job.run(compiler)
    assert build.CompileJob(source, ("-O2",), job.object_file).run(compiler), "flags changed"
    job.object_file.with_suffix(".json").write_text("{damaged")
    assert job.run(compiler)
    assert not job.run(compiler)


def test_a_compile_error_is_shown(tmp_path):
    source = tmp_path / "broken.cc"
    source.write_text("int broken(\n")
    with pytest.raises(build.BuildError, match="broken.cc"):
        build.CompileJob(source, (), tmp_path / "broken.o").run(build.Compiler.find())


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="'no-such-compiler' does not run .* install g\\+\\+ or set CXX"):
        build.Compiler.find()


@pytest.mark.parametrize(
    ("version", "release"), [("g++ (GCC) 7.3.0", "7"), ("clang version 17.0.0 (GCC 4.2.1 compatible)", "17")]
)
def test_an_unsuitable_compiler_is_refused(version, release, tmp_path):
    fake = tmp_path / "compiler"
    fake.write_text(f'#!/bin/sh\ncase $1 in --version) echo "{version}";; -dumpversion) echo {release};; esac\n')
    fake.chmod(0o755)
    with pytest.raises(build.BuildError, match="GCC 9 or newer is needed: set CXX"):
        build.Compiler.find(str(fake))


def test_check_notices_changed_sources(monkeypatch, capsys):
    assert build.main(["--check"]) == 0
    monkeypatch.setattr(build, "source_hash", lambda: "other")
    assert build.main(["--check"]) == 1
    assert "older than its sources" in capsys.readouterr().err


def test_a_library_that_is_not_there_or_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "lib.so")
    with pytest.raises(build.BuildError, match="is not built: run `python -m vllm_mindspore.ops.build`"):
        build.load()
    assert build.kernel_info()["built"] is False
    build.LIBRARY.write_bytes(b"not a library")
    with pytest.raises(build.BuildError, match="does not load"):
        build.load()


def test_building_again_is_quick_and_keeps_the_library():
    before = build.LIBRARY.stat().st_mtime_ns
    start = time.monotonic()
    build.build(verbose=False)
    assert time.monotonic() - start < 2.0
    assert build.LIBRARY.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VLLM_MS_CPU_ISA", "sse9", "expected portable, avx2, avx512 or amx"),
        ("VLLM_MS_NUM_THREADS", "0", "expected a number from 1 to 1024"),
        ("VLLM_MS_NUM_THREADS", "many", "expected a number from 1 to 1024"),
    ],
)
def test_wrong_settings_are_refused(name, value, message):
    done = python("from vllm_mindspore.ops import build; build.load()", **{name: value})
    assert done.returncode != 0
    assert f"{name}=" in done.stderr and message in done.stderr


def test_threads_follow_the_setting_and_the_affinity_mask():
    show = "from vllm_mindspore.ops import build; print(build.kernel_info()['threads'])"
    assert python(show, VLLM_MS_NUM_THREADS="3").stdout.strip() == "3"
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + show
    assert python(one, VLLM_MS_NUM_THREADS="").stdout.strip() == "1"


def test_an_isa_can_be_chosen():
    show = "from vllm_mindspore.ops import build; print(build.kernel_info()['isa'])"
    assert python(show, VLLM_MS_CPU_ISA="portable").stdout.strip() == "portable"


def test_the_build_needs_neither_torch_nor_mindspore():
    code = (
        "import sys; from vllm_mindspore.ops import build; build.main(['--check']);"
        "assert not {'torch', 'mindspore', 'numpy'} & set(sys.modules)"
    )
    assert python(code).returncode == 0
