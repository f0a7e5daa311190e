"""What a pass may do to the numbers. A pipeline promises what its weakest pass promises."""

import enum
from collections.abc import Iterable
from functools import total_ordering


@total_ordering
class Contract(enum.Enum):
    """Ordered by strength: `Contract.POLICY < Contract.EXACT`, and `min` of several is what they promise together."""

    EXACT = "exact"
    BOUNDED = "bounded"
    SUBSTITUTION = "substitution"
    POLICY = "policy"

    @property
    def promise(self) -> str:
        """The promise in one sentence."""
        return _PROMISES[self]

    @staticmethod
    def weakest(contracts: "Iterable[Contract]") -> "Contract":
        """What passes of these contracts promise together; no pass at all is exact."""
        return min(contracts, default=Contract.EXACT)

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Contract):
            return NotImplemented
        return _STRENGTH[self] < _STRENGTH[other]

    def __str__(self) -> str:
        return self.value


_STRENGTH = {contract: -rank for rank, contract in enumerate(Contract)}
_PROMISES = {
    Contract.EXACT: "The same function in real arithmetic; sums may be reassociated, which moves the last bits.",
    Contract.BOUNDED: "An approximation; its pass measures the error, and keeps it within a budget at each site and, if given, of outputs.",
    Contract.SUBSTITUTION: "Another function, equal to the original only at stated limit points: this changes the model.",
    Contract.POLICY: "The same graph under another sampling or decoding loop, equal to the base loop at degenerate settings.",
}
