"""Data-parallel engines that are actors of Ray: `--data-parallel-backend ray`."""

import sys
import threading

import ray
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2


class EngineExecutor(RayExecutorV2):
    """vLLM's executor, which also ends the engine's actor when the engine fails.

    vLLM's API server looks for engines whose actors have ended, and takes them for failed. An error of an engine's loop
    ends only the loop: the server would go on, and its requests would wait for ever.
    """

    def __init__(self, *args, **kwargs) -> None:
        self._engine = threading.current_thread()
        super().__init__(*args, **kwargs)

    def shutdown(self) -> None:
        super().shutdown()
        failing = sys.exc_info()[1] is not None  # vLLM shuts down while the error passes
        if failing and threading.current_thread() is self._engine:
            ray.actor.exit_actor()
