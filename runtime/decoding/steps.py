"""The functions of a decoder as steps on caches, made ready on first use.

A step's operands are by name: `tokens` i64[B, T], `position` i64[B] (the slot of each row's first token), `rows` i64[B] (its place in the
caches), in prefill `lengths` i64[B] (how many of its T tokens are real, the rest is padding on the right), in what resumes from them
`hidden` [B, T, D], then the caches `cache_k_0`, `cache_v_0`, ... and states of the layers that the function runs (`ir/caches.py`).
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ...ir import Function, Program
from ...ir.caches import CacheType, cache_types
from ...ir.errors import InputError
from ...ir.forks import new_lock
from ...ir.lookups import lookup_limit
from ...ir.symbols import UNBOUNDED
from ...passes.experts.capacity import leaks_future
from ..executor import Executor
from .gain import Gains

# Of a row or a few, products are bound by reading weights, and a step made for just so many takes half the time of one for any number.
FIXED_ROWS = (1, 2, 4, 8)
FIXED_TOKENS = 8

ExecutorOf = Callable[[str, Mapping[str, int]], Executor]


class Step(Protocol):
    """One static function of a decoder; `layers` are those whose caches it reads and writes."""

    layers: tuple[int, ...]

    def padded(self, batch: int) -> int:
        """How many rows a call on `batch` rows is to have: as many, or more where it is made ready for fixed numbers of them."""

    def make_ready(self, batch: int, length: int) -> float:
        """Does what a first call of these sizes would have to wait for; the seconds that it took."""

    def __call__(
        self, caches: list[Tensor], tokens: Tensor, position: Tensor, rows: Tensor, lengths: Tensor | None, hidden: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Logits: [B, V], or [B, T, V] of a function that verifies; behind them, or in their place, hidden states. New caches are in the
        places of the old ones afterwards."""


class Decoder(Protocol):
    """What the decoding loops know of a model."""

    vocabulary: int
    max_positions: int | None  # None: any number
    device: torch.device
    cache_types: tuple[CacheType, ...]
    schedules: Mapping[str, Any]
    gains: Gains  # what speculation brought so far

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> Step: ...


class ProgramDecoder:
    """The functions of `program`, each run by the executors that `executor_of` makes of its name and of values of its symbols. With
    `fixed` steps of a few rows and tokens are made ready for each of these sizes by itself, which compilers do far more with.

    Raises:
        InputError: the program cannot decode.
    """

    def __init__(self, program: Program, executor_of: ExecutorOf, *, fixed: bool):
        if leaks_future(program):
            raise InputError(
                "experts of this model choose among all positions, so what a token gets depends on later ones, which are not there when "
                "tokens come one by one: compile it without expert-choice"
            )
        if "prefill" not in program.functions:
            raise InputError("this model has no functions that decode: make it with compile_decoder, or compile it with passes='kv-cache'")
        self._program, self._executor_of, self._fixed = program, executor_of, fixed
        self._steps: dict[str, ProgramStep] = {}
        self._lock = new_lock()
        types = {name: each for function in program.functions.values() for name, each in cache_types(function).items()}
        self._places = {name: place for place, name in enumerate(sorted(types, key=lambda name: (types[name].layer, name)))}
        self.cache_types = tuple(types[name] for name in self._places)
        self.device = self.cache_types[0].device
        prefill = program.functions["prefill"].signature()
        self.vocabulary = int(prefill.outputs[0].shape[-1])
        # The most tokens that the model was captured for, and those for which it has entries in tables that it looks positions up in.
        longest = program.symbols.highest(prefill.inputs[0].value.shape[1])
        tabled = positions_of(program.functions["prefill"])
        self.max_positions = min((n for n in (longest, tabled) if n is not None and n < UNBOUNDED), default=None)
        self.schedules = program.schedules
        self.gains = Gains()

    def __contains__(self, name: str) -> bool:
        return name in self._program.functions

    def __getitem__(self, name: str) -> "ProgramStep":
        with self._lock:
            if name not in self._steps:
                self._steps[name] = ProgramStep(self._program, name, self._executor_of, self._places, fixed=self._fixed)
            return self._steps[name]


class ProgramStep:
    """Function `name` of `program`; `places` says where in the list of caches each one stands."""

    def __init__(self, program: Program, name: str, executor_of: ExecutorOf, places: Mapping[str, int], *, fixed: bool):
        signature = program.functions[name].signature()
        names = [argument.name for argument in signature.inputs]
        caches = [each for each in names if each in places]
        others = names[3 : len(names) - len(caches)]
        if names != ["tokens", "position", "rows", *others, *caches] or others not in ([], ["lengths"], ["hidden"]):
            raise InputError(f"function {name} takes {', '.join(names)}: a step takes tokens, position, rows, [lengths or hidden,] caches")
        kept = [state for state in signature.new_states if state.removeprefix("input:") not in caches]
        if kept:
            raise InputError(f"function {name} updates {kept[0]}: a step keeps nothing but caches")
        self.layers = tuple(sorted({int(each.rsplit("_", 1)[1]) for each in caches}))
        self._make = partial(executor_of, name)
        self._executors: dict[tuple[int, int] | None, Executor] = {}
        self._others = others
        # Prompts have any length: what is made ready for each would be run once.
        self._is_fixed = fixed and "lengths" not in others
        self._symbols = [program.symbols.text(size) if isinstance(size, torch.SymInt) else "" for size in signature.inputs[0].value.shape]
        self._read = [places[each] for each in caches]
        self._written = [places[each.removeprefix("input:")] for each in signature.new_states]
        self._lock = new_lock()

    def padded(self, batch: int) -> int:
        return next((rows for rows in FIXED_ROWS if rows >= batch), batch) if self._is_fixed else batch

    def make_ready(self, batch: int, length: int) -> float:
        begin = time.perf_counter()
        self._executor(batch, length)
        return time.perf_counter() - begin

    def __call__(
        self, caches: list[Tensor], tokens: Tensor, position: Tensor, rows: Tensor, lengths: Tensor | None, hidden: Tensor | None
    ) -> tuple[Tensor, ...]:
        others = [{"lengths": lengths, "hidden": hidden}[name] for name in self._others]
        inputs = [tokens, position, rows, *others, *[caches[place] for place in self._read]]
        outputs, new_caches = self._executor(*tokens.shape)(inputs)
        for place, cache in zip(self._written, new_caches.values(), strict=True):
            caches[place] = cache
        return tuple(outputs)

    def _executor(self, batch: int, length: int) -> Executor:
        """That of these sizes, or that of any."""
        sizes = (batch, length) if self._is_fixed and batch in FIXED_ROWS and length <= FIXED_TOKENS else None
        if sizes not in self._executors:
            with self._lock:
                if sizes not in self._executors:
                    self._executors[sizes] = self._make(
                        {name: size for name, size in zip(self._symbols, sizes or (), strict=False) if name}
                    )
        return self._executors[sizes]


def positions_of(function: Function) -> int | None:
    """How many positions a function of one step can look up; None where it has no table of them."""
    position = next(node for node in function.placeholders if str(node.target) == "position")
    return lookup_limit(function, position)
