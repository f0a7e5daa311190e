"""What every benchmark shares: arguments, header, interleaved timing, the table, the JSON object.

    bench = Bench("video_unet", peers={"eager": "torch", "onnxruntime": "onnxruntime"})
    bench.time("video_unet/small", ours=lambda: compiled(x), peers={"eager": lambda: model(x)})
    bench.row("video_unet/small", "peak_bytes", "B", ours=peak, peers={"eager": eager_peak})
    bench.finish()

Contestants of one case run in one process, in turns (A B C A B C ...), with the same number of threads, and the median
counts. Ratios are ours / peer: below 1 is better for times and bytes.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from graphwright.runtime.atomic import atomic_write

WARM_UP_CALLS = 2
MIN_ROUNDS = {"quick": 3, "full": 9}
MAX_ROUNDS = 51
SECONDS_PER_CASE = {"quick": 2.0, "full": 40.0}
# A sample repeats the call until it lasts this long, so that the clock and the loop are below a thousandth of it.
SECONDS_PER_SAMPLE = 0.005
# A call that takes this many seconds needs no second one to warm up.
LONG_CALL = 5.0


@dataclass(frozen=True)
class Row:
    """One measured quantity of one case. `spread` is the widest interquartile range of a contestant, relative to its median."""

    case: str
    metric: str
    unit: str
    ours: float
    peers: dict[str, float]
    spread: float | None = None

    @property
    def ratio(self) -> dict[str, float]:
        return {name: self.ours / value for name, value in self.peers.items() if value}

    def as_json(self) -> dict[str, object]:
        return {"case": self.case, "metric": self.metric, "unit": self.unit, "ours": self.ours, "peers": self.peers, "ratio": self.ratio}


@dataclass
class Bench:
    """One benchmark program: reads the command line, prints the header, collects rows.

    name: the "bench" of the JSON object.
    peers: peer -> the distribution that must be installed for it; one that is not is named as missing throughout.
    add_arguments: adds the benchmark's own arguments, which are then in `options`.
    """

    name: str
    peers: dict[str, str]
    argv: list[str] | None = None
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # cases that a benchmark went on without

    def __post_init__(self) -> None:
        parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="small cases and few rounds: ends within a minute")
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON object to FILE")
        parser.add_argument(
            "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every contestant (default %(default)s)"
        )
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default %(default)s)")
        if self.add_arguments is not None:
            self.add_arguments(parser)
        self.options = options = parser.parse_args(self.argv)
        self.quick: bool = options.quick
        self.json: Path | None = options.json
        self.threads: int = options.threads
        self.device = torch.device(options.device)
        torch.set_num_threads(self.threads)
        self.versions = versions(self.peers)
        self.missing = [peer for peer, distribution in self.peers.items() if self.versions[distribution] == "missing"]
        self._print_header()

    def time(self, case: str, ours: Callable[[], object], peers: dict[str, Callable[[], object]]) -> Row:
        """Seconds of one call, the median of interleaved rounds. Leave out of `peers` those in `self.missing`."""
        samples = self.interleaved({"ours": ours, **peers})
        medians = {name: statistics.median(values) for name, values in samples.items()}
        spread = max(relative_spread(values) for values in samples.values())
        return self.row(case, "time", "s", medians.pop("ours"), medians, spread)

    def interleaved(self, contestants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds per call of each contestant, for benchmarks that make several rows of one measurement."""
        mode = "quick" if self.quick else "full"
        return interleave(contestants, SECONDS_PER_CASE[mode], self.device, self.threads, MIN_ROUNDS[mode])

    def note(self, text: str) -> None:
        """Record what numbers cannot say: a plan, a peer that does not apply and why."""
        self.notes.append(text)
        print(f"  {text}", file=sys.stderr, flush=True)

    def row(self, case: str, metric: str, unit: str, ours: float, peers: dict[str, float], spread: float | None = None) -> Row:
        """Record one quantity, measured by the caller."""
        unknown = peers.keys() - self.peers.keys()
        assert not unknown, f"peers {sorted(unknown)} of {case} are not declared in Bench(peers=...)"
        row = Row(case, metric, unit, ours, peers, spread)
        self.rows.append(row)
        ratios = "".join(f", {ratio:.3f} x {peer}" for peer, ratio in row.ratio.items())
        print(f"  {case}: {metric} {shown(ours, unit)}{ratios}", file=sys.stderr, flush=True)
        return row

    def finish(self) -> None:
        """Print the table and the notes; write the JSON object where one was asked for, whole or not at all."""
        print("\n".join([self.table(), *self.notes]))
        self.save()

    def save(self) -> None:
        """Write the JSON object with the rows so far, so that a long benchmark that is stopped leaves what it measured."""
        if self.json:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.json) as file:
                file.write((json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n").encode())

    def as_json(self) -> dict[str, object]:
        rows = [row.as_json() for row in self.rows]
        return {"bench": self.name, "device": self._device_line(), "versions": self.versions, "rows": rows, "notes": self.notes}

    def table(self) -> str:
        head = ["case", "metric", "ours", *(cell for peer in self.peers for cell in (peer, "ratio")), "spread"]
        lines = [
            head,
            *([row.case, row.metric, shown(row.ours, row.unit), *self._peer_cells(row), percent(row.spread)] for row in self.rows),
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)

    def _peer_cells(self, row: Row) -> list[str]:
        cells: list[str] = []
        for peer in self.peers:
            if peer in row.peers:
                cells += [shown(row.peers[peer], row.unit), f"{row.ratio[peer]:.3f}" if peer in row.ratio else "-"]
            else:
                cells += ["missing" if peer in self.missing else "-", "-"]
        return cells

    def _device_line(self) -> str:
        return f"{device_name(self.device)}, {self.threads} threads"

    def _print_header(self) -> None:
        print(f"bench     {self.name}{' (quick)' if self.quick else ''}")
        print(f"device    {self._device_line()}")
        print(f"versions  {', '.join(f'{name} {version}' for name, version in self.versions.items())}")
        if self.missing:
            print(f"missing   {', '.join(self.missing)} (make bench-deps installs them)")
        print(flush=True)


def interleave(
    contestants: dict[str, Callable[[], object]], seconds: float, device: torch.device, threads: int, min_rounds: int
) -> dict[str, list[float]]:
    """Seconds per call of each contestant, one sample a round, in turns, for about `seconds` in all and at least `min_rounds` rounds.

    Every second round runs backwards: what ran just before (its frees, its caches) is worth several per cent, and falls to no one alone.
    """
    repeats = {name: warm_up(call, device) for name, call in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for done in range(MAX_ROUNDS):
            if done >= min_rounds and time.perf_counter() > end:
                break
            turns = list(contestants.items())
            for name, call in turns if done % 2 == 0 else reversed(turns):
                if torch.get_num_threads() != threads:
                    raise RuntimeError(f"a contestant changed torch's threads from {threads} to {torch.get_num_threads()} before {name}")
                samples[name].append(sample(call, repeats[name], device))
    finally:
        if collecting:
            gc.enable()
    return samples


def warm_up(call: Callable[[], object], device: torch.device) -> int:
    """How many calls make a sample long enough. The first calls compile, allocate and fill caches."""
    for _ in range(WARM_UP_CALLS):
        start = time.perf_counter()
        call()
        if time.perf_counter() - start > LONG_CALL:
            return 1
    return max(1, math.ceil(SECONDS_PER_SAMPLE / max(sample(call, 1, device), 1e-9)))


def sample(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_spread(values: list[float]) -> float:
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def shown(value: float, unit: str) -> str:
    """A value for people; JSON keeps the unit as it is."""
    scales: dict[str, list[tuple[float, str]]] = {
        "s": [(1.0, "s"), (1e-3, "ms"), (1e-6, "us")],
        "B": [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")],
    }
    for scale, name in scales.get(unit, []):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value:.3g} {unit}"


def percent(spread: float | None) -> str:
    return "-" if spread is None else f"{100 * spread:.1f} %"


def versions(peers: dict[str, str]) -> dict[str, str]:
    """python, torch, graphwright with its commit, and the distribution behind each peer, or "missing"."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "graphwright": f"{installed('graphwright')} ({commit()})"}
    return found | {distribution: installed(distribution) for distribution in peers.values() if distribution not in found}


def installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no commit"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
