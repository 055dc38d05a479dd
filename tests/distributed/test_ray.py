"""Ranks that are actors of a Ray cluster over two hosts, which are two network namespaces."""

import functools
import importlib.util
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.distributed.layouts import serve, served_greedy
from tests.models.reference import MAX_TOKENS, PROMPTS, reference
from tests.support import commands, namespaces
from tests.support.crash import RunningRequest
from tests.support.namespaces import TwoHosts
from tests.support.server import Server

pytestmark = [
    pytest.mark.skipif(bool(namespaces.missing()), reason=namespaces.missing()),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is missing: the extra `ray` brings it"),
    pytest.mark.slow,
    pytest.mark.server,
]
PORT = "6379"


@contextmanager
def cluster(two: TwoHosts, folder: Path) -> Iterator[list[subprocess.Popen]]:
    """A Ray node on each host, which takes one rank."""
    head = f"{two.hosts[0].address}:{PORT}"
    session = commands.short_temporary_directory()
    small = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block"]
    common = ['--resources={"NPU": 1}', *small]
    nodes = [
        ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={session}"],
        [f"--address={head}"],
    ]
    processes = []
    with open(folder / "ray.log", "ab") as log:
        for host, options in zip(two.hosts, nodes, strict=True):
            command = ["ray", "start", *options, f"--node-ip-address={host.address}", *common]
            processes.append(commands.start(host.runs(command), host.environment, stdout=log, stderr=subprocess.STDOUT))
            ready = functools.partial(has_nodes, two, head, len(processes))
            commands.wait_until(ready, 90, f"Ray has {len(processes)} nodes", 2)
    try:
        yield processes
    finally:
        children = [child for process in processes for child in psutil.Process(process.pid).children(recursive=True)]
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(60)
        for child in commands.alive(children):
            child.kill()


def has_nodes(two: TwoHosts, head: str, number: int) -> bool:
    status = commands.run(two.hosts[0].runs(["ray", "status", f"--address={head}"]), two.hosts[0].environment)
    return status.stdout.count(" node_") == number


ACTORS = "--distributed-executor-backend=ray"
# Engines that are actors too, one on each host.
ENGINES = ("--data-parallel-size=2", "--data-parallel-size-local=1", "--data-parallel-backend=ray")


@pytest.mark.parametrize(
    "options",
    [
        ("--tensor-parallel-size=2", ACTORS),
        ("--pipeline-parallel-size=2", ACTORS),
        (*ENGINES, "--enable-expert-parallel"),
    ],
    ids=" ".join,
)
def test_actors_on_two_hosts_give_the_tokens_of_one_process(options, tmp_path):
    name = "parallel-qwen3-moe"
    expected = reference(name).generate(PROMPTS)
    with TwoHosts() as two, cluster(two, tmp_path) as nodes:
        environment = {**two.hosts[0].environment, "RAY_ADDRESS": f"{two.hosts[0].address}:{PORT}"}
        command = two.hosts[0].runs(serve(name, *options))
        log = tmp_path / "server.log"
        with Server(command, commands.free_port(), log, environment, address=two.door) as server:
            assert served_greedy(server, PROMPTS, MAX_TOKENS) == expected
            assert "1 of them on other hosts" in log.read_text()
            actors = [actor for node in nodes for actor in actors_of(node)]
            assert len(actors) == 2
            RunningRequest(server, 200)
            commands.wait_until(lambda: server.metric("num_requests_running") == 1, 30, "the request runs")
            actors[-1].kill()
            commands.wait_until(lambda: server.process.poll() is not None, 60, "the server ends")
            assert server.process.returncode != 0
            commands.wait_ended(actors, 60)
        assert "has died" in log.read_text()


def actors_of(node: subprocess.Popen) -> list[psutil.Process]:
    """The ranks that a node runs."""
    found = psutil.Process(node.pid).children(recursive=True)
    return [process for process in found if process.name().startswith("ray::RayWorker")]
