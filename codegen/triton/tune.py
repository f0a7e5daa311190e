"""The fastest tile of a kernel, timed where it will run, and kept so that no machine times the same kernel twice.

A choice holds for a bucket of sizes: dynamic sizes within one power of two share theirs. What is kept is the tile; a kernel's text, the
device and triton's version name it.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from ...ir import Node, SymbolTable
from ...runtime.cache import Cache
from .emit import AnyPlan, AnyTile, Kernel, emit
from .launch import load
from .matmul_plan import MatmulPlan
from .matmul_tiles import MatmulTile, candidate_tiles
from .roofline import known_sizes
from .targets import Target
from .tiles import Tile, default_tile, other_tiles

_RUNS_A_SAMPLE = 10
_SAMPLES = 7
_COMPILERS = 8  # threads


class Tuner:
    """Chooses tiles on `device`; what it finds is kept in `cache`, where there is one, and by this object."""

    def __init__(self, device: torch.device, target: Target, cache: Cache | None):
        self.device, self.target, self.cache = device, target, cache
        self._found: dict[str, AnyTile | None] = {}

    def kernel(self, plan: AnyPlan, symbols: SymbolTable, lines: Mapping[Node, str]) -> Kernel:
        """The kernel of `plan` with the fastest of its tiles."""
        default = emit(plan, symbols, lines, target=self.target)
        key = self._key(default)
        if (name := json.dumps(key, sort_keys=True)) not in self._found:
            self._found[name] = self._kept(key, plan) or self._fastest(plan, symbols, lines, key)
        return emit(plan, symbols, lines, self._found[name], self.target)

    def _key(self, kernel: Kernel) -> dict[str, str]:
        import triton

        known, plan = known_sizes(kernel.plan), kernel.plan
        sizes = [plan.domain.num_rows, plan.domain.num_columns, *([plan.k, plan.num_batch] if isinstance(plan, MatmulPlan) else [])]
        bucket = " ".join(str(size) if isinstance(size, int) else f"<={1 << max(known(size) - 1, 0).bit_length()}" for size in sizes)
        device = torch.cuda.get_device_name(self.device)
        return {"kernel": kernel.digest, "sizes": bucket, "device": device, "triton": triton.__version__, "torch": torch.__version__}

    def _kept(self, key: Mapping[str, str], plan: AnyPlan) -> AnyTile | None:
        """What was found before, on this kind of device."""
        kept = None if self.cache is None else self.cache.get("tuning", key)
        if kept is None:
            return None
        try:
            return (MatmulTile if isinstance(plan, MatmulPlan) else Tile)(**json.loads(kept))
        except (ValueError, TypeError):  # of another version of ours
            return None

    def _fastest(self, plan: AnyPlan, symbols: SymbolTable, lines: Mapping[Node, str], key: Mapping[str, str]) -> AnyTile | None:
        kernels = [emit(plan, symbols, lines, tile, self.target) for tile in self._candidates(plan)]
        inputs = load(kernels[0]).example_inputs(self.device)
        with ThreadPoolExecutor(_COMPILERS) as pool:  # what compiles is no Python, for the most part
            fitting = [kernel for kernel, fits in zip(kernels, pool.map(lambda k: self._fits(k, inputs), kernels), strict=True) if fits]
        timed = [(self._seconds(kernel, inputs), number, kernel.tile) for number, kernel in enumerate(fitting)]
        if not timed:
            return None
        tile = min(timed)[2]
        if self.cache is not None:
            self.cache.put("tuning", key, json.dumps(asdict(tile)).encode())
        return tile

    def _candidates(self, plan: AnyPlan) -> Iterator[AnyTile]:
        if isinstance(plan, MatmulPlan):
            yield from candidate_tiles(plan if self.target.copies_blocks else plan.by_addresses(), self.target)
        else:
            yield from (default_tile(plan), *other_tiles(plan))

    def _seconds(self, kernel: Kernel, inputs: Sequence[Any]) -> float:
        module = load(kernel)
        return device_seconds(lambda: module.run(*inputs))

    def _fits(self, kernel: Kernel, inputs: Sequence[Any]) -> bool:
        """Compiles a kernel and runs it once; whether the device has room for its tile."""
        from triton.runtime.errors import OutOfResources

        module = load(kernel)
        try:
            with torch.cuda.device(self.device):
                module.run(*inputs)
        except OutOfResources:
            return False
        return True


def device_seconds(function: Callable[[], Any], runs: int = _RUNS_A_SAMPLE) -> float:
    """Seconds that the device needs for one run: the median of samples of several runs, recorded so that no launch is waited for."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(runs):
            function()
    graph.replay()
    samples = []
    for _ in range(_SAMPLES):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) * 1e-3 / runs)
    return statistics.median(samples)
