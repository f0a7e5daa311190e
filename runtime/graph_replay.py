"""A flat graph recorded once for each set of sizes and replayed as a whole: a CUDA graph, which spares the host a launch a kernel.

Inputs are copied to where the recording reads them, and outputs from where it wrote them, so callers see ordinary calls; states and
weights are read where they lie, and a recording is for these addresses. What cannot be recorded runs as it is: work that waits for
values, and results that share memory with an input, a weight or each other.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[list[Any]], list[Any]]
Record = Callable[[Callable[[], list[Any]]], tuple[list[Any], Callable[[], None]]]
"""Records one run of a function: its results, and what computes them anew, in the same memory."""

MAX_RECORDINGS = 16  # sets of sizes; each holds memory of its own inputs, all share that of their intermediates


@dataclass(frozen=True)
class _Recording:
    """One recorded run: where it reads its inputs, None for those that are no tensors, and where it leaves its results."""

    inputs: tuple[torch.Tensor | None, ...]
    results: tuple[Any, ...]
    replay: Callable[[], None]


class Replayed:
    """`run` (a `FlatGraph`), recorded by `record` on the second call with the same sizes: the first compiles its kernels.

    `is_state` says of each input whether it is read where it lies; `weights` are what `run` reads beside its inputs.
    """

    def __init__(self, run: Call, record: Record, is_state: Sequence[bool], weights: Sequence[torch.Tensor] = ()):
        self._run, self._record = run, record
        self._is_state, self._weights = tuple(is_state), tuple(weights)
        self._recordings: OrderedDict[Any, _Recording | None] = OrderedDict()
        self._seen: set[Any] = set()
        self._places: tuple[int, ...] = ()  # of the weights, when recordings were made
        self._lock = threading.Lock()

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
                if key not in self._seen:
                    self._seen.add(key)
                    return self._run(inputs)
                self._recordings[key] = self._recorded(inputs)
                if len(self._recordings) > MAX_RECORDINGS:
                    self._recordings.popitem(last=False)
            recording = self._recordings[key]
            self._recordings.move_to_end(key)
            if recording is None:
                return self._run(inputs)
            return self._replayed(recording, inputs)

    @property
    def num_recordings(self) -> int:
        """Sets of sizes that are replayed."""
        return sum(recording is not None for recording in self._recordings.values())

    def _replayed(self, recording: _Recording, inputs: list[Any]) -> list[Any]:
        for held, value, is_state in zip(recording.inputs, inputs, self._is_state, strict=True):
            if held is not None and not is_state:
                held.copy_(value)
        inputs.clear()
        recording.replay()
        return [_copy(result) for result in recording.results]

    def _recorded(self, inputs: list[Any]) -> _Recording | None:
        held = [value if is_state else _copy(value) for value, is_state in zip(inputs, self._is_state, strict=True)]
        self._run(list(held))  # kernels are compiled for alignments too, and not while it is recorded
        try:
            results, replay = self._record(lambda: self._run(list(held)))
        except RuntimeError as error:  # some work cannot be recorded: what waits for the device, or allocates by itself
            warnings.warn(f"runs kernel by kernel, not as one recording: {str(error).splitlines()[0]}", stacklevel=2)
            return None
        tensors = [value for value in results if _is_tensor(value)]
        places = [_storage(tensor) for tensor in tensors]
        taken = {_storage(value) for value in (*self._weights, *held) if _is_tensor(value)}
        if len(set(places)) < len(places) or taken & set(places):
            return None
        return _Recording(tuple(value if _is_tensor(value) else None for value in held), tuple(results), replay)


class CudaGraphs:
    """Records CUDA graphs, which share the memory of their intermediates: they run one after another."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            results = function()
        return results, graph.replay


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _type(value: Any, is_state: bool) -> Any:
    if not _is_tensor(value):
        return value
    return (value.dtype, value.device, value.shape, value.stride(), value.data_ptr() if is_state else None)


def _copy(value: Any) -> Any:
    if not _is_tensor(value):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
