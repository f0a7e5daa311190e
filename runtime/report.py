"""What `compiled.report()` says: the pipeline's promise, what each pass did and left alone, memory and time."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir import Program
from ..ir.errors import printable
from ..ir.liveness import format_bytes, profile
from ..ir.workspace import NOMINAL_THREADS
from ..passes import Contract
from ..passes.experts.statistics import RoutingStatistics
from .atomic import atomic_write
from .memory import Measurement

if TYPE_CHECKING:
    from ..explorer import Story

_TOLERANCE = 1.05  # of a measured peak over its prediction


@dataclass(frozen=True)
class Threads:
    """The predicted peak of a plan with the scratch that kernels take on `count` threads."""

    count: int
    peak_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of activations at the peak, as predicted: as captured, as planned by the passes, what the plan holds in full at its worst
    (`floor`: the peak if slices were infinitely thin), and what is known after `measure`: the plan's peak with the scratch of kernels on
    as many `threads` as it ran with, and the peak with what compiled code allocates (`compiled`)."""

    unsliced: int | None = None
    planned: int | None = None
    floor: int | None = None
    compiled: int | None = None
    threads: Threads | None = None


def predicted(captured: Program | None, program: Program, passes: Sequence[Any] = ()) -> Memory:
    """The liveness analysis of both programs, symbols at their hints; the floor is that of the last memory pass."""
    floors = [data["floor"] for data in map(_data, passes) if "floor" in data]
    unsliced = None if captured is None else profile(captured.main).peak_bytes
    return Memory(unsliced, profile(program.main).peak_bytes, floors[-1] if floors else None)


def predicted_on(threads: int, program: Program) -> Threads | None:
    """The plan's peak on another number of threads than plans are made for."""
    return None if threads == NOMINAL_THREADS else Threads(threads, profile(program.main, threads).peak_bytes)


