"""Hosts that were started by commands of their own say how these differ; ranks know their place on their host."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from tests.support.commands import free_port
from vllm_mindspore.distributed import hosts, world
from vllm_mindspore.distributed.groups import GroupError


def started(port: int, **options) -> SimpleNamespace:
    settings = dict(
        nnodes=2, tensor_parallel_size=2, pipeline_parallel_size=1, data_parallel_size=1, enable_expert_parallel=False,
        data_parallel_rank=0, world_size=2, world_size_across_dp=2, master_addr="127.0.0.1", master_port=port,
    )  # fmt: skip
    return SimpleNamespace(**{**settings, **options})


def said(ranks: list[tuple[int, SimpleNamespace]]) -> list[str]:
    """What each rank is told, nothing where all is well."""

    stores = []  # as a process keeps it until all have found each other

    def tell(rank: int, config: SimpleNamespace) -> str:
        try:
            stores.append(world.require_same_sizes(config, rank))
        except GroupError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(tell, *zip(*ranks, strict=True)))


def test_hosts_that_are_alike_go_on():
    port = free_port()
    assert said([(0, started(port)), (1, started(port))]) == ["", ""]


@pytest.mark.parametrize(
    ("rank", "options", "message"),
    [
        (2, dict(tensor_parallel_size=4, world_size=4), "--tensor-parallel-size of rank 0 is 2, of rank 2 4"),
        (1, dict(enable_expert_parallel=True), "--enable-expert-parallel of rank 0 is False, of rank 1 True"),
        (1, dict(nnodes=3), "--nnodes of rank 0 is 2, of rank 1 3"),
        (0, {}, "there are two of rank 0. Give each host a --node-rank of its own."),
    ],
)
def test_all_hosts_say_what_differs(rank, options, message):
    port = free_port()
    for text in said([(0, started(port)), (rank, started(port, **options))]):
        assert message in text


def place(monkeypatch, own: int, host_of: list[str], **options) -> hosts.Place:
    def gather(found, mine, group):
        found[:] = host_of

    monkeypatch.setattr(hosts.dist, "all_gather_object", gather)
    monkeypatch.setattr(hosts.dist, "get_world_size", lambda group: len(host_of))
    monkeypatch.setattr(hosts.dist, "get_rank", lambda group: own)
    engines = options.pop("engines", 1)
    config = SimpleNamespace(**{"data_parallel_size": 1, "data_parallel_rank_local": None, **options})
    return hosts.find_place(SimpleNamespace(parallel_config=config, additional_config={hosts.ENGINES: engines}), None)


def test_a_rank_knows_its_place_on_its_host(monkeypatch):
    assert place(monkeypatch, 0, ["a"]) == hosts.Place(0, 1)
    assert place(monkeypatch, 3, ["a", "a", "b", "b"]) == hosts.Place(1, 2)
    assert place(monkeypatch, 2, ["a", "b", "a"]) == hosts.Place(1, 2)
    # engines that exchange tokens see each other, those of a dense model do not
    assert place(monkeypatch, 1, ["a", "a"], data_parallel_size=2, engines=2) == hosts.Place(1, 2)
    assert place(monkeypatch, 1, ["a", "a"], data_parallel_rank_local=2, engines=3) == hosts.Place(5, 6)
