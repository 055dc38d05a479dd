"""deploy/setup.sh tells what is missing, destroys nothing it did not make, and does a thing once."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 60


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A directory that the script takes for its checkout."""
    shutil.copytree(ROOT / "deploy", tmp_path / "checkout" / "deploy")
    return tmp_path / "checkout"


def set_up(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("VENV", "PYTHON", "VLLM")}
    environment |= {"PYTHON": sys.executable, **variables}
    command = ["bash", checkout / "deploy" / "setup.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)


def tools_without(tmp_path: Path, missing: str) -> str:
    """A PATH with the tools the script uses, but one."""
    folder = tmp_path / "tools"
    folder.mkdir()
    tools = "bash dirname uname g++ flock df awk cat mkdir date sha256sum cut rm mv sed tail stat find touch".split()
    for tool in set(tools) - {missing}:
        (folder / tool).symlink_to(shutil.which(tool))
    return str(folder)


@pytest.mark.parametrize("python", ["/bin/false", "python-that-does-not-exist"])
def test_missing_python_is_named(checkout, python):
    done = set_up(checkout, PYTHON=python)
    assert done.returncode == 1
    assert f"Python 3.11 is needed and '{python}' is not one" in done.stderr


def test_missing_compiler_is_named(checkout, tmp_path):
    done = set_up(checkout, PATH=tools_without(tmp_path, "g++"))
    assert done.returncode == 1
    assert "g++ is needed to compile the operators" in done.stderr


def test_unknown_argument_is_refused(checkout):
    assert set_up(checkout, "tests").returncode == 2


def test_version_of_vllm_without_pins_is_refused_with_those_that_have_some(checkout):
    done = set_up(checkout, VLLM="0.31.0")
    assert done.returncode == 1
    assert "VLLM=0.31.0: no such version is pinned" in done.stderr and "0.33.0" in done.stderr


def test_another_version_of_vllm_gets_an_environment_of_its_own(checkout):
    done = set_up(checkout, VLLM="0.33.0", PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert "virtual environment in .venv-vllm-0.33.0" in done.stdout
    assert not (checkout / ".venv").exists()


def test_folder_that_is_no_environment_is_left_alone(checkout, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all of it")
    done = set_up(checkout, VENV=str(precious))
    assert done.returncode == 1
    assert f"{precious} exists and is not a virtual environment" in done.stderr
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


def test_failure_shows_the_log_and_the_next_run_repeats_the_step(checkout, tmp_path):
    venv = tmp_path / "venv"
    for _ in range(2):
        done = set_up(checkout, VENV=str(venv), PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
        assert done.returncode != 0
        assert "virtual environment in" in done.stdout
        assert 'the step "virtual environment in' in done.stderr
        assert str(checkout / "build" / "setup.log") in done.stderr
        assert "No matching distribution found for pip" in done.stderr
    assert not (venv / ".setup" / "venv").exists()


def test_second_run_waits_for_the_first(checkout):
    (checkout / "build").mkdir()
    # Once it has the lock it refuses this VENV.
    environment = {**os.environ, "PYTHON": sys.executable, "VENV": str(checkout / "deploy")}
    command = ["bash", checkout / "deploy" / "setup.sh"]
    with open(checkout / "build" / "setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert "another set-up is running" in process.stdout.readline()
            time.sleep(0.5)
            assert process.poll() is None
            fcntl.flock(lock, fcntl.LOCK_UN)
            rest, _ = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert "is not a virtual environment" in rest


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_set_up_from_nothing_survives_being_killed_again_and_again(tmp_path):
    checkout = tmp_path / "checkout"
    skipped = shutil.ignore_patterns(".git", ".venv", "build", "lib", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, checkout, ignore=skipped)
    ours = ("VENV", "PYTHON", "VLLM", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["make", "setup-test"]
    for seconds in (2, 8, 20, 30, 60, 60):
        process = subprocess.Popen(command, cwd=checkout, env=environment, start_new_session=True)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
    subprocess.run(command, cwd=checkout, env=environment, check=True)
    python = checkout / ".venv" / "bin" / "python"
    missing = [python, "-I", "deploy/pins.py", "missing", "pip", "torch", "packages", "vllm", "test"]
    assert subprocess.check_output(missing, cwd=checkout) == b""
    assert subprocess.run([python, "-m", "vllm_mindspore.cli", "env", "--check"], cwd=tmp_path).returncode == 0
    assert subprocess.check_output(command, cwd=checkout, env=environment) == b""
