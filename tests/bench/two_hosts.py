"""An all-reduce between two hosts, which are two network namespaces: `python -m tests.bench.two_hosts [--ranks 2]`.

Each rank has a CPU of its own, or shares one, and one thread; libzmq's thread runs beside it there. Prints the median
time of a call and the bytes of one rank a second.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.ranks import Ranks
from tests.support.namespaces import TwoHosts
from vllm_mindspore.distributed import groups, hosts, joining

GROUP = "bench"
SIZES = [4 << 10, 16 << 10, 128 << 10, 1 << 20, 16 << 20]  # bytes


def measure(rank: int, size: int) -> dict[int, float]:
    """Median seconds of a call, by bytes."""
    hosts.take_share_of_cpus(rank, size)
    os.environ["VLLM_MS_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    joining.join(GROUP, dist.group.WORLD, spin=False)
    found = {}
    for count in SIZES:
        x, seconds = torch.ones(count // 4), []
        for _ in range(max(30, min(1000, (64 << 20) // count))):
            begin = time.perf_counter()
            groups.all_reduce(GROUP, x, x)
            seconds.append(time.perf_counter() - begin)
        found[count] = statistics.median(seconds[5:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    with tempfile.TemporaryDirectory() as folder, TwoHosts() as two:
        places = [two.hosts[rank * 2 // ranks] for rank in range(ranks)]
        answers = Ranks(measure, ranks, Path(folder), ranks, joins=False, hosts=places).answers()
    for count, seconds in answers[0].items():
        print(f"all_reduce {count >> 10:7} KiB {seconds * 1e6:10.1f} us {count / seconds / 1e9:7.2f} GB/s")


if __name__ == "__main__":
    main()
