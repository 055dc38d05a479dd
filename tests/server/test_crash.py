"""kill -9: an error for the client, a non-zero exit, nothing left behind, and a new start on the same port at once.

And signals while a request runs.
"""

import os
import signal
import threading

import httpx
import psutil
import pytest

from tests.support import commands
from tests.support.server import NAME, Server

EXIT_TIMEOUT = 30
ORPHAN_TIMEOUT = 60  # an engine core without its API server tidies up for some seconds, longer on a busy machine


@pytest.fixture(scope="module")
def port() -> int:
    """Every server of this module uses it, one right after the other."""
    return commands.free_port()


@pytest.fixture
def start(start_server, model, port):
    def start(*options: str) -> Server:
        command = ["vllm", "serve", model, "--backend", "mindspore", "--served-model-name", NAME, *options]
        return start_server(command, port=port)

    return start


class RunningRequest(threading.Thread):
    """A completion that would go on for some seconds, and what became of it: (HTTP status or 0, message)."""

    def __init__(self, server: Server):
        super().__init__(daemon=True)
        self.url, self.outcome = server.http.base_url, None
        self.start()
        commands.wait_until(lambda: server.metric("num_requests_running") == 1, 30, "the request runs")

    def run(self) -> None:
        body = {"model": NAME, "prompt": "Return", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}
        try:
            answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
            self.outcome = answer.status_code, answer.json().get("error", {}).get("message", "")
        except httpx.TransportError as error:
            self.outcome = 0, repr(error)


def kill(server: Server, victim: psutil.Process) -> tuple[int, str]:
    """Kill `victim` while a request runs; wait until nothing of the server is left; return what the client got."""
    processes = server.processes()
    shared = commands.shared_memory(processes)
    request = RunningRequest(server)
    victim.kill()
    request.join(EXIT_TIMEOUT)
    assert request.outcome, "the client got an answer or an error"
    commands.wait_until(lambda: server.process.poll() is not None, EXIT_TIMEOUT, "the API server exits")
    commands.wait_ended(processes, ORPHAN_TIMEOUT)
    commands.wait_until(lambda: not any(map(os.path.exists, shared)), 10, f"none of {shared} remains")
    left = [entry.name for entry in os.scandir(server.directory) if entry.name.startswith("vllm")]
    assert not left, "neither sockets nor rendezvous files stay in the temporary directory"
    return request.outcome


def test_killed_engine_core_ends_the_server(start):
    server = start()
    status, message = kill(server, server.process_named("EngineCore"))
    assert status == 500 and message
    assert server.process.returncode not in (0, None)


def test_killed_worker_ends_the_server(start):
    server = start("--distributed-executor-backend", "mp")
    worker = server.process_named("Worker")
    assert worker.pid != server.process_named("EngineCore").pid
    assert commands.shared_memory([worker]), "this executor talks through shared memory"
    status, message = kill(server, worker)
    assert status == 500 and message
    assert server.process.returncode not in (0, None)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_signal_ends_the_server_although_a_request_runs(start, number):
    """The client gets what was generated, or an error: either way the server does not wait for it."""
    server = start()
    processes = server.processes()
    request = RunningRequest(server)
    assert server.stop(number) == 0
    request.join(EXIT_TIMEOUT)
    assert request.outcome and request.outcome[0] in (0, 200, 500, 503)
    commands.wait_ended(processes, EXIT_TIMEOUT)


@pytest.mark.parametrize("executor", ["uni", pytest.param("mp", marks=pytest.mark.slow)])
def test_killed_api_server_leaves_no_engine_behind(start, executor):
    server = start("--distributed-executor-backend", executor)
    status, _ = kill(server, psutil.Process(server.process.pid))
    assert status == 0
