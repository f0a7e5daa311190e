"""demo: the memory of a small video network lowered, and measured against eager."""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..compiler import compile as compile_model
from ..ir.liveness import describe, format_bytes, profile
from ..models import load
from ..passes import SliceGroups
from ..runtime.atomic import atomic_write
from ..runtime.memory import measure_peak
from .result import Result, progress

BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class _Side:
    """One of the two contestants: measured peak, median time, and the predicted curve of live bytes."""

    peak_bytes: int
    seconds: float
    live: list[int] = field(repr=False)
    held: list[str]


def demo(options: argparse.Namespace) -> Result:
    folder = None if options.save is None else Path(options.save)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    size = "tiny" if options.quick else "small"
    module, args, kwargs = load("video_unet", size)
    start = time.perf_counter()
    with progress() as tell:
        passes = [SliceGroups(memory_budget="25%")]
        compiled = compile_model(module, passes, example_inputs=args, example_kwargs=kwargs, backend="aten", progress=tell)
        seconds = time.perf_counter() - start
        before, after, error = _compare(lambda: module(*args, **kwargs), lambda: compiled(*args, **kwargs), compiled, tell)
    report = compiled.report().passes[-1]
    predicted, left = report.lines[0], [f"{each.what}, {each.reason}" for each in report.left]
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} cores ({threads} thread{'' if threads == 1 else 's'})"
    head = f"video_unet, {size}, float32, torch {torch.__version__}, CPU with {cores}, backend aten"
    top = max(before.live)
    peaks = [format_bytes(side.peak_bytes) for side in (before, after)]
    peak_ratio, time_ratio = after.peak_bytes / before.peak_bytes, after.seconds / before.seconds
    lines = [
        head,
        f"slice-groups{{memory_budget=25%}}, contract exact; compiled in {seconds:.1f} s",
        f"predicted: {predicted}",
        "",
        f"  peak memory of a call   {peaks[0]:>10} eager   {peaks[1]:>10} compiled   {peak_ratio:.2f} x",
        f"  time of a call          {before.seconds:>8.2f} s eager   {after.seconds:>8.2f} s compiled   {time_ratio:.2f} x",
        f"  largest difference      {error:.1e} of the largest output",
        "",
        "bytes live at each call, as predicted, of the captured program (it frees tensors that eager's Python still holds) and of",
        f"the compiled one; the top of both is {format_bytes(top)}",
        *_curve("captured", before.live, top),
        *_curve("compiled", after.live, top),
        "",
        f"held at the captured program's peak ({format_bytes(top)} predicted)",
        *(f"  {line}" for line in before.held),
        f"held at the compiled program's peak ({format_bytes(max(after.live))} predicted)",
        *(f"  {line}" for line in after.held),
        *(["why these stay whole", *(f"  {line}" for line in left[:4])] if left else []),
    ]
    if folder is not None:
        for name, content in (("demo.txt", compiled.program), ("report.txt", compiled.report())):
            with atomic_write(folder / name) as file:
                file.write(str(content).encode())
        lines += ["", f"wrote {folder / 'demo.txt'} and {folder / 'report.txt'}"]
    sides = {
        name: {"peak_bytes": s.peak_bytes, "seconds": s.seconds, "live": s.live, "held": s.held}
        for name, s in (("eager", before), ("compiled", after))
    }
    data = {
        "model": f"video_unet:{size}",
        "torch": torch.__version__,
        "threads": threads,
        "compile_seconds": seconds,
        "predicted": predicted,
        "error": error,
        "left": left,
        **sides,
    }
    return Result("\n".join(lines), data)


def _compare(eager: Callable[[], Any], ours: Callable[[], Any], compiled: Any, progress: Any) -> tuple[_Side, _Side, float]:
    """Both sides measured in one process; times are medians of three calls, taken in turns after a call to warm up."""
    contestants = (eager, ours)
    seconds: tuple[list[float], list[float]] = ([], [])
    tell = progress or (lambda done, total, name: None)
    with torch.no_grad():
        tell(0, 5, "comparing outputs")
        expected, got = (fn().double() for fn in contestants)
        tell(1, 5, "measuring memory")
        peaks = [measure_peak(fn).peak_bytes for fn in contestants]
        for turn in range(3):
            tell(2 + turn, 5, "measuring time")
            for fn, taken in zip(contestants, seconds):
                start = time.perf_counter()
                fn()
                taken.append(time.perf_counter() - start)
    error = float((expected - got).abs().max() / expected.abs().max())
    sides = []
    for peak, taken, program in zip(peaks, seconds, (compiled.history[0], compiled.program)):
        memory = profile(program.main)
        held = [describe(storage) for storage in memory.live_at(memory.peak_at)[:3]]
        sides.append(_Side(peak, statistics.median(taken), [int(n) for n in memory.live], held))
    return sides[0], sides[1], error


def _curve(label: str, live: Sequence[int], top: int, *, width: int = 72, height: int = 4) -> list[str]:
    """`live` as `height` lines of block characters, each column the largest of its calls; a full column is `top`."""
    columns = [max(live[len(live) * i // width : max(len(live) * (i + 1) // width, len(live) * i // width + 1)]) for i in range(width)]
    levels = [round(value / top * height * 8) for value in columns]
    rows = ["".join(BARS[min(max(level - 8 * row, 0), 8)] for level in levels) for row in reversed(range(height))]
    return [f"  {label if row == height - 1 else ' ' * len(label)} {text}".rstrip() for row, text in enumerate(rows)]
