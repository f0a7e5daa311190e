"""What kernels aim at, as a part of `bench/gpu.py`: 90 % of the rate of the library's products alone, without what comes before and after
them, for those that multiply matrices ("library"), and of a copy of as many bytes for all others ("copy")."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import Bench, Row
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

AIM = 0.9
BARS = {"copy": "the rate of a copy", "library": "the rate of the library's products alone"}

# What a product is without what is added to it: the operation, and the arguments that it takes of the recorded one.
_ALL = slice(None)
_PLAIN: dict[Any, tuple[Any, slice]] = {
    aten.mm.default: (aten.mm.default, _ALL),
    aten.bmm.default: (aten.bmm.default, _ALL),
    aten.addmm.default: (aten.mm.default, slice(1, 3)),
    aten.baddbmm.default: (aten.bmm.default, slice(1, 3)),
    aten._int_mm.default: (aten._int_mm.default, _ALL),
    **{getattr(aten, name).default: (getattr(aten, name).default, _ALL) for name in ("_scaled_mm", "_grouped_mm") if hasattr(aten, name)},
}


class _Products(TorchDispatchMode):
    """Records the products of matrices that run within it, as calls of the library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op in _PLAIN:
            plain, taken = _PLAIN[op]
            # Scales and types of results belong to a product of low-bit numbers; factors of a sum do not.
            options = kwargs if plain is op else {}
            self.calls.append(lambda args=args[taken]: plain(*args, **options))
        return op(*args, **kwargs)


def products_of(function: Callable[..., Any], args: Sequence[torch.Tensor]) -> list[Callable[[], Any]]:
    """The library's products among what `function` does in eager, each a call on the operands that it had."""
    with _Products() as recorded:
        function(*args)
    return recorded.calls


def share(row: Row) -> tuple[str, float] | None:
    """(the bar of a row, the share of its rate that our kernel reaches); None for a row without one."""
    bar = next((bar for bar in BARS if bar in row.peers), None)
    return None if bar is None or row.metric != "time" else (bar, row.peers[bar] / row.ours)


def summary(bench: Bench) -> None:
    """Notes: the share that each kernel reaches, lowest first, and how many reach the aim."""
    shares = [(row.case, *found) for row in bench.rows if (found := share(row)) is not None]
    for bar, what in BARS.items():
        reached = sorted((value, case) for case, of, value in shares if of == bar)
        for value, case in reached:
            bench.note(f"{case}: {value:.2f} of {what}")
        if reached:
            count = sum(value >= AIM for value, _ in reached)
            bench.note(f"{count} of {len(reached)} kernels reach {AIM:g} of {what}")
