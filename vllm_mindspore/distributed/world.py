"""The ranks of one model must have been started alike: what differs is said, by all of them, before a model loads."""

from __future__ import annotations

import hashlib
import json
import time
from enum import Enum
from importlib import metadata

import torch
import torch.distributed as dist

from vllm_mindspore.distributed.gather import of_every_rank
from vllm_mindspore.distributed.groups import GroupError

_PREFIX = "vllm_mindspore"
_LOOK_EVERY = 0.1  # seconds
_SIZES, _WRONG, _AGREED = (f"{_PREFIX}/{name}" for name in ("sizes", "wrong", "agreed"))


def _sizes(parallel_config) -> dict[str, object]:
    return {
        "vllm": metadata.version("vllm"),
        "--nnodes": parallel_config.nnodes,
        "--tensor-parallel-size": parallel_config.tensor_parallel_size,
        "--pipeline-parallel-size": parallel_config.pipeline_parallel_size,
        "--data-parallel-size": parallel_config.data_parallel_size,
        "--enable-expert-parallel": parallel_config.enable_expert_parallel,
    }


def _model(vllm_config) -> dict[str, object]:
    model = vllm_config.model_config
    configuration = model.hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        configuration.pop(name, None)
    text = json.dumps(configuration, sort_keys=True, default=_stable)
    return {
        "architecture": model.architecture,
        "digest of the model's configuration": hashlib.sha256(text.encode()).hexdigest()[:16],
        "--dtype": str(model.dtype),
        "--quantization": model.quantization,
        "--seed": model.seed,
        "--max-model-len": model.max_model_len,
        "--max-num-seqs": vllm_config.scheduler_config.max_num_seqs,
        "--max-num-batched-tokens": vllm_config.scheduler_config.max_num_batched_tokens,
        "--speculative-config": _drafts(vllm_config.speculative_config),
    }


def _drafts(speculative) -> dict[str, object] | None:
    names = ("method", "num_speculative_tokens", "draft_sample_method", "prompt_lookup_min", "prompt_lookup_max")
    return None if speculative is None else {name: getattr(speculative, name) for name in names}


def _stable(value: object) -> str:
    """What json cannot write, the same in every process: an object's own text may have its address."""
    return str(value) if isinstance(value, torch.dtype | Enum) else type(value).__name__


def _difference(first: dict[str, object], other: int, found: dict[str, object]) -> str:
    for fact, value in first.items():
        if found.get(fact) != value:
            return (
                f"{fact} of rank 0 is {value!r}, of rank {other} {found.get(fact)!r}. "
                "Start all hosts with the same model, versions and options, but for --node-rank and --headless."
            )
    return ""


def require_same_sizes(parallel_config, rank: int) -> dist.Store | None:
    """Where several hosts were started each by a command of its own: that they agree on the world's sizes.

    Torch would wait for ranks that never come. rank: among those of its data-parallel engine. Returns the store that
    torch's rendezvous of the same address uses too: keep it until then.

    Raises:
        GroupError: what differs, or that two hosts have the same --node-rank.
    """
    if parallel_config.nnodes == 1:
        return None
    rank += parallel_config.data_parallel_rank * parallel_config.world_size
    store = dist.TCPStore(
        parallel_config.master_addr, parallel_config.master_port, is_master=rank == 0, wait_for_workers=False,
        timeout=dist.default_pg_timeout, multi_tenant=True,
    )  # fmt: skip
    mine = _sizes(parallel_config)
    if store.add(f"{_PREFIX}/starts/{rank}", 1) > 1:
        wrong = f"there are two of rank {rank}. Give each host a --node-rank of its own."
    else:
        if rank == 0:
            store.set(_SIZES, json.dumps(mine))
        wrong = _difference(json.loads(store.get(_SIZES)), rank, mine)
    if wrong:
        store.set(_WRONG, wrong)
    else:
        store.set(f"{_PREFIX}/{rank}", "alike")
    others = [f"{_PREFIX}/{other}" for other in range(1, parallel_config.world_size_across_dp)] if rank == 0 else []
    while not store.check([_WRONG]):
        if rank == 0 and store.check(others):
            store.set(_AGREED, "1")
        if store.check([_AGREED]):
            return store
        time.sleep(_LOOK_EVERY)
    wrong = store.get(_WRONG).decode()
    if rank == 0:
        time.sleep(10 * _LOOK_EVERY)  # the others read it from this process
    raise GroupError(f"hosts were not started alike: {wrong}")


def require_same_model(vllm_config, world: dist.ProcessGroup) -> None:
    """That all ranks of `world` run the same model in the same way; each of them must call it.

    Raises:
        GroupError: what differs.
    """
    found = of_every_rank(_model(vllm_config), world)
    for other, facts in enumerate(found):
        if wrong := _difference(found[0], other, facts):
            raise GroupError(f"ranks were not started alike: {wrong}")
