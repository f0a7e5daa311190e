"""Whether equal input gives equal bytes: texts, artifacts, ONNX files and results of networks of the zoo with passes, compiled in processes
whose surroundings differ (specs/trust.md, section 7).

Each process has another hash seed and differs besides in one of: the folder it runs in, HOME, TMPDIR, time zone and language, the clock,
the number of threads, what was compiled before, the order of the networks, the order of arguments by name, and a cache that is
warm. `differing` counts digests that are not those of the first process; it should be 0. Results are compared between processes of as many
threads.

    python bench/determinism.py [--quick] [--json FILE]
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import Bench

NETWORKS = 10

# argv: how many networks, "reversed" or not, "busy" or not, the cache's folder or none.
COMPILES = """
import hashlib, json, os, sys, tempfile
import torch
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
import graphwright as gw
from torch.utils._pytree import tree_leaves

count, order, before, cache = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
decoder = gw.models.load("decoder", "tiny")
CASES = {
    "vit": ("vit", []), "vit sliced": ("vit", [gw.SliceGroups()]), "dit": ("dit", []),
    "video_unet sliced": ("video_unet", [gw.SliceGroups()]),
    "vit in 4 bits": ("vit", [gw.AbsorbOutliers(min_numel=256, rank=4)]),
    "decoder": ("decoder", []), "decoder sliced": ("decoder", [gw.SliceGroups()]),
    "decoder in 8 bits": ("decoder", [gw.AbsorbOutliers(weight="int8-channel", act="int8-token", min_numel=256, rank=4)]),
    "rat": ("rat", []), "moe_dlm": ("moe_dlm", [gw.RegroupExperts()]),
}
names = list(CASES)[:count]
if order == "reversed":
    names.reverse()
if before == "busy":
    gw.compile(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU()), example_inputs=(torch.ones(2, 3),), backend="aten")
said = {}
folder = tempfile.mkdtemp()
for name in names:
    network, passes = CASES[name]
    module, args, kwargs = gw.models.load(network, "tiny", seed=0)
    if order == "reversed":
        kwargs = dict(reversed(kwargs.items()))
    compiled = gw.compile(module, passes, example_inputs=args, example_kwargs=kwargs, backend="aten", cache=cache or False)
    digest = lambda data: hashlib.sha256(data).hexdigest()
    path = os.path.join(folder, "net.gw")
    compiled.save(path)
    said[f"{name}: text"] = digest(str(compiled.program).encode())
    said[f"{name}: artifact"] = digest(open(path, "rb").read())
    results = tree_leaves(compiled(*args, **kwargs))
    said[f"{name}: results"] = digest(b"".join(each.contiguous().view(torch.uint8).numpy().tobytes() for each in results))
    if network == "vit":
        compiled.export_onnx(os.path.join(folder, "net.onnx"))
        said[f"{name}: onnx"] = digest(open(os.path.join(folder, "net.onnx"), "rb").read())
print(json.dumps(said))
"""


@dataclass(frozen=True)
class Surroundings:
    """What is other than in the first process; `reference` is the process whose results must be the same."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    order: str = "given"
    before: str = "idle"
    elsewhere: bool = False
    warm: bool = False
    threads: int = 1


ALL = (
    Surroundings("as before"),
    Surroundings("hash seed 1", {"PYTHONHASHSEED": "1"}),
    Surroundings("another folder", elsewhere=True),
    Surroundings("another time zone and language", {"TZ": "Asia/Kathmandu", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"}),
    Surroundings("other networks first", order="reversed"),
    Surroundings("another model before", before="busy"),
    Surroundings("a cold cache", warm=True),
    Surroundings("a warm cache", warm=True),
    Surroundings("two threads", threads=2),
    Surroundings("two threads, hash seed 5", {"PYTHONHASHSEED": "5"}, threads=2),
)


def main() -> None:
    bench = Bench("determinism", {})
    count = 3 if bench.quick else NETWORKS
    rounds = 1 if bench.quick else 2  # 20 processes
    differing: dict[str, list[str]] = {}
    runs = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = _digests(Surroundings("first"), count, folder, seed="0")
        of_threads = {1: first}
        for round_ in range(rounds):
            for each in ALL[:: 3 if bench.quick else 1]:
                said = _digests(each, count, folder, seed=str(round_ * 100 + runs))
                reference = of_threads.setdefault(each.threads, said)
                wrong = [key for key in first if said[key] != (reference if key.endswith("results") else first)[key]]
                runs += 1
                if wrong:
                    differing[f"{each.name}, process {runs}"] = wrong
                bench.note(f"{each.name}: {len(first) - len(wrong)} of {len(first)} as in the first process")
    case = f"{count} networks x {runs} processes"
    bench.row(case, "digests", "1", runs * len(first), {})
    bench.row(case, "differing", "1", sum(map(len, differing.values())), {})
    for where, what in differing.items():
        bench.note(f"{where}: {', '.join(what)}")
    bench.finish()


def _digests(each: Surroundings, count: int, folder: Path, seed: str) -> dict[str, str]:
    home = folder / f"home-{seed}"
    home.mkdir(exist_ok=True)
    environment: dict[str, Any] = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": str(each.threads), **each.environment}
    if each.elsewhere:
        environment |= {"HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home)}
    cache = folder / "cache"
    cache.mkdir(mode=0o700, exist_ok=True)
    arguments = [str(count), each.order, each.before, str(cache) if each.warm else ""]
    done = subprocess.run(
        [sys.executable, "-c", COMPILES, *arguments], capture_output=True, text=True, env=environment, cwd=home if each.elsewhere else None
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


if __name__ == "__main__":
    main()
