"""How long the second start of a process takes, against the first, and against one that has torch's own caches alone.

Each start is a fresh interpreter. The first finds nothing kept, neither by graphwright nor by Inductor; the second finds what the first
kept; the peer "torch's caches" is a second start with cache=False that finds Inductor's folder full. "program" is compile() of a captured
program, "module" is that with its capture by torch.export, which nothing kept can spare: only running the module's Python code tells what
it does. Both include no import; the notes have what import, capture and the first call take of a second start. All is wall time.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Bench, relative_spread

PEERS = {"first start": "torch", "torch's caches": "torch"}
CASES = {"quick": (("decoder", "tiny"),), "full": (("video_unet", "small"), ("dit", "small"), ("decoder", "small"))}
BACKENDS = ("auto", "inductor", "aten")
WARM_STARTS = {"quick": 2, "full": 3}
PASSES = "slice-groups"

START = """
import json, sys, time
began = time.perf_counter()
import torch
import graphwright as gw
from graphwright.ir import capture
gw.compile
name, size, passes, backend, cache, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
imported = time.perf_counter()
module, args, kwargs = gw.models.load(name, size)
made = time.perf_counter()
program = capture(module, args, kwargs)
captured = time.perf_counter()
model = gw.compile(program, passes, backend=backend, cache=cache or False)
compiled = time.perf_counter()
outputs = model(*args, **kwargs)
called = time.perf_counter()
leaves = torch.utils._pytree.tree_leaves(outputs)
print(json.dumps({
    "import": imported - began, "capture": captured - made, "compile": compiled - captured, "call": called - compiled,
    "sums": [leaf.double().sum().item() for leaf in leaves],
}))
"""


def main() -> None:
    bench = Bench("cache", PEERS, add_arguments=_arguments)
    for name, size in CASES["quick" if bench.quick else "full"]:
        if bench.options.network and name not in bench.options.network:
            continue
        for backend in bench.options.backend or (BACKENDS[:1] if bench.quick else BACKENDS):
            with tempfile.TemporaryDirectory(prefix="graphwright-bench-") as folder:
                starts(bench, Path(folder), name, size, backend)
            bench.save()
    bench.finish()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", action="append", metavar="B", help=f"instead of {', '.join(BACKENDS)}; may be repeated")
    parser.add_argument("--network", action="append", metavar="NAME", help="only this one; may be repeated")


def starts(bench: Bench, folder: Path, name: str, size: str, backend: str) -> None:
    """The rows of one network on one backend."""

    def start(cache: str) -> dict:
        return measured_start(bench, folder, name, size, backend, cache)

    first = start("kept")
    second, spared = [], []
    for _ in range(WARM_STARTS["quick" if bench.quick else "full"]):
        second.append(start("kept"))
        spared.append(start(""))
    # Another start may have had time to time more kernels, and sums of other kernels differ in their last bits.
    if not all(math.isclose(a, b, rel_tol=1e-4) for one in second for a, b in zip(one["sums"], first["sums"], strict=True)):
        raise RuntimeError(f"a second start of {name}/{size} on {backend} computes something else than the first")
    case = f"{name}/{size}, {backend}"
    for metric, parts in {"program": ("compile",), "module": ("capture", "compile")}.items():
        ours, torchs = ([sum(one[part] for part in parts) for one in each] for each in (second, spared))
        peers = {"first start": sum(first[part] for part in parts), "torch's caches": statistics.median(torchs)}
        bench.row(case, metric, "s", statistics.median(ours), peers, relative_spread(ours))
    whole = {part: statistics.median(one[part] for one in second) for part in ("import", "capture", "compile", "call")}
    bench.note(f"{case}, second start: {', '.join(f'{part} {seconds:.2f} s' for part, seconds in whole.items())}")


def measured_start(bench: Bench, folder: Path, name: str, size: str, backend: str, cache: str) -> dict:
    """What a fresh interpreter says that it took; `cache` names graphwright's folder, none where it is empty."""
    place = str(folder / cache) if cache else ""
    command = [sys.executable, "-c", START, name, size, PASSES, backend, place, str(bench.threads)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "OMP_NUM_THREADS": str(bench.threads)}
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
