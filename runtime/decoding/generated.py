"""What a generation gives: tokens one by one as they are committed, or all of them with what they cost."""

from dataclasses import dataclass, field
from typing import NamedTuple

from .gain import Gain


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
    and those that were; `gamma`, the most that a burst drafted; `draft_cost` and `verify_cost`, what a draft step and judging so many
    drafts take of a full step, and `speedup`, what that is over plain decoding at the acceptance that the model has shown, None where it
    is not known yet; whether it was `switched_off` for gaining nothing.
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
    gamma: int = 0
    draft_cost: float | None = None
    verify_cost: float | None = None
    speedup: float | None = None
    switched_off: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token of each row is the prefill's. 0 where none was decoded."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that were taken; None without any."""
        return self.accepted / self.drafted if self.drafted else None

    def count_burst(self, steps: int, drafted: int, accepted: int) -> None:
        """A burst of so many steps, with drafts that could be taken and that were."""
        self.steps += steps
        self.bursts += 1
        self.drafted += drafted
        self.accepted += accepted

    def tell(self, gain: Gain, gamma: int, *, switched_off: bool = False) -> None:
        """What is known by now of bursts of `gamma` drafts, and whether there will be more."""
        self.gamma, self.switched_off = gamma, switched_off
        self.draft_cost = gain.draft_cost
        self.verify_cost = None if self.draft_cost is None else gain.verify_cost(gamma)
        known = self.draft_cost is not None and gain.judged > 0
        self.speedup = gain.speedup(gamma, gain.acceptance) if known else None


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
        f, parts = self.figures, []
        if f.acceptance is not None:
            parts.append(f"{f.accepted} of {f.drafted} drafts taken ({f.acceptance:.0%}) in {f.bursts} bursts of up to {f.gamma}")
        if f.draft_cost is not None:
            parts.append(f"a draft step costs {f.draft_cost:.2f} of a full one, judging {f.gamma} drafts {f.verify_cost:.2f}")
        if f.speedup is not None:
            parts.append(f"bursts are {f.speedup:.2f} x as fast as plain decoding")
        if f.switched_off:
            parts.append("switched off for that; speculative=True drafts nevertheless")
        elif f.speedup is not None and f.speedup < 1:
            parts.append("speculative=False is faster")
        return [f"speculation: {'; '.join(parts)}"] if parts else []
