"""The worker among processes: its process group, and its end when the process that started it is gone."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait

import torch
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.logger import init_logger

from vllm_mindspore import sockets

logger = init_logger("vllm.vllm_mindspore.process")

VLLM_PROCESSES = ("EngineCore", "VllmWorker")
SECONDS_TO_EXIT = 5


def join_groups(parallel_config, rank: int, local_rank: int, init_method: str) -> None:
    """Make the process groups that vLLM's layers ask for. A group of one keeps its store in memory, not in /tmp."""
    if parallel_config.world_size == 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), world_size=1, rank=0)
    init_distributed_environment(parallel_config.world_size, rank, init_method, local_rank, "gloo")
    ensure_model_parallel_initialized(parallel_config.tensor_parallel_size, parallel_config.pipeline_parallel_size)


def exit_with_parent() -> None:
    """End this process when its parent dies, even by SIGKILL; only a process that vLLM started for itself.

    vLLM's multiprocess executor watches its parent, its engine core does not and would stay for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith(VLLM_PROCESSES):
        return

    def watch() -> None:
        wait([parent.sentinel])
        logger.warning("process %d, which started this one, is gone: exiting", parent.pid)
        sockets.remove_directory_of(parent.pid)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_EXIT)
        os._exit(1)

    threading.Thread(target=watch, name="exit_with_parent", daemon=True).start()
