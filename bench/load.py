"""A compiled model under load: threads, processes, kills, and how much memory calls leave behind (specs/trust.md, sections 6 and 8).

    threads     16 threads call one model with mixed sizes: `differences` from the calls in turn, of bits
    compiling   8 threads compile a module each: `differences` of their results from eager, beyond rounding
    calls       10,000 calls: `bytes` and Python `objects` that each leaves after warm-up, mean
    models      200 times compile, call and drop: models still `alive`, `descriptors` still open, `files` left in the temporary folder
    processes   4 processes compile one model on one cache: `errors`, `differences` of bits, `entries` of it that they leave
    writers     8 processes put one key 200 times each: `torn` values that a reader sees, `entries` left
    kills       1,000 processes killed at random moments of `save`: `interrupted` ones, which were writing; `bad` files, which are neither
                old nor new; `debris` after the next save

Counts but `entries` (1 each) and `interrupted` should be 0, bytes below 1024.

    python bench/load.py [--quick] [--only TEXT] [--json FILE]
"""

import argparse
import functools
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Bench
from torch import Tensor, nn

import graphwright as gw
from graphwright import models
from graphwright.runtime.cache import Cache

WATCHDOG = 600.0  # seconds after which a thread hangs


class Mixer(nn.Module):
    """A small network with products, a norm and a softmax, for rows of any number."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.norm, self.after = nn.Linear(32, 96), nn.LayerNorm(96), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(torch.softmax(self.norm(torch.nn.functional.gelu(self.before(x))), -1))


def main() -> None:
    bench = Bench("load", {}, add_arguments=_arguments)
    torch.manual_seed(0)
    for section in (threads, compiling, calls, dropped_models, processes, writers, kills):
        if bench.options.only in section.__name__:
            section(bench)
            bench.save()
    bench.finish()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="only sections with it in their names")


def mixer(**options: Any) -> tuple[nn.Module, gw.CompiledModel]:
    module = Mixer().eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    return module, gw.compile(module, example_inputs=(torch.randn(8, 32),), dynamic_shapes=({0: rows},), **options)


def in_threads(count: int, body: Callable[[int], int]) -> int:
    """The sum of what `body` gives in each thread."""
    found: list[int] = []
    workers = [threading.Thread(target=lambda n=n: found.append(body(n)), daemon=True) for n in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WATCHDOG)
        if worker.is_alive():
            raise SystemExit("a thread hangs")
    if len(found) < count:
        raise SystemExit("a thread ended in an error")
    return sum(found)


def threads(bench: Bench) -> None:
    each = 100 if bench.quick else 1000
    for backend in ("aten", "tuned"):
        model = mixer(backend=backend)[1]
        inputs = [torch.randn(rows, 32) for rows in (2, 3, 8, 17, 31, 64)]
        body = functools.partial(_differing, model, inputs, [model(x) for x in inputs], each)
        bench.row(f"16 threads x {each} calls, {backend}", "differences", "1", in_threads(16, body), {})


def _differing(model: gw.CompiledModel, inputs: Sequence[Tensor], expected: Sequence[Tensor], count: int, seed: int) -> int:
    order = random.Random(seed).choices(range(len(inputs)), k=count)
    return sum(not torch.equal(model(inputs[i]), expected[i]) for i in order)


def compiling(bench: Bench) -> None:
    def differing(n: int) -> int:
        module = Mixer().eval()
        x = torch.randn(4 + n, 32)
        compiled = gw.compile(module, example_inputs=(x,), backend="aten", cache=False)
        return int(not torch.allclose(compiled(x), module(x), rtol=1e-4, atol=1e-5))

    bench.row("8 threads compile", "differences", "1", in_threads(8, differing), {})


def calls(bench: Bench) -> None:
    count = 1000 if bench.quick else 10_000
    for name, backend in (("vit", "aten"), ("vit", "tuned"), ("mixer", "tuned")):
        if name == "vit":
            module, args, _ = models.load("vit", "tiny")
            compiled, given = gw.compile(module, example_inputs=args, backend=backend), [args]
        else:
            compiled, given = mixer(backend=backend)[1], [(torch.randn(rows, 32),) for rows in (2, 7, 33)]
        for n in range(300):
            compiled(*given[n % len(given)])
        gc.collect()
        objects, resident = len(gc.get_objects()), _resident()
        for n in range(count):
            compiled(*given[n % len(given)])
        gc.collect()
        case = f"{count} calls of {name}, {backend}"
        bench.row(case, "bytes", "B", max(_resident() - resident, 0) / count, {})
        bench.row(case, "objects", "1", max(len(gc.get_objects()) - objects, 0) / count, {})


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def dropped_models(bench: Bench) -> None:
    count = 20 if bench.quick else 200
    _compiled_and_dropped("aten"), _compiled_and_dropped("tuned")  # what is made once
    gc.collect()
    descriptors, files = _descriptors(), _temporary()
    references = [each for n in range(count) for each in _compiled_and_dropped(("aten", "tuned")[n % 2])]
    gc.collect()
    case = f"{count} models compiled and dropped"
    bench.row(case, "alive", "1", sum(each() is not None for each in references), {})
    bench.row(case, "descriptors", "1", max(_descriptors() - descriptors, 0), {})
    bench.row(case, "files", "1", len(_temporary() - files), {})


def _compiled_and_dropped(backend: str) -> list["weakref.ref[Any]"]:
    module, compiled = mixer(backend=backend)
    compiled(torch.randn(4, 32))
    return [weakref.ref(module), weakref.ref(compiled)]


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _temporary() -> set[Path]:
    return set(Path(tempfile.gettempdir()).iterdir())


def in_a_process(code: str, *arguments: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def processes(bench: Bench) -> None:
    code = """
    import hashlib, sys, torch, graphwright as gw
    torch.set_num_threads(1)
    module, args, kwargs = gw.models.load("decoder", "tiny")
    compiled = gw.compile(module, example_inputs=args, example_kwargs=kwargs, backend="aten", cache=sys.argv[1])
    leaves = torch.utils._pytree.tree_leaves(compiled(*args, **kwargs))
    print(hashlib.sha256(b"".join(each.numpy().tobytes() for each in leaves)).hexdigest())
    """
    with tempfile.TemporaryDirectory() as folder:
        ended = [(worker.communicate()[0], worker.returncode) for worker in [in_a_process(code, folder) for _ in range(4)]]
        entries = len(Cache(Path(folder)).entries("passes"))
    case = "4 processes on one cache"
    bench.row(case, "errors", "1", sum(code != 0 for _, code in ended), {})
    bench.row(case, "differences", "1", len({said for said, _ in ended}) - 1, {})
    bench.row(case, "entries", "1", entries, {})


def writers(bench: Bench) -> None:
    code = """
    import sys
    from pathlib import Path
    from graphwright.runtime.cache import Cache
    cache = Cache(Path(sys.argv[1]))
    for _ in range(int(sys.argv[3])):
        cache.put("tuning", {"n": "1"}, sys.argv[2].encode() * 50_000)
    """
    each = 40 if bench.quick else 200
    with tempfile.TemporaryDirectory() as folder:
        cache, torn = Cache(Path(folder)), 0
        whole = {None, *(letter.encode() * 50_000 for letter in "abcdefgh")}
        running = [in_a_process(code, folder, letter, each) for letter in "abcdefgh"]
        while any(worker.poll() is None for worker in running):
            torn += cache.get("tuning", {"n": "1"}) not in whole
        case = f"8 writers x {each}"
        bench.row(case, "errors", "1", sum(worker.returncode != 0 for worker in running), {})
        bench.row(case, "torn", "1", torn + (cache.get("tuning", {"n": "1"}) is None), {})
        bench.row(case, "entries", "1", len(cache.entries("tuning")), {})


def kills(bench: Bench) -> None:
    """One process saves two models in turns until it is killed; another then looks at the file."""
    code = """
    import os, sys, torch, graphwright as gw
    models = [gw.load(path, backend="aten", cache=False) for path in sys.argv[2:4]]
    print("ready", flush=True)
    for line in sys.stdin:  # a child for each kill, so that none imports torch again
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            while True:
                for model in models:
                    model.save(sys.argv[1])
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("dead", flush=True)
    """
    count, draw, bad, interrupted = 40 if bench.quick else 1000, random.Random(0), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [folder / "first.gw", folder / "second.gw"]
        for path in sources:  # large enough that most of the time goes into writing
            wide = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 512)).eval()
            gw.compile(wide, example_inputs=(torch.randn(2, 2048),), backend="aten", cache=False).save(path)
        whole, target = [path.read_bytes() for path in sources], folder / "target" / "net.gw"
        target.parent.mkdir()
        target.write_bytes(whole[0])
        command = [sys.executable, "-c", textwrap.dedent(code), str(target), *map(str, sources)]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert server.stdin is not None and server.stdout is not None
        server.stdout.readline()
        for _ in range(count):
            server.stdin.write("go\n"), server.stdin.flush()
            pid = int(server.stdout.readline())
            time.sleep(draw.uniform(0.0, 0.2))
            os.kill(pid, signal.SIGKILL)
            server.stdout.readline()
            bad += target.read_bytes() not in whole
            interrupted += len(list(target.parent.iterdir())) > 1
        server.stdin.close()
        server.wait()
        gw.load(sources[0], backend="aten", cache=False).save(target)
        bench.row(f"{count} kills during save", "bad", "1", bad, {})
        bench.row(f"{count} kills during save", "interrupted", "1", interrupted, {})
        bench.row(f"{count} kills during save", "debris", "1", len(list(target.parent.iterdir())) - 1, {})


if __name__ == "__main__":
    main()
