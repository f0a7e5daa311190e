"""The fastest tile of a kernel, timed where it will run, and kept so that no machine times the same kernel twice.

A choice holds for a bucket of sizes: dynamic sizes within one power of two share theirs. What is kept is the tile; a kernel's text, the
device and triton's version name it.
"""

import hashlib
import json
import logging
import statistics
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Protocol

import torch

from ...ir import Node, SymbolTable
from .emit import AnyPlan, AnyTile, Kernel, emit
from .launch import load
from .low_rank.plan import OperandPlan, ProductPlan
from .low_rank.tiles import operand_tiles, product_tiles
from .matmul_plan import MatmulPlan
from .matmul_tiles import candidate_tiles
from .roofline import known_sizes
from .targets import Target
from .tiles import default_tile, other_tiles

_log = logging.getLogger(__name__)
_RUNS_A_SAMPLE = 10
_SAMPLES = 7
_COMPILERS = 8  # threads


class Store(Protocol):
    """Where choices are kept: `runtime.cache.Cache` is one."""

    def get(self, kind: str, key: Mapping[str, str]) -> bytes | None: ...

    def put(self, kind: str, key: Mapping[str, str], value: bytes) -> None: ...


class Tuner:
    """Chooses tiles on `device`; what it finds is kept in `cache`, where there is one, and by this object."""

    def __init__(self, device: torch.device, target: Target, cache: Store | None):
        self.device, self.target, self.cache = device, target, cache
        self._found: dict[str, AnyTile | None] = {}
        self._verdicts: dict[str, bool] = {}

    def kernel(self, plan: AnyPlan, symbols: SymbolTable, lines: Mapping[Node, str]) -> Kernel | None:
        """The kernel of `plan` with the fastest of its tiles; None where no tile works on this device."""
        default = emit(plan, symbols, lines, target=self.target)
        key = self._key(default)
        if (name := json.dumps(key, sort_keys=True)) not in self._found:
            is_known, tile = self._kept(key, type(default.tile))
            self._found[name] = tile if is_known else self._fastest(plan, symbols, lines, key)
        found = self._found[name]
        return None if found is None else emit(plan, symbols, lines, found, self.target)

    def is_beaten(self, kernel: Kernel, other: Callable[..., Any]) -> bool:
        """Whether `other`, a function of the kernel's inputs, computes the same in less time."""
        key = {"question": "library or ours", "tile": str(kernel.tile), **self._key(kernel)}
        if (name := json.dumps(key, sort_keys=True)) not in self._verdicts:
            kept = None if self.cache is None else self.cache.get("tuning", key)
            self._verdicts[name] = kept == b"library" if kept is not None else self._is_slower(kernel, other)
            if kept is None and self.cache is not None:
                self.cache.put("tuning", key, b"library" if self._verdicts[name] else b"ours")
        return self._verdicts[name]

    def _is_slower(self, kernel: Kernel, other: Callable[..., Any]) -> bool:
        inputs = load(kernel).example_inputs(self.device)
        with torch.no_grad():
            return device_seconds(lambda: other(*inputs), self.device) < self._seconds(kernel, inputs)

    def _key(self, kernel: Kernel) -> dict[str, str]:
        import triton

        known, plan = known_sizes(kernel.plan), kernel.plan
        sizes = [plan.domain.num_rows, plan.domain.num_columns, *([plan.k, plan.num_batch] if isinstance(plan, MatmulPlan) else [])]
        bucket = " ".join(str(size) if isinstance(size, int) else f"<={1 << max(known(size) - 1, 0).bit_length()}" for size in sizes)
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "interpreter"
        return {"kernel": _digest(kernel), "sizes": bucket, "device": device, "triton": triton.__version__, "torch": torch.__version__}

    def _kept(self, key: Mapping[str, str], kind: type) -> tuple[bool, AnyTile | None]:
        """(whether that is known, what was found) before, on this kind of device."""
        kept = None if self.cache is None else self.cache.get("tuning", key)
        if kept is None:
            return False, None
        try:
            values = json.loads(kept)
            return True, None if values is None else kind(**values)
        except (ValueError, TypeError):  # of another version of ours
            return False, None

    def _fastest(self, plan: AnyPlan, symbols: SymbolTable, lines: Mapping[Node, str], key: Mapping[str, str]) -> AnyTile | None:
        kernels = [emit(plan, symbols, lines, tile, self.target) for tile in self._candidates(plan)]
        inputs = load(kernels[0]).example_inputs(self.device)
        with torch.no_grad():
            expected = load(kernels[0]).reference(*inputs)
        # What compiles is no Python, for the most part. The interpreter has one grid at a time.
        with ThreadPoolExecutor(_COMPILERS if self.device.type == "cuda" else 1) as pool:
            works = [*pool.map(lambda kernel: _works(kernel, inputs, expected), kernels)]
        fitting = [kernel for kernel, it_works in zip(kernels, works, strict=True) if it_works]
        timed = [(self._seconds(kernel, inputs), number, kernel.tile) for number, kernel in enumerate(fitting)]
        tile = min(timed)[2] if timed else None
        if self.cache is not None:
            self.cache.put("tuning", key, json.dumps(None if tile is None else asdict(tile)).encode())
        return tile

    def _candidates(self, plan: AnyPlan) -> Iterator[AnyTile]:
        if isinstance(plan, MatmulPlan):
            yield from candidate_tiles(plan if self.target.copies_blocks else plan.by_addresses(), self.target)
        elif isinstance(plan, OperandPlan):
            yield from operand_tiles(plan, self.target)
        elif isinstance(plan, ProductPlan):
            yield from product_tiles(plan, self.target)
        else:
            yield from dict.fromkeys((default_tile(plan), *other_tiles(plan)))

    def _seconds(self, kernel: Kernel, inputs: Sequence[Any]) -> float:
        module = load(kernel)
        return device_seconds(lambda: module.run(*inputs), self.device)


