"""Large pages for large tensors: decode reads all weights and caches every step, and small pages slow that down.

Linux gives large pages on request (`/sys/kernel/mm/transparent_hugepage/enabled` is `madvise` or `always`); where it
does not, nothing changes. Measured in docs/performance.md.
"""

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Iterable

import torch
from torch.overrides import TorchFunctionMode

SMALLEST = 256 << 10  # bytes of a tensor worth a request; neighbours in memory share large pages

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def request(tensors: Iterable[torch.Tensor]) -> int:
    """Ask for large pages under host tensors that have not been written yet; returns the bytes asked for."""
    return sum(_advise(begin, end, mmap.MADV_HUGEPAGE) for begin, end in _ranges(tensors, outward=True))


class ReservedZeros(TorchFunctionMode):
    """While it is entered, `torch.zeros` of a large host tensor takes zeros of the system, in large pages.

    Such memory becomes resident when it is touched, or by `Population`, instead of being written at once.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.zeros or torch.device(kwargs.get("device") or "cpu").type != "cpu":
            return function(*args, **kwargs)
        wanted = torch.empty(*args, **{**kwargs, "device": "meta"})
        if wanted.nbytes < SMALLEST:
            return function(*args, **kwargs)
        memory = mmap.mmap(-1, wanted.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(memory, dtype=wanted.dtype).view(wanted.shape)
        request([tensor])
        return tensor


class Population:
    """Makes tensors' memory resident on a thread of its own, with what they hold left as it is.

    The system takes seconds for some GiB, which idle CPUs spend: the thread runs where no other wants to. Where it
    cannot do this (Linux before 5.14) they stay as they are.
    """

    POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of linux/mman.h
    AT_ONCE = 2 << 20  # bytes; no thread can map memory meanwhile

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self._tensors = list(tensors)  # their memory must not go before the thread does
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vllm-ms-populate", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(PermissionError):  # of a sandbox: then it takes turns with the others
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))  # this thread's alone
        for begin, end in sorted(_ranges(self._tensors, outward=False)):
            for at in range(begin, end, self.AT_ONCE):
                if self._stopped.is_set() or not _advise(at, min(at + self.AT_ONCE, end), self.POPULATE_WRITE):
                    return

    def wait(self) -> None:
        """Until everything is resident, or stop() was called."""
        self._thread.join()

    def stop(self) -> None:
        """End the thread; what is not resident yet becomes so when it is touched."""
        self._stopped.set()
        self._thread.join()


def _ranges(tensors: Iterable[torch.Tensor], outward: bool) -> set[tuple[int, int]]:
    """[begin, end) of the tensors' memory in whole small pages, those cut by its ends included or not."""
    ranges = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.device.type != "cpu" or storage.nbytes() < SMALLEST:
            continue
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if outward:
            begin, end = begin // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        else:
            begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        ranges.add((begin, end))
    return ranges


def _advise(begin: int, end: int, advice: int) -> int:
    """Bytes advised: all or, where the kernel refuses, none."""
    return end - begin if _libc.madvise(begin, end - begin, advice) == 0 else 0
