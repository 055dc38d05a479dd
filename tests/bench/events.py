"""When each operator of a step ran: what the library measures while it is asked to (csrc/step_times.h)."""

import ctypes
from typing import NamedTuple

from vllm_mindspore.ops import build


class Event(NamedTuple):
    """One run of an operator; columns: of its result; begin, end: nanoseconds of a clock that all processes share."""

    name: str
    columns: int
    begin: int
    end: int

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) / 1e9


class _StepEvent(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p), ("columns", ctypes.c_int64), ("begin", ctypes.c_int64), ("end", ctypes.c_int64),
    ]  # fmt: skip


def measure(on: bool) -> None:
    """Begin to measure in this process, from nothing; or stop."""
    build.load().vllm_ms_measure_steps(int(on))


def measured() -> list[Event]:
    """What ran since measuring began, in the order in which it ended."""
    read = build.load().vllm_ms_step_events
    read.argtypes, read.restype = [ctypes.POINTER(_StepEvent), ctypes.c_int64], ctypes.c_int64
    found = (_StepEvent * read(None, 0))()
    read(found, len(found))
    return [Event(event.name.decode(), event.columns, event.begin, event.end) for event in found]
