"""kill -9: an error for the client, a non-zero exit, nothing left behind, and a new start on the same port at once.

And signals while a request runs.
"""

import signal

import psutil
import pytest

from tests.support import commands
from tests.support.crash import EXIT_TIMEOUT, RunningRequest, kill
from tests.support.server import NAME, Server


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


def test_killed_engine_core_ends_the_server(start):
    server = start()
    status, message = kill(server, server.process_named("EngineCore"))
    assert status == 500 and message
    assert server.process.returncode not in (0, None)


@pytest.mark.slow  # tests/distributed kills one of two
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