def _works(kernel: Kernel, inputs: Sequence[Any], expected: Sequence[torch.Tensor]) -> bool:
    """Compiles a kernel and runs it once: whether it compiles, the device has room for its tile, and it gives what its operations give
    one by one. A compiler's fault that shows with some tiles alone is not to be chosen for its speed, nor to end anything."""
    module = load(kernel)
    try:
        with torch.cuda.device_of(inputs[0]):
            results = module.run(*inputs)
    except Exception as error:  # out of resources, or whatever a compiler says of what it cannot do
        _log.info("tile %s of kernel %s is not used: %s", kernel.tile, kernel.name, error)
        return False
    if all(module.error_of(y, exact) <= module.TOLERANCE for y, exact in zip(results, expected, strict=True)):
        return True
    _log.warning("tile %s of kernel %s gives wrong results on this device and is not used", kernel.tile, kernel.name)
    return False


def _digest(kernel: Kernel) -> str:
    """Of the kernel function and its launch: not of its tile, nor of the sizes that stand for dynamic ones in its check."""
    text = kernel.source
    return hashlib.sha256(text[text.index("@triton.jit") : text.index("def reference(")].encode()).hexdigest()


def device_seconds(function: Callable[[], Any], device: torch.device, runs: int = _RUNS_A_SAMPLE) -> float:
    """Seconds that `device` needs for one run: the median of samples of several runs, on a GPU recorded, so that no launch is waited
    for."""
    function()
    sample = _recorded_sample(function, runs) if device.type == "cuda" else lambda: timeit.timeit(function, number=runs)
    return statistics.median(sample() for _ in range(_SAMPLES)) / runs


def _recorded_sample(function: Callable[[], Any], runs: int) -> Callable[[], float]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(runs):
            function()
    graph.replay()

    def sample() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3

    return sample
