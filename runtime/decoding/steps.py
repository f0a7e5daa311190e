"""The functions of a decoder as steps on caches, made ready on first use.

A step's operands are by name: `tokens` i64[B, T], `position` i64[B] (the slot of each row's first token), `rows` i64[B] (its place in the
caches), in prefill `lengths` i64[B] (how many of its T tokens are real, the rest is padding on the right), then the caches
`cache_k_0`, `cache_v_0`, ... of the layers that the function runs.
"""

import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ...ir import Program, SymbolTable
from ...ir.errors import InputError
from ...ir.symbols import UNBOUNDED
from ..executor import Executor
from .caches import CacheType

_CACHE = re.compile(r"cache_([kv])_(\d+)")


class Step(Protocol):
    """One static function of a decoder; `layers` are those whose caches it reads and writes."""

    layers: tuple[int, ...]

    def __call__(self, caches: list[Tensor], tokens: Tensor, position: Tensor, rows: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits: [B, V], or [B, T, V] of a function that verifies. New caches are in the places of the old ones afterwards."""


class Decoder(Protocol):
    """What the decoding loops know of a model."""

    vocabulary: int
    max_positions: int | None  # None: any number
    device: torch.device
    cache_types: tuple[CacheType, ...]
    schedules: Mapping[str, Any]

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> Step: ...


class ProgramDecoder:
    """The functions of `program`, each run by the executor that `executor_of` makes of its name.

    Raises:
        InputError: the program cannot decode.
    """

    def __init__(self, program: Program, executor_of: Callable[[str], Executor]):
        if "prefill" not in program.functions:
            raise InputError("this model has no functions that decode: make it with compile_decoder, or compile it with passes='kv-cache'")
        self._program, self._executor_of = program, executor_of
        self._steps: dict[str, ProgramStep] = {}
        self._lock = threading.Lock()
        types = {
            argument.name: _cache_type(argument.name, argument.value)
            for function in program.functions.values()
            for argument in function.signature().inputs
            if _CACHE.fullmatch(argument.name)
        }
        self._places = {name: place for place, name in enumerate(sorted(types, key=lambda name: (types[name].layer, name)))}
        self.cache_types = tuple(types[name] for name in self._places)
        self.device = self.cache_types[0].device
        prefill = program.functions["prefill"].signature()
        self.vocabulary = int(prefill.outputs[0].shape[-1])
        self.max_positions = _highest(program.symbols, prefill.inputs[0].value.shape[1])
        self.schedules = program.schedules

    def __contains__(self, name: str) -> bool:
        return name in self._program.functions

    def __getitem__(self, name: str) -> "ProgramStep":
        with self._lock:
            if name not in self._steps:
                self._steps[name] = ProgramStep(self._program, name, self._executor_of(name), self._places)
            return self._steps[name]


class ProgramStep:
    """Function `name` of `program`; `places` says where in the list of caches each one stands."""

    def __init__(self, program: Program, name: str, executor: Executor, places: Mapping[str, int]):
        signature = program.functions[name].signature()
        names = [argument.name for argument in signature.inputs]
        caches = [each for each in names if each in places]
        if names not in (["tokens", "position", "rows", *caches], ["tokens", "position", "rows", "lengths", *caches]):
            raise InputError(f"function {name} takes {', '.join(names)}: a step takes tokens, position, rows, [lengths,] caches")
        kept = [state for state in signature.new_states if state.removeprefix("input:") not in caches]
        if kept:
            raise InputError(f"function {name} updates {kept[0]}: a step keeps nothing but caches")
        self.layers = tuple(sorted({int(each.rsplit("_", 1)[1]) for each in caches}))
        self._executor = executor
        self._takes_lengths = "lengths" in names
        self._read = [places[each] for each in caches]
        self._written = [places[each.removeprefix("input:")] for each in signature.new_states]

    def __call__(self, caches: list[Tensor], tokens: Tensor, position: Tensor, rows: Tensor, lengths: Tensor | None = None) -> Tensor:
        inputs = [tokens, position, rows, *([lengths] if self._takes_lengths else []), *[caches[place] for place in self._read]]
        (logits,), new_caches = self._executor(inputs)
        for place, cache in zip(self._written, new_caches.values(), strict=True):
            caches[place] = cache
        return logits


def _highest(symbols: SymbolTable, length: Any) -> int | None:
    """The most tokens that the model was captured for: it may hold a table of so many positions."""
    if not isinstance(length, torch.SymInt):
        return int(length)
    name = symbols.text(length)
    return symbols.symbol(name).high if name in symbols and symbols.symbol(name).high < UNBOUNDED else None


def _cache_type(name: str, value: Tensor) -> CacheType:
    _, heads, _, width = value.shape
    return CacheType(int(name.rsplit("_", 1)[1]), int(heads), int(width), value.dtype, value.device)
