"""ONNX files: time of an export and of an import a node, at 100, 1,000 and 10,000 nodes; a sliced network's peak memory in onnxruntime; and
which networks of the zoo come back through which passes.

`round trips` (`--only`; of them those that `--pairs` matches): how far what comes back is from float64, over how far the program itself is
or its rounding explains: up to 4 is right. A program is exported, imported and run, each function of a decoder by itself, and the worst
counts.

Times are a node's, of one call each, and the ratio is that to the smallest size: 1 where time grows linearly. An export is timed without
the check in onnxruntime, whose time is that of runs. Peaks are those of a process that runs the file once, less what importing onnxruntime
takes.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx_ir
import torch
from harness import Bench

import graphwright as gw
from graphwright.ir.onnx.export import to_onnx
from graphwright.tests.onnx_round_trips import trips, verdicts

SIZES = (100, 1_000, 10_000)

# VmHWM, since getrusage keeps the peak of the process that started this one.
PEAK = """
import re, sys
import numpy, onnxruntime
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
kinds = {"tensor(float)": numpy.float32, "tensor(int64)": numpy.int64}
session.run(None, {each.name: numpy.ones(each.shape, kinds[each.type]) for each in session.get_inputs()})
print((peak() - before) * 1024)
"""


class Chain(torch.nn.Module):
    """`length` operations one after another, of few kinds, on a small tensor."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.weight = length, torch.nn.Parameter(torch.eye(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in range(self.length // 4):
            x = torch.tanh(x @ self.weight + step).reshape(2, 4)
        return x


def grow(bench: Bench, folder: Path) -> None:
    first: dict[str, float] = {}
    for size in SIZES[:2] if bench.quick else SIZES:
        program = gw.compile(Chain(size), example_inputs=(torch.randn(2, 4),), backend="aten", cache=False, cleanups=False).program
        if size == SIZES[0]:
            to_onnx(program, "main", dialect="function", regions_as="loop", opset=21)  # imports the exporter
        begin = time.perf_counter()
        model = to_onnx(program, "main", dialect="function", regions_as="loop", opset=21)
        exported = time.perf_counter() - begin
        onnx_ir.save(model, folder / "chain.onnx")
        begin = time.perf_counter()
        gw.from_onnx(folder / "chain.onnx")
        imported = time.perf_counter() - begin
        calls = len(program.main.calls)
        for what, seconds in (("export", exported), ("import", imported)):
            each = seconds / calls
            bench.row(f"{what} of {size:,} nodes", "time a node", "s", each, {f"{SIZES[0]} nodes": first.setdefault(what, each)})


def peak(bench: Bench, folder: Path) -> None:
    size = "tiny" if bench.quick else "small"
    module, args, kwargs = gw.models.load("video_unet", size)
    peaks = {}
    for name, passes, regions in (("unsliced", "", "loop"), ("loop", SLICED, "loop"), ("unroll", SLICED, "unroll")):
        compiled = gw.compile(module, passes, example_inputs=args, example_kwargs=kwargs, backend="aten", cache=False)
        path = folder / f"{name}.onnx"
        onnx_ir.save(to_onnx(compiled.program, "main", dialect="function", regions_as=regions, opset=21), path)
        done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
        peaks[name] = int(done.stdout)
    for name in ("loop", "unroll"):
        bench.row(f"video_unet/{size}, regions as {name}", "peak_bytes", "B", peaks[name], {"unsliced": peaks["unsliced"]})


def round_trips(bench: Bench, folder: Path) -> None:
    named = [trip for trip in trips() if re.search(bench.options.pairs, str(trip))]
    for trip in named[:: 12 if bench.quick else 1]:
        try:
            found = verdicts(trip.compiled(), folder, **trip.options)
        except gw.GraphwrightError as error:
            bench.note(f"{trip}: {type(error).__name__}: {error}")
            continue
        for name, verdict in found.items():
            if verdict.kind != "right":
                bench.note(f"{trip}, {name}: {verdict}")
        bench.row(f"round trip of {trip}", "error", "1", max(verdict.error_ratio for verdict in found.values()), {})
        bench.save()


SLICED = "slice-groups{memory_budget=25%}"
SECTIONS = {"growth": grow, "peak": peak, "round trips": round_trips}


def main() -> None:
    bench = Bench("onnx_files", peers={f"{SIZES[0]} nodes": "torch", "unsliced": "onnxruntime"}, add_arguments=add_only)
    for section, measure in SECTIONS.items():
        if bench.options.only in (None, section):
            with tempfile.TemporaryDirectory() as name:
                measure(bench, Path(name))
    bench.finish()


def add_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=SECTIONS, help="one section alone")
    parser.add_argument("--pairs", default="", metavar="REGEX", help="round trips of which it matches network, passes and options")


if __name__ == "__main__":
    main()
