"""Large pages are asked for where they pay, and nothing that a tensor holds is lost."""

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


@available
def test_a_zeroed_cache_stays_zero_and_resident():
    cache = torch.zeros(4, 3 << 20, dtype=torch.uint8)
    views = [cache[0], cache[1:]]
    huge_pages.renew_zeros(views)
    assert "hg" in flags_at(cache.data_ptr() + cache.nbytes // 2)
    assert not cache.any()
    cache.fill_(7)
    huge_pages.request([cache])
    assert bool((cache == 7).all()), "a request alone changes nothing"


def test_a_kernel_that_refuses_changes_nothing(monkeypatch):
    monkeypatch.setattr(huge_pages, "_advise", lambda begin, end, advice: 0)
    cache = torch.zeros(1 << 20, dtype=torch.uint8)
    assert huge_pages.request([cache]) == 0
    huge_pages.renew_zeros([cache])
    assert not cache.any()
