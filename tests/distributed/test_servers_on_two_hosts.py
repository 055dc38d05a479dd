"""One server over two hosts, which are two network namespaces: the tokens of one process, and a clean end of both."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.distributed.layouts import serve, served_greedy
from tests.models.reference import MAX_TOKENS, PROMPTS, reference
from tests.support import commands, namespaces
from tests.support.crash import RunningRequest
from tests.support.namespaces import Host, TwoHosts
from tests.support.server import Server

pytestmark = [
    pytest.mark.skipif(bool(namespaces.missing()), reason=namespaces.missing()),
    pytest.mark.slow,
    pytest.mark.server,
]
TENSORS, STAGES = ("--tensor-parallel-size=2",), ("--pipeline-parallel-size=2",)
EXPERTS = ("--data-parallel-size=2", "--enable-expert-parallel")
MASTER_PORT = "29511"
NGRAM = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}'


class Follower:
    """The command on the second host: it has no API server."""

    def __init__(self, command: list[str], host: Host, log: Path):
        self.log, self._file = log, open(log, "ab")
        self.directory = commands.short_temporary_directory()
        environment = {**host.environment, "TMPDIR": self.directory, "VLLM_MS_COLLECTIVE_TIMEOUT": "5"}
        self.process = commands.start(
            host.runs([*command, "--headless"]), environment, stdout=self._file, stderr=subprocess.STDOUT
        )

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def stop(self) -> None:
        commands.kill_group(self.process)
        self.process.wait()
        self._file.close()


def over_two_hosts(two: TwoHosts, options: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Options of the first and of the second host."""
    address = two.hosts[0].address
    if "--data-parallel-size=2" in options:
        both = [*options, "--data-parallel-size-local=1", f"--data-parallel-address={address}"]
        return both, [*both, "--data-parallel-start-rank=1"]
    both = [*options, "--nnodes=2", f"--master-addr={address}", f"--master-port={MASTER_PORT}"]
    return [*both, "--node-rank=0"], [*both, "--node-rank=1"]


@contextmanager
def running(two: TwoHosts, name: str, options: tuple[str, ...], folder: Path) -> Iterator[tuple[Server, Follower]]:
    first, second = over_two_hosts(two, options)
    environment = {**two.hosts[0].environment, "VLLM_MS_COLLECTIVE_TIMEOUT": "5"}
    follower = Follower(serve(name, *second), two.hosts[1], folder / "second.log")
    command = two.hosts[0].runs(serve(name, *first))
    try:
        with Server(command, commands.free_port(), folder / "first.log", environment, address=two.door) as server:
            yield server, follower
    finally:
        follower.stop()


@pytest.fixture
def two():
    with TwoHosts() as two:
        yield two


@pytest.mark.parametrize(
    ("name", "options"),
    [("parallel-qwen3-moe", TENSORS), ("parallel-qwen3", STAGES), ("parallel-qwen3-moe", EXPERTS),
     ("parallel-qwen3", ("--data-parallel-size=2",))],
)  # fmt: skip
def test_tokens_are_those_of_one_process_and_both_hosts_stop(name, options, two, tmp_path):
    expected = reference(name).generate(PROMPTS)
    with running(two, name, options, tmp_path) as (server, follower):
        assert served_greedy(server, PROMPTS, MAX_TOKENS) == expected
        for prompt, tokens in zip(PROMPTS[:3], expected, strict=False):
            assert served_greedy(server, [prompt], MAX_TOKENS) == [tokens]
        processes = [*server.processes(), *follower.processes()]
        server.stop()
        if options != ("--data-parallel-size=2",):  # engines that share nothing may go on
            commands.wait_ended(processes, 60)


def rank_of(processes: list[psutil.Process]) -> psutil.Process:
    named = [(process, " ".join(process.cmdline())) for process in processes]
    return next(process for word in ("Worker", "EngineCore") for process, name in named if word in name)


@pytest.mark.parametrize("options", [TENSORS, EXPERTS], ids=str)
@pytest.mark.parametrize("lost", ["rank of the first host", "rank of the second host", "cable", "idle, second host"])
def test_a_lost_rank_ends_both_hosts(options, lost, two, tmp_path):
    with running(two, "parallel-qwen3-moe", options, tmp_path) as (server, follower):
        served_greedy(server, PROMPTS[:2], 8)
        processes = [*server.processes(), *follower.processes()]
        victim = rank_of(server.processes() if "first" in lost else follower.processes())
        if "idle" not in lost:
            RunningRequest(server, 200)
        moment = time.monotonic()
        if lost == "cable":
            two.cut()
        else:
            victim.kill()
        commands.wait_until(lambda: server.process.poll() is not None, 60, "the server ends")
        commands.wait_ended(processes, 60)
        print(f"{lost}: both ended within {time.monotonic() - moment:.1f} s")
        assert server.process.returncode != 0
        survivor = tmp_path / ("second.log" if "first" in lost else "first.log")
        dead = two.hosts[0 if "first" in lost else 1].address
        assert f"on host {dead})" in survivor.read_text(), "the rank is named with its host"


@pytest.mark.parametrize(
    ("option", "said"),
    [("--tensor-parallel-size=4", "--tensor-parallel-size of rank 0 is 2, of rank"),
     ("--max-num-seqs=4", "--max-num-seqs of rank 0 is 8, of rank 1 4"),
     (f"--speculative-config={NGRAM}", "--speculative-config of rank 0 is None, of rank 1 {'method': 'ngram'")],
)  # fmt: skip
def test_hosts_that_were_not_started_alike_say_so(option, said, two, tmp_path):
    first, second = over_two_hosts(two, TENSORS)
    follower = Follower(serve("parallel-qwen3", *second, option), two.hosts[1], tmp_path / "second.log")
    command = two.hosts[0].runs(serve("parallel-qwen3", *first))
    server = Server(command, commands.free_port(), tmp_path / "first.log", two.hosts[0].environment, address=two.door)
    try:
        commands.wait_until(lambda: server.process.poll() is not None, 120, "the first host gives up")
        commands.wait_until(lambda: follower.process.poll() is not None, 60, "the second too")
    finally:
        server.stop()
        follower.stop()
    for name in ("first", "second"):
        assert said in (tmp_path / f"{name}.log").read_text()
