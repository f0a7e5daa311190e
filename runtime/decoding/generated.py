"""What a generation gives: tokens one by one as they are committed, or all of them with what they cost."""

from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple


class Token(NamedTuple):
    """Token number `step` (from 0) of prompt number `row`. `finished` is why it is the row's last, "eos" or "length", else ""."""

    row: int
    step: int
    token: int
    finished: str = ""


@dataclass
class Figures:
    """What a generation costs, counted while it runs. Seconds are those of the wall, without what the reader of a stream takes;
    `ready_seconds`, in which functions were compiled for sizes that they had not run at, are in no other.

    `steps` are runs of a function that gives tokens, drafts and their judge included; `merged_steps` how often a row ran a smaller set of
    layers than its schedule has, since rows of a later level shared the step. Of speculation: bursts, drafted tokens that could be taken,
    and those that were; seconds of single steps, full and drafting, on the same rows.
    """

    ready_seconds: float = 0.0
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    steps: int = 0
    merged_steps: int = 0
    bursts: int = 0
    drafted: int = 0
    accepted: int = 0
    full_step_seconds: list[float] = field(default_factory=list, repr=False)
    draft_step_seconds: list[float] = field(default_factory=list, repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token of each row is the prefill's. 0 where none was decoded."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that were taken; None without any."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def draft_cost(self) -> float | None:
        """c = seconds of a draft step / seconds of a full step; None where too few bursts ran to time them. Drafts gain nothing unless
        their acceptance is larger."""
        return median(self.draft_step_seconds) / median(self.full_step_seconds) if self.full_step_seconds else None


@dataclass(frozen=True)
class Generated:
    """`tokens[b]` follow prompt b, an end token included; `finished[b]` is "eos" or "length". `levels[b][i]` is the level of the schedule
    that decode step i of row b ran, empty for speculation."""

    tokens: list[list[int]]
    finished: list[str]
    levels: list[list[int]] = field(repr=False)
    figures: Figures

    def __str__(self) -> str:
        return "\n".join([self._head(), *self._speed(), *self._schedule(), *self._speculation()])

    def _head(self) -> str:
        ended = self.finished.count("eos")
        return f"{len(self.tokens)} rows, {sum(map(len, self.tokens))} tokens, {ended} rows ended by an end token"

    def _speed(self) -> list[str]:
        f = self.figures
        prefill = f"prefill: {f.prefill_tokens} tokens in {f.prefill_seconds:.3g} s"
        decode = f"decode: {f.decode_tokens} tokens in {f.decode_seconds:.3g} s, {f.tokens_per_second:.4g} tokens/s, {f.steps} steps"
        ready = (
            [f"made ready in {f.ready_seconds:.3g} s, which the next call with such sizes does without"] if f.ready_seconds > 0.1 else []
        )
        return [*ready, prefill, decode] if f.decode_tokens else [*ready, prefill]

    def _schedule(self) -> list[str]:
        merged = self.figures.merged_steps
        return [f"{merged} tokens had fewer layers than their schedule says: rows of later levels shared the step"] if merged else []

    def _speculation(self) -> list[str]:
        f = self.figures
        if f.acceptance is None:
            return []
        line = f"speculation: {f.accepted} of {f.drafted} drafts taken ({f.acceptance:.0%}) in {f.bursts} bursts"
        if f.draft_cost is None:
            return [line]
        pays = "" if f.acceptance > f.draft_cost else ", so that it gains nothing: generate with speculative=False"
        return [f"{line}; a draft step costs {f.draft_cost:.2f} of a full one{pays}"]