@dataclass(frozen=True)
class Report:
    """`str(report)` is what users read. `passes` are the pass manager's reports, `kernels` the Triton kernel of each call of one, in
    order, `packs` how many weights are held in a second layout and the bytes of these copies, `routing` which tokens the experts of each
    mixture had in the call that was measured. `story` gives what `html` and `json` show."""

    pipeline: str
    contract: Contract
    backend: str
    passes: Sequence[Any] = ()
    memory: Memory = Memory()
    measured: Measurement | None = None
    training: bool = False
    kernels: Sequence[Any] = ()
    packs: tuple[int, int] = (0, 0)
    routing: Sequence[RoutingStatistics] = ()
    story: "Callable[[], Story] | None" = field(default=None, repr=False, compare=False)

    def data(self) -> dict[str, Any]:
        """The document of the compile, as `explorer/schema.json` describes it: the program after each pass, what changed, memory, kernels.

        Raises:
            InputError: the program after some pass is asked for again, and weights were changed since.
        """
        from ..explorer import document

        assert self.story is not None, "a compiled model gives its report a story"
        return document(self.story())

    def json(self) -> str:
        """`data()` as JSON text."""
        return json.dumps(self.data())

    def html(self, path: str | Path) -> None:
        """Writes `data()` as one page that needs no server and no network, whole or not at all. It holds lines of the source of the modules
        that were captured.

        Raises:
            OSError: the file cannot be written. InputError: as `data` does.
        """
        from ..explorer import page

        with atomic_write(Path(path)) as file:
            file.write(page(self.data()).encode())

    def __str__(self) -> str:
        head = f"pipeline: {self.pipeline or 'no passes'}\ncontract: {self.contract}. {self.contract.promise}\nbackend: {self.backend}"
        if self.training:
            head += "\ncaptured in train mode: dropout draws on each call, and this model keeps running statistics of its own"
        passes = [_pass_text(report) for report in self.passes]
        rest = [*self._kernel_lines(), *self._memory_lines(), *self._time_lines(), *self._routing_lines()]
        return printable("\n".join([head, *passes, *rest]) + "\n")  # it quotes names and reasons, which a file may have brought

    def _kernel_lines(self) -> list[str]:
        """Bytes that the groups move, before and after, and for each kernel how often it runs and its roofline."""
        if not self.kernels:
            return []
        calls = Counter(kernel.digest for kernel in self.kernels)
        before, after = sum(k.bytes_before for k in self.kernels), sum(k.roofline.bytes_moved for k in self.kernels)
        moved = f"{format_bytes(after)} where their operations move {format_bytes(before)}"
        head = f"kernels: {len(self.kernels)} calls of {len(calls)}, which move {moved}"
        distinct = {kernel.digest: kernel for kernel in self.kernels}
        return [head, *(f"  {calls[digest]} x {kernel.name}: {kernel.roofline.line()}" for digest, kernel in distinct.items())]

    def _memory_lines(self) -> list[str]:
        figures = {
            "predicted, unsliced": self.memory.unsliced,
            "predicted, planned": self.memory.planned,
            "floor": self.memory.floor,
            "predicted, compiled": self.memory.compiled,
            self._of_threads(): None if self.memory.threads is None else self.memory.threads.peak_bytes,
            "measured": None if self.measured is None else self.measured.peak_bytes,
        }
        known = [f"{name} {format_bytes(value)}" for name, value in figures.items() if value is not None]
        peaks = [f"peak memory: {'; '.join(known)}", *self._contradictions()] if known else []
        count, nbytes = self.packs
        return [*peaks, f"packed weights: {count}, copies of {format_bytes(nbytes)} beside the weights"] if count else peaks

    def _of_threads(self) -> str:
        """What the prediction for the threads of the measurement is called."""
        return "" if self.memory.threads is None else f"predicted, planned, on {_threads(self.memory.threads.count)}"

    def _contradictions(self) -> list[str]:
        """One line where the measured peak is not what was planned or promised."""
        if self.measured is None:
            return []
        peak, said = self.measured.peak_bytes, []
        planned = self.memory.planned
        if planned and peak > _TOLERANCE * planned:
            said.append(f"measured is {_ratio(peak / planned)} x the plan: {self._reason(peak)}")
        budgets = [data["budget"] for data in map(_data, self.passes) if "budget" in data and data["planned"] <= data["budget"]]
        said += [f"the budget of {format_bytes(budget)} is not met" for budget in budgets[-1:] if peak > budget]
        return ["; ".join(said)] if said else []

    def _reason(self, peak: int) -> str:
        """Why a measured peak is above the plan."""
        compiled, threads = self.memory.compiled, self.memory.threads
        if compiled is not None and peak <= _TOLERANCE * compiled:
            return "compiled code allocates more than its operations"
        if threads is not None and peak <= _TOLERANCE * threads.peak_bytes:
            return f"plans are for {_threads(NOMINAL_THREADS)}, and kernels take more scratch on {_threads(threads.count)}"
        return "a kernel's scratch is not in the model"

    def _time_lines(self) -> list[str]:
        if self.measured is None or self.measured.seconds is None:
            return ["time: not measured; compiled.measure(*inputs) runs the model once"]
        return [f"time: {self.measured.seconds * 1e3:.2f} ms a call"]

    def _routing_lines(self) -> list[str]:
        """Of each mixture, in the call that was measured, and what all of them cost."""
        if not self.routing:
            return []
        head = f"experts, in the call that was measured: {sum(each.flops for each in self.routing):.3g} FLOPs"
        return [head, *(f"  mixture {number}: {each}" for number, each in enumerate(self.routing))]


def _pass_text(report: Any) -> str:
    return "\n".join(f"  {line}" for line in str(report).splitlines())


def _data(report: Any) -> dict[str, Any]:
    """What a pass keeps for programs to read; the reports of a loaded model are text alone."""
    return getattr(report, "data", {})


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 2 else f"{value:.1f}"
