"""What `compiled.report()` says: the pipeline's promise, what each pass did and left alone, memory and time."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..ir import Program
from ..ir.liveness import profile
from ..passes import Contract
from .memory import Measurement


@dataclass(frozen=True)
class Memory:
    """Bytes of activations at the peak, as predicted: as captured, as planned by the passes, what the plan holds in full at its worst
    (`floor`: the peak if slices were infinitely thin), and with what compiled code allocates (`compiled`, known after `measure`)."""

    unsliced: int | None = None
    planned: int | None = None
    floor: int | None = None
    compiled: int | None = None


def predicted(captured: Program | None, program: Program, passes: Sequence[Any] = ()) -> Memory:
    """The liveness analysis of both programs, symbols at their hints; the floor is that of the last memory pass."""
    floors = [report.data["floor"] for report in passes if "floor" in getattr(report, "data", {})]
    unsliced = None if captured is None else profile(captured.main).peak_bytes
    return Memory(unsliced, profile(program.main).peak_bytes, floors[-1] if floors else None)


@dataclass(frozen=True)
class Report:
    """`str(report)` is what users read. `passes` are the pass manager's reports, `kernels` the Triton kernel of each call of one, in
    order."""

    pipeline: str
    contract: Contract
    backend: str
    passes: Sequence[Any] = ()
    memory: Memory = Memory()
    measured: Measurement | None = None
    kernels: Sequence[Any] = ()

    def __str__(self) -> str:
        head = f"pipeline: {self.pipeline or 'no passes'}\ncontract: {self.contract}. {self.contract.promise}\nbackend: {self.backend}"
        passes = [_pass_text(report) for report in self.passes]
        return "\n".join([head, *passes, *self._kernel_lines(), *self._memory_lines(), *self._time_lines()]) + "\n"

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
            "measured": None if self.measured is None else self.measured.peak_bytes,
        }
        known = [f"{name} {format_bytes(value)}" for name, value in figures.items() if value is not None]
        return [f"peak memory: {'; '.join(known)}"] if known else []

    def _time_lines(self) -> list[str]:
        if self.measured is None or self.measured.seconds is None:
            return ["time: not measured; compiled.measure(*inputs) runs the model once"]
        return [f"time: {self.measured.seconds * 1e3:.2f} ms a call"]


def _pass_text(report: Any) -> str:
    return "\n".join(f"  {line}" for line in str(report).splitlines())


def format_bytes(count: int) -> str:
    """`1536` -> "1.50 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError("the last unit takes any value")
