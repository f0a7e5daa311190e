"""Which of several ways to compute the same is the fastest here: timed, in turns, within a limit of seconds for the questions of a kind.

A verdict holds for the machine, torch and its number of threads; it is remembered for the life of the process, and in the cache for
others. A question that comes when the time is up takes the first way, unless what the model asked before of the same kind mostly had
another answer.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import torch

from ..ir.forks import new_lock
from .cache import Cache
from .cache_key import digest, environment

SECONDS = 2.0  # for all questions of one kind that one model asks
_ROUNDS = 5
_LONG_CALL = 0.002  # seconds; three rounds tell such calls apart
# A way is taken in the place of the first where it needs at most this share of its time: clocks and caches are worth a few per cent.
MARGIN = 0.96
# More bytes than the caches of most machines hold. Weights of larger models come from memory in each call, and so they do in a probe.
CACHE_BYTES = 2**25

_verdicts: dict[tuple[str, int], str] = {}
_turn = new_lock()  # two probes at once would time each other


class Probe:
    """The questions of one model, whose weights have `weight_bytes`; `cache` has the verdicts of other processes."""

    def __init__(self, weight_bytes: int, seconds: float = SECONDS, cache: Cache | None = None):
        self._cache = cache
        self._environment = environment() if cache is not None else {}
        # What fills the caches between two samples, where weights do so between two calls.
        self._filler = torch.zeros(CACHE_BYTES, dtype=torch.uint8) if weight_bytes > CACHE_BYTES else None
        self._seconds = seconds
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._answers: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def fastest(self, kind: str, question: str, ways: Mapping[str, Callable[[], object]]) -> str:
        """The name of the fastest of `ways`; the first is what counts without a measurement. `question` tells all that the times depend
        on beside the machine. A way that fails is out."""
        first = next(iter(ways))
        key, answers = self._key(kind, question), self._answers[kind]
        with _turn:
            if self.known(kind, question) is None:
                if self._spent[kind] >= self._seconds:
                    return next((name for name, _ in answers.most_common() if name in ways), first)
                start = time.perf_counter()
                _verdicts[key] = self._measured(ways)
                self._spent[kind] += time.perf_counter() - start
                self._keep(key[0], _verdicts[key])
        answers[_verdicts[key]] += 1
        return _verdicts[key]

    def known(self, kind: str, question: str) -> str | None:
        """The verdict on a question that was asked before, for ways that are dear to prepare."""
        key = self._key(kind, question)
        if key not in _verdicts and self._cache is not None:
            kept = self._cache.get("probe", self._entry(key[0]))
            if kept is not None:
                _verdicts[key] = kept.decode()
        return _verdicts.get(key)

    def _keep(self, question: str, verdict: str) -> None:
        if self._cache is not None:
            self._cache.put("probe", self._entry(question), verdict.encode())

    def _entry(self, question: str) -> dict[str, str]:
        return {"question": digest(question), **self._environment}

    def _key(self, kind: str, question: str) -> tuple[str, int]:
        return f"{kind} {question} {'warm' if self._filler is None else 'cold'}", torch.get_num_threads()

    def _measured(self, ways: Mapping[str, Callable[[], object]]) -> str:
        first = next(iter(ways))
        best: dict[str, float] = {}
        for name, call in ways.items():
            try:
                call()
                best[name] = self._sample(call)
            except (RuntimeError, NotImplementedError, IndexError):  # the last: numbers that stand for indices point beyond an operand
                continue
        rounds = 2 if best and min(best.values()) > _LONG_CALL else _ROUNDS
        for _ in range(rounds):
            for name in best:
                best[name] = min(best[name], self._sample(ways[name]))
        if not best:
            return first
        fastest = min(best, key=best.__getitem__)
        return first if first in best and best[fastest] > MARGIN * best[first] else fastest

    def _sample(self, call: Callable[[], object]) -> float:
        if self._filler is not None:
            self._filler.add_(1)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
