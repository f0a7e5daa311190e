"""The peak of live memory while a function runs, seen where tensors are allocated.

On CPU the profiler reports every block that torch's allocator hands out or takes back, from kernels and from compiled code
alike (checked with torch 2.13). Blocks are known by address, so the release of a tensor that was there before counts for
nothing. Eager modules, `torch.compile` and compiled programs are measured alike.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.errors import InputError


@dataclass(frozen=True)
class Measurement:
    """`peak_bytes`: most bytes live at once, of those allocated while the function ran; `kept_bytes`: still live at its end,
    outputs included; `seconds`: how long a run without the meter took, None if there was none."""

    peak_bytes: int
    kept_bytes: int
    seconds: float | None = None


def measure_peak(fn: Callable[[], Any], *, device: str = "cpu", timed: bool = False) -> Measurement:
    """Runs `fn()` once under the meter, and once more by the clock if `timed`. Inputs and weights made before are not counted.

    Raises:
        InputError: on CPU, while a profiler is running: torch has one a process, and a second would end the first.
    """
    peak, kept = _cuda_peak(fn) if device == "cuda" else _cpu_peak(fn)
    return Measurement(peak, kept, seconds(fn, device) if timed else None)


def profiler_is_running() -> bool:
    """Whether this thread or another has torch's profiler."""
    return torch.autograd.profiler._is_profiler_enabled or torch._C._autograd._profiler_enabled()


def _cuda_peak(fn: Callable[[], Any]) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = fn()
    torch.cuda.synchronize()
    peak, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    del result
    return peak, kept


def _cpu_peak(fn: Callable[[], Any]) -> tuple[int, int]:
    if profiler_is_running():
        raise InputError("memory is measured with torch's profiler, which is running already: measure outside of it")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which reads it when it is first used, logs to stderr
    with torch.autograd.profiler.profile(profile_memory=True) as trace:
        result = fn()
    live: dict[int, int] = {}
    now = peak = 0
    for _, address, nbytes in sorted(_allocations(trace)):
        if nbytes > 0:
            live[address] = nbytes
            now += nbytes
            peak = max(peak, now)
        else:
            now -= live.pop(address, 0)
    del result
    return peak, now


def _allocations(trace: Any) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of each block handed out, with negative bytes where it is taken back."""
    stack = list(trace.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack += event.children
        if event.name == "[memory]":
            block = event.typed[1]
            if block.device.type == "cpu":
                yield event.start_time_ns, block.ptr, block.alloc_size


def seconds(fn: Callable[[], Any], device: str) -> float:
    """The time of one call."""
    start = time.perf_counter()
    result = fn()
    if device == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    del result
    return elapsed
