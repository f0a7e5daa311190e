"""A flat graph recorded once for each set of sizes and replayed as a whole: a CUDA graph, which spares the host a launch a kernel.

Inputs are copied to where the recording reads them, and outputs from where it wrote them, so callers see ordinary calls; states, caches
that are given up and weights are read, and written, where they lie, and a recording is for these addresses. What cannot be recorded runs
as it is: work that waits for values, and results that share memory with an input, a weight or each other, unless they are a state itself.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..ir.forks import new_lock

Call = Callable[[list[Any]], list[Any]]
MAX_RECORDINGS = 16  # sets of sizes; each holds memory of its own inputs, all share that of their intermediates
_MAX_SEEN = 1024


class Recorder(Protocol):
    """Records runs of a function."""

    def record(self, function: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
        """One run: its results, and what computes them anew, in the same memory."""

    def turn(self) -> AbstractContextManager[None]:
        """Around each use of what was recorded, from inputs to results: one use ends before the next begins."""


@dataclass(frozen=True)
class _Recording:
    """One recorded run: where it reads its inputs, None for those that are no tensors or lie where they lay, and where it leaves its
    results; those in `passed` are the inputs of these numbers."""

    inputs: tuple[torch.Tensor | None, ...]
    results: tuple[Any, ...]
    passed: dict[int, int]
    replay: Callable[[], None]


class Replayed:
    """`run` (a `FlatGraph`), recorded on the second call with the same sizes: the first compiles its kernels.

    `is_state` says of each input whether it is read, or written, where it lies; `weights` are what `run` reads beside its inputs.
    """

    def __init__(self, run: Call, recorder: Recorder, is_state: Sequence[bool], weights: Sequence[torch.Tensor] = ()):
        self._run, self._recorder = run, recorder
        self._is_state, self._weights = tuple(is_state), tuple(weights)
        self._recordings: dict[Any, _Recording | None] = {}
        self._seen: set[Any] = set()
        self._places: tuple[int, ...] = ()  # of the weights, when recordings were made
        self._lock = new_lock()

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """As `run` is called: empties `inputs`."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # the caller records, and a recording holds no other
            return self._run(inputs)
        key = tuple(map(_type, inputs, self._is_state))
        with self._lock:
            places = tuple(map(torch.Tensor.data_ptr, self._weights))
            if places != self._places:  # storages were replaced, and recordings read where they were
                self._places = places
                self._recordings.clear()
            if key not in self._recordings:
                # The first sizes are recorded: sizes that take turns would be recorded in each.
                if key not in self._seen or len(self._recordings) >= MAX_RECORDINGS or any(map(_overlaps, inputs)):
                    if len(self._seen) < _MAX_SEEN:
                        self._seen.add(key)
                    return self._run(inputs)
                self._recordings[key] = self._recorded(inputs)
            recording = self._recordings[key]
            if recording is None:
                return self._run(inputs)
            with self._recorder.turn():
                return self._replayed(recording, inputs)

    @property
    def num_recordings(self) -> int:
        """Sets of sizes that are replayed."""
        return sum(recording is not None for recording in self._recordings.values())

    def _replayed(self, recording: _Recording, inputs: list[Any]) -> list[Any]:
        for held, value in zip(recording.inputs, inputs, strict=True):
            if held is not None:
                held.copy_(value)
        passed = {n: inputs[index] for n, index in recording.passed.items()}
        inputs.clear()
        recording.replay()
        return [passed[n] if n in passed else _copy(result) for n, result in enumerate(recording.results)]

    def _recorded(self, inputs: list[Any]) -> _Recording | None:
        held = [value if is_state else _copy(value) for value, is_state in zip(inputs, self._is_state, strict=True)]
        self._run(list(held))  # kernels are compiled for alignments too, and not while it is recorded
        try:
            results, replay = self._recorder.record(lambda: self._run(list(held)))
        except RuntimeError as error:  # some work cannot be recorded: what waits for the device, or allocates by itself
            warnings.warn(f"runs kernel by kernel, not as one recording: {str(error).splitlines()[0]}", stacklevel=2)
            return None
        states = {id(value): index for index, value in enumerate(held) if self._is_state[index]}
        passed = {n: states[id(value)] for n, value in enumerate(results) if id(value) in states}
        results = [None if n in passed else value for n, value in enumerate(results)]
        tensors = [value for value in results if _is_tensor(value)]
        places = [_storage(tensor) for tensor in tensors]
        taken = {_storage(value) for value in (*self._weights, *held) if _is_tensor(value)}
        if len(set(places)) < len(places) or taken & set(places) or any(map(_overlaps, tensors)):
            return None
        copied = (value if _is_tensor(value) and not is_state else None for value, is_state in zip(held, self._is_state, strict=True))
        return _Recording(tuple(copied), tuple(results), passed, replay)


class CudaGraphs:
    """Records CUDA graphs of one device, which share the memory of their intermediates: they run one after another, whatever streams
    and threads call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    def record(self, function: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            torch.cuda.synchronize()
            # What other threads allocate meanwhile is their own affair.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                results = function()
        return results, graph.replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            if self._done is not None:
                torch.cuda.current_stream().wait_event(self._done)
            yield
            self._done = torch.cuda.current_stream().record_event()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _type(value: Any, is_state: bool) -> Any:
    if not _is_tensor(value):
        return value
    return (value.dtype, value.device, value.shape, value.stride(), value.data_ptr() if is_state else None)


def _overlaps(value: Any) -> bool:
    """Whether one element stands for many, as in an expanded tensor: there is no copy of that form to write to."""
    return _is_tensor(value) and any(n > 1 and step == 0 for n, step in zip(value.shape, value.stride(), strict=True))


def _copy(value: Any) -> Any:
    if not _is_tensor(value):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
