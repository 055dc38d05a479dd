"""Large pages for large tensors: decode reads all weights and caches every step, and small pages slow that down.

Linux gives large pages on request (`/sys/kernel/mm/transparent_hugepage/enabled` is `madvise` or `always`); where it
does not, nothing changes. Measured in docs/performance.md.
"""

import ctypes
import mmap
from collections.abc import Iterable

import torch

SMALLEST = 256 << 10  # bytes of a tensor worth a request; neighbours in memory share large pages

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def request(tensors: Iterable[torch.Tensor]) -> int:
    """Ask for large pages under host tensors that have not been written yet; returns the bytes asked for."""
    return sum(_advise(begin, end, mmap.MADV_HUGEPAGE) for begin, end in _ranges(tensors, outward=True))


def renew_zeros(tensors: Iterable[torch.Tensor]) -> None:
    """Give tensors that hold only zeros large pages in place of the small ones they were zeroed in; still resident."""
    tensors = [tensor for tensor in tensors if tensor.untyped_storage().nbytes() >= SMALLEST]
    advised = 0
    for begin, end in _ranges(tensors, outward=False):
        if _advise(begin, end, mmap.MADV_HUGEPAGE):
            advised += _advise(begin, end, mmap.MADV_DONTNEED)
    if advised:
        for tensor in tensors:
            tensor.zero_()


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
