"""A private directory for the sockets of vLLM's processes, removed with them.

vLLM puts them into the temporary directory, where any user sees them, and leaves them there when it ends.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

VARIABLE = "VLLM_RPC_BASE_PATH"
LONGEST_PATH = 107  # bytes of a Unix socket's path; vLLM appends a slash and 36 characters
LONGEST_NAME = len("vllm-ms-4194304-abcdefgh")


def use_private_directory() -> None:
    """Point `VLLM_RPC_BASE_PATH` to a new directory of mode 0700, unless it is set or the path would be too long."""
    parent = tempfile.gettempdir()
    if VARIABLE in os.environ or len(f"{parent}//") + LONGEST_NAME + 36 > LONGEST_PATH:
        return
    process = os.getpid()
    os.environ[VARIABLE] = tempfile.mkdtemp(prefix=f"vllm-ms-{process}-")
    atexit.register(_remove_own_directory, process)


def _remove_own_directory(process: int) -> None:
    if os.getpid() == process:  # not in a forked child
        remove_directory_of(process)


def remove_directory_of(process: int) -> None:
    """Remove the directory that `process` made; called as it ends, or by its children when it was killed."""
    directory = Path(os.environ.get(VARIABLE, ""))
    if directory.name.startswith(f"vllm-ms-{process}-"):
        shutil.rmtree(directory, ignore_errors=True)
