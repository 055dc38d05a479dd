"""What `kill -9` of one of a server's processes leaves behind, and what the client is told."""

import os
import threading

import httpx
import psutil

from tests.support import commands
from tests.support.server import NAME, Server

EXIT_TIMEOUT = 30
ORPHAN_TIMEOUT = 60  # an engine core without its API server tidies up for some seconds, longer on a busy machine


class RunningRequest(threading.Thread):
    """A completion that would go on for some seconds, and what became of it: (HTTP status or 0, message)."""

    def __init__(self, server: Server, max_tokens: int = 2000):
        super().__init__(daemon=True)
        self.url, self.max_tokens, self.outcome = server.http.base_url, max_tokens, None
        self.start()
        commands.wait_until(lambda: server.metric("num_requests_running") == 1, 30, "the request runs")

    def run(self) -> None:
        body = {"model": NAME, "prompt": "Return", "max_tokens": self.max_tokens, "ignore_eos": True, "temperature": 0}
        try:
            answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
            self.outcome = answer.status_code, answer.json().get("error", {}).get("message", "")
        except httpx.TransportError as error:
            self.outcome = 0, repr(error)


def kill(server: Server, victim: psutil.Process, max_tokens: int = 2000) -> tuple[int, str]:
    """Kill `victim` while a request runs; wait until nothing of the server is left; return what the client got."""
    processes = server.processes()
    shared = commands.shared_memory(processes)
    request = RunningRequest(server, max_tokens)
    victim.kill()
    request.join(EXIT_TIMEOUT)
    assert request.outcome, "the client got an answer or an error"
    commands.wait_until(lambda: server.process.poll() is not None, EXIT_TIMEOUT, "the API server exits")
    commands.wait_ended(processes, ORPHAN_TIMEOUT)
    commands.wait_until(lambda: not any(map(os.path.exists, shared)), 10, f"none of {shared} remains")
    left = [entry.name for entry in os.scandir(server.directory) if entry.name.startswith("vllm")]
    assert not left, f"neither sockets nor rendezvous files stay in the temporary directory: {left}"
    return request.outcome
