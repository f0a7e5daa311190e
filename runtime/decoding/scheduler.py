"""Who runs when. Prompts wait for a row of the caches; a row reads its prompt in chunks, then decodes until it has finished, and leaves its
place to the next prompt at once.

Each turn reads at most one chunk of each prompt and then decodes one step, so that long prompts do not hold up the rows that decode
(Agrawal et al. 2023, "SARATHI: efficient LLM inference by piggybacking decodes with chunked prefills").
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from .dispatch import Dispatch
from .generated import Figures, Token
from .options import Limits
from .rows import Row
from .sampler import Sampler
from .steps import Step


class Decoding(Protocol):
    """How rows that have read their prompts go on."""

    def advance(self, rows: Sequence[Row]) -> list[tuple[Row, list[int]]]:
        """One or more next tokens of each row; those behind a row's last are dropped."""


class Scheduler:
    """Generates for `rows` with `prefill` and `decoding`, as many at once as `limits` has places."""

    def __init__(
        self, rows: Sequence[Row], prefill: Step, decoding: Decoding, dispatch: Dispatch, sampler: Sampler, limits: Limits, figures: Figures
    ):
        self._prefill, self._decoding, self._dispatch = prefill, decoding, dispatch
        self._sampler, self._limits, self._figures = sampler, limits, figures
        self._waiting = deque(rows)
        self._free = deque(range(limits.batch))
        self._reading: list[Row] = []
        self._running: list[Row] = []

    def tokens(self) -> Iterator[Token]:
        """Every token, as it is committed."""
        while self._waiting or self._reading or self._running:
            self._admit()
            yield from self._read()
            yield from self._decode()
            self._figures.ready_seconds = self._dispatch.ready_seconds

    def _admit(self) -> None:
        while self._waiting and self._free:
            row = self._waiting.popleft()
            row.slot = self._free.popleft()
            self._dispatch.caches.clear(row.slot)
            self._reading.append(row)

    def _read(self) -> Iterator[Token]:
        """A chunk of each prompt that has tokens left; the rows whose prompts end have their first token."""
        rows = self._reading
        if not rows:
            return
        begin = self._dispatch.clock()
        # Rows are padded to the longest chunk, and padding needs slots and positions too.
        room = self._limits.capacity - max(row.position for row in rows)
        longest = min(self._limits.chunk or room, room)
        chunks = [row.prompt[row.position : row.position + longest] for row in rows]
        logits = self._dispatch.prefill(self._prefill, [row.slot for row in rows], [row.position for row in rows], chunks)
        for row, chunk in zip(rows, chunks, strict=True):
            row.position += len(chunk)
        done = [b for b, row in enumerate(rows) if not row.unread]
        ended = [rows[b] for b in done]
        first: list[int] = []
        if ended:
            first = self._sampler.choose(logits[done], [row.id for row in ended], [0] * len(ended))
        self._figures.prefill_seconds += self._dispatch.clock() - begin
        self._figures.prefill_tokens += sum(map(len, chunks))
        self._reading = [row for row in rows if row.unread]
        self._running += ended
        yield from self._commit([(row, [token]) for row, token in zip(ended, first, strict=True)])

    def _decode(self) -> Iterator[Token]:
        if not self._running:
            return
        begin = self._dispatch.clock()
        bursts = self._decoding.advance(self._running)
        self._figures.decode_seconds += self._dispatch.clock() - begin
        committed = self._commit(bursts)
        self._figures.decode_tokens += len(committed)
        yield from committed

    def _commit(self, bursts: Sequence[tuple[Row, list[int]]]) -> list[Token]:
        committed: list[Token] = []
        for row, tokens in bursts:
            for token in tokens:
                committed.append(row.commit(token, self._limits.eos))
                if row.finished:
                    self._free.append(row.slot)
                    break
        if any(row.finished for row, _ in bursts):
            self._running = [row for row in self._running if not row.finished]
        return committed
