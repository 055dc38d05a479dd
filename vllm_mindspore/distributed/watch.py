"""A process that waits for work would not notice that a rank on another host is gone: this ends it.

The ranks of one host are watched by vLLM's executor there.
"""

import functools
import multiprocessing
import os
import signal
import threading
import time

from vllm.logger import init_logger

from vllm_mindspore.distributed import groups

logger = init_logger("vllm.vllm_mindspore.distributed")

_LOOK_EVERY = 0.5  # seconds
_SECONDS_TO_REPORT = 2.0  # for a step that fails for the same reason
_SECONDS_TO_EXIT = 5.0


@functools.cache
def end_with_other_hosts() -> None:
    """End this process, if another one has started it, when a rank of its groups on another host is gone or leaves."""
    if multiprocessing.parent_process() is not None:
        threading.Thread(target=_watch, name="end_with_other_hosts", daemon=True).start()


def _watch() -> None:
    while not (lost := groups.lost_rank()):
        time.sleep(_LOOK_EVERY)
    if lost.endswith("has left it"):
        logger.info("%s: this process ends too", lost)
    else:
        logger.error("%s: this process ends too", lost)
    time.sleep(_SECONDS_TO_REPORT)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_EXIT)
    os.kill(os.getpid(), signal.SIGKILL)
