"""Runs a function in several processes that form a group of vllm_mindspore.distributed."""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from tests.support import namespaces
from tests.support.namespaces import Host
from vllm_mindspore.distributed import joining

GROUP = "test"
SECONDS = 120  # that a test may take


class Ranks:
    """`size` processes; each runs function(rank, *arguments) after it has joined the group, and answers once.

    hosts: where each of them runs; this host by default.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        size: int,
        folder,
        *arguments: Any,
        joins: bool = True,
        hosts: Sequence[Host | None] | None = None,
    ):
        context = multiprocessing.get_context("spawn")
        self.processes, self.pipes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            host = hosts[rank] if hosts else None
            options = (there, function, rank, size, str(folder / "store"), joins, host, arguments)
            self.processes.append(context.Process(target=_run, args=options, daemon=True))
            self.pipes.append(here)
            self.processes[-1].start()
            there.close()

    def answers(self) -> list[Any]:
        """What the functions returned; an exception where one was raised, None of a process that died."""
        answers = []
        for pipe in self.pipes:
            try:
                answers.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(SECONDS) else TimeoutError())
            except EOFError:
                answers.append(None)
        for process in self.processes:
            process.join(SECONDS)
        return answers


def _run(pipe: Connection, function, rank: int, size: int, store: str, joins: bool, host, arguments: tuple) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if host is not None:
        namespaces.enter(host)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(60))
    try:
        if joins:
            joining.join(GROUP, dist.group.WORLD, spin=False)
        answer = function(rank, *arguments)
    except Exception as error:  # noqa: BLE001  the test decides what it means
        traceback.print_exc()
        answer = error
    pipe.send_bytes(pickle.dumps(answer))  # tensors by value: the process may end before they are read


def results(function: Callable[..., Any], size: int, folder, *arguments: Any, hosts=None) -> list[Any]:
    """What each rank's function returned. Raises what any of them raised."""
    answers = Ranks(function, size, folder, *arguments, hosts=hosts).answers()
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers
