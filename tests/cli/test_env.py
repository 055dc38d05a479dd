"""`vllm-mindspore env` reports everything, also in an installation where parts are missing, broken or crash."""

import argparse
import json
import sys
from importlib import metadata

import pytest

from vllm_mindspore import cli, compat, patches
from vllm_mindspore.cli import env, host


@pytest.fixture(scope="module")
def report():
    return env.collect()


def test_healthy_environment_has_no_problem(report):
    assert report["problems"] == []


def test_versions_are_those_installed(report):
    for name in ("vllm", "torch", "mindspore", "numpy", "transformers"):
        assert report["versions"][name] == metadata.version(name)
    assert report["versions"]["python"] == sys.version.split()[0]


def test_kernels_patches_and_cache_are_reported(report):
    assert report["kernels"]["built"] and report["kernels"]["isa"] in report["kernels"]["isa_variants"]
    assert report["kernels"]["threads"] >= 1
    assert report["patches"] == [patch.attribute for patch in patches.PATCHES]
    assert "error" not in report["cache"]


def test_native_libraries_are_really_imported(report):
    assert {name: "version" in found for name, found in report["imports"].items()} == {
        "torch": True,
        "mindspore": True,
        "vllm": True,
    }


def test_text_has_every_part(report):
    text = env.render(report)
    for heading in "versions system device cpu memory kernels cache patches settings".split():
        assert f"\n{heading}:\n" in f"\n{text}"
    assert f"{len(patches.PATCHES)} attributes replaced" in text
    assert text.endswith("problems:\n  none found")


def test_json_can_be_parsed(capsys):
    assert cli.main(["env", "--json", "--no-imports"]) == 0
    assert json.loads(capsys.readouterr().out)["imports"] == {}


def fail(*args, **kwargs):
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("part", ["_cache", "_patches", "_settings", "_conflicts", "_versions", "_device", "_system"])
def test_a_broken_part_is_a_problem_and_the_rest_is_reported(monkeypatch, part):
    monkeypatch.setattr(env, part, fail)
    report = env.collect(imports=False)
    name = part.removeprefix("_")
    assert report[name] == {"error": "RuntimeError: on purpose"}
    assert report["problems"] == [f"{name}: RuntimeError: on purpose"]
    assert "error: RuntimeError: on purpose" in env.render(report) or part == "_conflicts"


def test_versions_that_cannot_be_checked_are_a_problem(monkeypatch):
    monkeypatch.setattr(compat, "check_environment", fail)
    assert env.collect(imports=False)["problems"] == ["versions could not be checked: RuntimeError: on purpose"]


def test_missing_packages_are_shown_as_not_installed(monkeypatch):
    monkeypatch.setattr(compat, "installed_version", lambda name: None)
    report = env.collect(imports=False)
    assert "mindspore: not installed" in env.render(report)
    assert len(report["problems"]) == len(compat.REQUIREMENTS)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11"),
        ("import nonexistent_module", "ModuleNotFoundError: No module named 'nonexistent_module'"),
        ("raise SystemExit(3)", "exit code 3"),
        ("print('not JSON')", "JSONDecodeError"),
        ("pass", "IndexError"),
    ],
)
def test_a_library_that_crashes_is_reported(monkeypatch, code, message):
    monkeypatch.setattr(env, "PROBES", {"torch": code})
    monkeypatch.setattr(env, "KERNELS", code)
    report = env.collect()
    assert message in report["imports"]["torch"]["error"]
    assert message in report["kernels"]["error"]
    assert len(report["problems"]) == 2


def test_a_library_that_hangs_is_reported(monkeypatch):
    monkeypatch.setattr(env, "PROBE_SECONDS", 0.2)
    assert env._probe("import time; time.sleep(60)") == {"error": "no answer within 0.2 s"}


@pytest.mark.parametrize(("check", "code"), [(True, 1), (False, 0)])
def test_exit_code_tells_of_problems_when_asked(monkeypatch, check, code):
    monkeypatch.setattr(env, "_cache", fail)
    assert env.run(argparse.Namespace(json=True, check=check, no_imports=True)) == code


def test_forced_instruction_set_and_settings_are_shown(monkeypatch):
    monkeypatch.setenv("VLLM_MS_CPU_ISA", "portable")
    monkeypatch.setenv("VLLM_MS_NUM_THREADS", "1")
    report = env.collect(imports=False)
    assert report["settings"]["VLLM_MS_CPU_ISA"] == "portable"
    assert (report["kernels"]["isa"], report["kernels"]["threads"]) == ("portable", 1)


def test_machine_without_proc_or_control_groups_is_unknown_not_an_error(monkeypatch):
    monkeypatch.setattr(host, "_read", lambda path: "")
    monkeypatch.setattr(host, "_free", lambda path: None)
    assert set(host.memory().values()) == {None}
    assert host.cpu()["features"] == [] and host.cpu()["cgroup_cpus"] is None
    assert host.operating_system()


def test_control_group_limits_are_read(monkeypatch):
    files = {"/sys/fs/cgroup/cpu.max": "150000 100000\n", "/sys/fs/cgroup/memory.max": "1073741824\n"}
    monkeypatch.setattr(host, "_read", lambda path: files.get(path, ""))
    assert host.cpu()["cgroup_cpus"] == 1.5
    assert host.memory()["cgroup_limit"] == 2**30
