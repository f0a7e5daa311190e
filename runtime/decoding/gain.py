"""Whether drafts gain, by what was measured while they ran.

    tokens of a burst of g drafts   1 + alpha + .. + alpha^g     alpha: the chance that a draft is taken where those before it were
    its seconds, in full steps      g c + v(g)                   c: those of a draft step; v(g): those of judging g drafts

v(g) is 1 where a step takes as long for g + 1 tokens as for one (then drafts gain from alpha > c on); where it was measured for other g
alone, what is above 1 grows in proportion. Source: specs/layer_skip.md, section 2 (Self-speculation).
"""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

MOST_DRAFTS = 7  # judged together with the token before them by a step that is made ready for 8 tokens
FIRST_DRAFTS = 3  # where nobody has said how many, and nothing is known yet
_SAMPLES, _ENOUGH = 16, 3  # the last so many seconds count, and so many are enough
_DEVIATIONS = 2.0  # of an acceptance that is still thought possible
_JUDGED = 512  # drafts behind which earlier ones count half
_SURE = 16  # drafts before which their number stays what it is
_WORTH = 1.05  # what another number of drafts must gain: steps have to be made ready for it


class Seconds:
    """Of one kind of step, and their `median`, None without any. The first is slow for reasons of its own, and does not count."""

    def __init__(self) -> None:
        self._last: deque[float] | None = None
        self.median: float | None = None  # which is asked for more often than it changes

    def add(self, seconds: float) -> None:
        if self._last is None:
            self._last = deque(maxlen=_SAMPLES)
            return
        self._last.append(seconds)
        self.median = median(self._last)

    @property
    def is_known(self) -> bool:
        """Whether there are enough not to be one that something else held up."""
        return self._last is not None and len(self._last) >= _ENOUGH


class Gain:
    """Of one model on one number of rows: `accepted` of the `judged` drafts, those behind a refused one not being judged; seconds of full
    steps, of draft steps, and of judging g drafts."""

    def __init__(self) -> None:
        self.judged = self.accepted = 0
        self.full, self.draft = Seconds(), Seconds()
        self.verify: dict[int, Seconds] = {}

    def count(self, accepted: int, judged: int) -> None:
        if self.judged > _JUDGED:
            self.judged, self.accepted = self.judged // 2, self.accepted // 2
        self.accepted += accepted
        self.judged += judged

    def judging(self, drafts: int) -> Seconds:
        return self.verify.setdefault(drafts, Seconds())

    @property
    def acceptance(self) -> float:
        """alpha; 1 as long as nothing is known."""
        return self.accepted / self.judged if self.judged else 1.0

    @property
    def possible_acceptance(self) -> float:
        """The highest alpha of which what was seen is no more than two standard deviations away (Wilson's interval)."""
        if not self.judged:
            return 1.0
        n, p, z = self.judged, self.acceptance, _DEVIATIONS
        return (p + z * z / (2 * n) + z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)

    @property
    def draft_cost(self) -> float | None:
        """c; None before it is known."""
        full, draft = self.full.median, self.draft.median
        return draft / full if full and draft else None

    def verify_cost(self, drafts: int) -> float:
        """v(g); 1 before anything is known."""
        full = self.full.median
        found = {g: each.median for g, each in list(self.verify.items())}  # a list, since other threads generate too
        known = {g: seconds for g, seconds in found.items() if seconds is not None}
        if not full or not known:
            return 1.0
        nearest = min(known, key=lambda g: (abs(g - drafts), g))
        cost = known[nearest] / full
        return cost + max(cost - 1.0, 0.0) * (drafts - nearest) / nearest

    def cost(self, drafts: int) -> float:
        """Of a burst, in full steps; drafts whose cost is unknown cost as much as those."""
        return drafts * (self.draft_cost or 1.0) + self.verify_cost(drafts)

    def speedup(self, drafts: int, acceptance: float) -> float:
        """Over plain decoding."""
        return sum(acceptance**i for i in range(drafts + 1)) / self.cost(drafts)

    def best(self, present: int, most: int = MOST_DRAFTS) -> int:
        """How many drafts are fastest, at most so many; the `present` number where that is hardly slower."""
        if self.judged < _SURE or self.draft_cost is None:
            return min(present, most)
        speeds = {g: self.speedup(g, self.acceptance) for g in range(1, most + 1)}
        fastest = max(speeds, key=lambda g: speeds[g], default=0)
        return present if present in speeds and speeds[fastest] <= _WORTH * speeds[present] else fastest

    def pays(self, choices: Iterable[int]) -> bool | None:
        """Whether one of these numbers of drafts gains; None where it does not, and yet may."""
        numbers = list(choices)
        if self.draft_cost is None:
            return None
        if any(self.speedup(g, self.acceptance) > 1 for g in numbers):
            return True
        return None if any(self.speedup(g, self.possible_acceptance) > 1 for g in numbers) else False


class Gains:
    """`gains[rows]`: of steps on so many rows, those up to the next power of two being one."""

    def __init__(self) -> None:
        self._known: dict[int, Gain] = {}

    def __getitem__(self, rows: int) -> Gain:
        return self._known.setdefault((rows - 1).bit_length(), Gain())
