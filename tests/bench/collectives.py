"""Collectives between processes of this host, beside a plain copy: `python -m tests.bench.collectives [--ranks 2]`.

Each rank has a CPU of its own and one thread. Prints the median time of a call, the bytes of one rank a second, and
what share that is of the bandwidth of copying as many bytes, which all ranks measure at once.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.ranks import Ranks
from vllm_mindspore.distributed import groups, hosts

GROUP = "bench"
SIZES = [4 << 10, 16 << 10, 128 << 10, 1 << 20, 16 << 20, 64 << 20]  # bytes
ROW = 1024  # values


def exchange(x: torch.Tensor, size: int, out: torch.Tensor) -> None:
    """Half of the rows (or 1 / size of them) stay, the others go to each of the other ranks."""
    rows = len(x) // ROW
    token_ranks = torch.repeat_interleave(torch.arange(size, dtype=torch.int32), rows)
    groups.dispatch(GROUP, x.view(-1, ROW), routing(size, rows), token_ranks, 1, out.view(-1, ROW))


@functools.cache
def routing(size: int, rows: int) -> torch.Tensor:
    """[size * rows, 2]: an expert a token, on the ranks in turn."""
    return torch.stack([torch.arange(size * rows) % size, torch.ones(size * rows)], 1).float()


# Into a result that exists: the first touch of new memory takes longer than any of them.
KINDS: dict[str, Callable[[torch.Tensor, int, torch.Tensor], object]] = {
    "copy": lambda x, size, out: out[: len(x)].copy_(x),
    "all_reduce": lambda x, size, out: groups.all_reduce(GROUP, x, out[: len(x)]),
    "all_gather": lambda x, size, out: groups.all_gather(GROUP, x, 0, size, out),
    "reduce_scatter": lambda x, size, out: groups.reduce_scatter(GROUP, x, 0, size, out[: len(x) // size]),
    "all_to_all": lambda x, size, out: exchange(x, size, out),
}


def measure(rank: int, size: int) -> dict[tuple[str, int], float]:
    """Median seconds of a call, by kind and bytes."""
    hosts.take_share_of_cpus(rank, size)
    os.environ["VLLM_MS_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    groups.join(GROUP, dist.group.WORLD, spin=hosts.has_own_cpus())
    found = {}
    for kind, call in KINDS.items():
        for count in SIZES:
            x, out = torch.ones(count // 4), torch.zeros(size * count // 4)
            seconds = []
            for _ in range(max(30, min(2000, (64 << 20) // count))):
                groups.all_reduce(GROUP, torch.ones(1))  # all begin together
                begin = time.perf_counter()
                call(x, size, out)
                seconds.append(time.perf_counter() - begin)
            found[kind, count] = statistics.median(seconds[5:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    with tempfile.TemporaryDirectory() as folder:
        answers = Ranks(measure, ranks, Path(folder), ranks, joins=False).answers()
    for (kind, count), seconds in answers[0].items():
        share = answers[0]["copy", count] / seconds
        print(f"{kind:15} {count >> 10:7} KiB {seconds * 1e6:10.1f} us {count / seconds / 1e9:7.2f} GB/s {share:6.2f}")


if __name__ == "__main__":
    main()
