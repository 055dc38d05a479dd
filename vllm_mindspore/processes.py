"""vLLM's processes end with the one that started them, and leave no sockets behind. No heavy import."""

import atexit
import functools
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path

SOCKETS_VARIABLE = "VLLM_RPC_BASE_PATH"
LONGEST_SOCKET_PATH = 107  # bytes; vLLM appends a slash and 36 characters to the directory
LONGEST_DIRECTORY_NAME = len("vllm-ms-4194304-abcdefgh")
SECONDS_TO_EXIT = 5


def use_private_socket_directory() -> None:
    """Point `VLLM_RPC_BASE_PATH` to a new directory of mode 0700, unless it is set or the path would be too long.

    By default vLLM puts its sockets into the temporary directory, where every user sees them, and leaves them there.
    """
    parent = tempfile.gettempdir()
    if SOCKETS_VARIABLE in os.environ or len(parent) + LONGEST_DIRECTORY_NAME + 38 > LONGEST_SOCKET_PATH:
        return
    os.environ[SOCKETS_VARIABLE] = tempfile.mkdtemp(prefix=_directory_prefix(os.getpid()))
    atexit.register(_remove_own_directory, os.getpid())


def _directory_prefix(process: int) -> str:
    return f"vllm-ms-{process}-"


def _remove_own_directory(process: int) -> None:
    if os.getpid() == process:  # not in a forked child
        _remove_directory_of(process)


def _remove_directory_of(process: int) -> None:
    directory = Path(os.environ.get(SOCKETS_VARIABLE, ""))
    if directory.name.startswith(_directory_prefix(process)):
        shutil.rmtree(directory, ignore_errors=True)


@functools.cache
def exit_with_parent() -> None:
    """End this process when its parent dies, even by SIGKILL, if it is an engine core.

    vLLM's workers watch their engine core, but an engine core does not watch its API server and would stay for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith("EngineCore"):
        return

    def watch() -> None:
        wait([parent.sentinel])
        _remove_directory_of(parent.pid)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_EXIT)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="exit_with_parent", daemon=True).start()
