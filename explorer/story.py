"""What is known of a compile when somebody wants to look at it: programs, reports, and what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..ir import Node, Program
from ..passes import Contract

if TYPE_CHECKING:
    from .layer_errors import LayerError


@dataclass(frozen=True)
class KernelRun:
    """One call of a kernel: what it is called, the calls of the program that it computes, in order, and the bytes that it reads and
    writes.

    `kind` is library, region, compiled or triton. `source` is what was emitted for it, or the operations that a compiler was given,
    "" for a kernel of a library; `emitted` is the C++ that the compiler made of these. `seconds` is None where nobody took the time.
    """

    name: str
    kind: str
    nodes: tuple[Node, ...]
    nbytes: int
    source: str = ""
    language: str = ""
    seconds: float | None = None
    emitted: str = ""


@dataclass(frozen=True)
class Profile:
    """What one call showed: the kernels in the order in which they ran, the error of each layer against float64, and why there is none
    where there is none."""

    kernels: tuple[KernelRun, ...] = ()
    errors: "tuple[LayerError, ...]" = ()
    errors_missing: str = ""


@dataclass(frozen=True)
class Story:
    """A compile, looked at afterwards.

    `history` holds the captured program, or the loaded one, and the one after each pass. `reports` has one for each of these passes, and
    before them the paragraphs of an artifact on passes that made it, whose programs are not known. `kernels` are those that were emitted,
    `peak_bytes` and `seconds` what was measured of a call.
    """

    history: Sequence[Program]
    reports: Sequence[Any]
    contract: Contract
    title: str = ""
    backend: str = ""
    kernels: tuple[KernelRun, ...] = ()
    profile: Profile | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
