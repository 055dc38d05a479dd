"""Runs vLLM's command line as a user does, and never leaves a process behind."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
# The child gets SIGTERM when pytest dies, however it dies; exec keeps that setting.
LAUNCH = (
    f"import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)}); os.execv(sys.argv[1], sys.argv[1:])"
)
OURS = ("VLLM_", "MS_", "TMPDIR")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a user who has set nothing of vLLM's or ours, beside the tests' own defaults."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
    defaults = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PATH": f"{BIN}:{kept['PATH']}"}
    if "VLLM_MS_CACHE_DIR" in os.environ:
        defaults["VLLM_MS_CACHE_DIR"] = os.environ["VLLM_MS_CACHE_DIR"]
    return {**kept, **defaults, **(extra or {})}


def start(command: list[str], env: Mapping[str, str] | None = None, **popen) -> subprocess.Popen:
    """Start `command` (its first word is a program of this environment) in a session of its own."""
    words = [sys.executable, "-c", LAUNCH, str(BIN / command[0]), *map(str, command[1:])]
    return subprocess.Popen(words, env=environment(env), stdin=subprocess.DEVNULL, start_new_session=True, **popen)


def run(command: list[str], env: Mapping[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run `command` to its end; stdout and stderr are text. After `timeout` seconds its process group is killed."""
    process = start(command, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as late:
        kill_group(process)
        raise AssertionError(f"{command} still runs after {timeout} s:\n{late.stdout}\n{late.stderr}") from late
    finally:
        kill_group(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def kill_group(process: subprocess.Popen) -> None:
    """Kill whatever is left of a process started by `start`."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def short_temporary_directory() -> str:
    """A private directory with a short name: the paths of Unix sockets may have 107 bytes only."""
    return tempfile.mkdtemp(prefix="vms-", dir="/tmp")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(condition: Callable[[], bool], timeout: float, what: str, interval: float = 0.05) -> None:
    """Return as soon as `condition()` is true; AssertionError that says `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:.0f} s: {what}")
        time.sleep(interval)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run (a zombie has ended)."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [process for process in processes if runs(process)]


def wait_ended(processes: list[psutil.Process], timeout: float = 10) -> None:
    """Return when none of them runs; AssertionError after `timeout` seconds. Helpers end just after their parent."""
    wait_until(lambda: not alive(processes), timeout, f"all of {processes} end")


def shared_memory(processes: list[psutil.Process]) -> set[str]:
    """Files of /dev/shm that the processes have mapped or opened."""
    found = set()
    for process in processes:
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        found.update(line.split(maxsplit=5)[5] for line in maps if "/dev/shm/" in line)
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            target = os.readlink(link)
            if target.startswith("/dev/shm/"):
                found.add(target)
    return {name for name in found if not name.endswith("(deleted)")}
