"""Large pages are asked for where they pay, and nothing that a tensor holds is lost."""

import ctypes
import mmap
from pathlib import Path

import pytest
import torch

from vllm_mindspore.worker import huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
available = pytest.mark.skipif(
    not SETTING.is_file() or "[never]" in SETTING.read_text(), reason="this kernel gives no large pages"
)


def flags_at(address: int) -> set[str]:
    """The kernel's flags of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(text, 16) for text in words[0].split("-"))
            inside = begin <= address < end
        elif inside and words[0] == "VmFlags:":
            return set(words[1:])
    raise AssertionError(f"{address:#x} is not mapped")


@available
def test_large_tensors_are_advised_and_small_ones_are_not():
    large, small = torch.empty(9 << 20, dtype=torch.uint8), torch.empty(1000, dtype=torch.uint8)
    assert large.nbytes <= huge_pages.request([large, small]) <= large.nbytes + 2 * mmap.PAGESIZE
    assert "hg" in flags_at(large.data_ptr() + large.nbytes // 2)
    assert huge_pages.request([small]) == 0


def resident_bytes(tensor: torch.Tensor) -> int:
    """How much of a tensor's memory is resident, in whole pages within it."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (tensor.data_ptr() + tensor.nbytes - begin) // mmap.PAGESIZE
    present = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(pages * mmap.PAGESIZE), present) == 0
    return sum(page & 1 for page in present) * mmap.PAGESIZE


@available
def test_reserved_zeros_are_zeros_in_large_pages():
    with huge_pages.ReservedZeros():
        cache = torch.zeros(4, 3 << 20, dtype=torch.bfloat16, device=torch.device("cpu"))
        sized = torch.zeros((2, 1 << 20))
    assert (cache.shape, cache.dtype) == ((4, 3 << 20), torch.bfloat16)
    assert (sized.shape, sized.dtype) == ((2, 1 << 20), torch.float32)
    assert resident_bytes(cache) == resident_bytes(sized) == 0, "nothing touched them yet"
    assert "hg" in flags_at(cache.data_ptr() + cache.nbytes // 2)
    assert not cache.any() and not sized.any()
    cache.fill_(7)
    assert bool((cache == 7).all())


def test_small_zeros_and_those_of_other_devices_are_torchs_own():
    with huge_pages.ReservedZeros():
        small, elsewhere = torch.zeros(3, 5), torch.zeros(1 << 20, device="meta")
    assert small.is_contiguous() and not small.any()
    assert elsewhere.device.type == "meta"


def test_population_makes_memory_resident_and_keeps_what_it_holds():
    with huge_pages.ReservedZeros():
        cache = torch.zeros(40, 1 << 20, dtype=torch.uint8)
    cache[7] = 3
    before = resident_bytes(cache)
    population = huge_pages.Population([cache[:20], cache[20:]])
    population.wait()
    assert before < resident_bytes(cache)
    assert resident_bytes(cache) >= cache.nbytes - mmap.PAGESIZE
    assert bool((cache[7] == 3).all()) and not cache[:7].any() and not cache[8:].any()


def test_population_ends_when_it_is_told_to():
    with huge_pages.ReservedZeros():
        cache = torch.zeros(1 << 30, dtype=torch.uint8)
    population = huge_pages.Population([cache])
    population.stop()
    assert resident_bytes(cache) < cache.nbytes
    assert not population._thread.is_alive()


def test_a_kernel_that_refuses_changes_nothing(monkeypatch):
    monkeypatch.setattr(huge_pages, "_advise", lambda begin, end, advice: 0)
    with huge_pages.ReservedZeros():
        cache = torch.zeros(1 << 20, dtype=torch.uint8)
    assert huge_pages.request([cache]) == 0
    huge_pages.Population([cache]).wait()
    assert not cache.any()
