"""Which rules of our exact passes a run of trials tested: how often each fired, and how often it was refused.

A rule that is at zero in either column was not tested, whatever the verdicts say. Source: specs/trust.md, section 3.7.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..passes import Contract
from ..passes.registry import BUILT_IN
from .trials import Record


@dataclass(frozen=True)
class RuleCount:
    """How often "pass/rule" changed a program, and how many sites it left alone; what all rules of a pass refused counts for each."""

    rule: str
    fired: int
    refused: int

    @property
    def least(self) -> int:
        return min(self.fired, self.refused)


def exact_rules() -> list[str]:
    """Every rule of our exact passes, as "pass/rule"."""
    exact = [each for each in BUILT_IN.values() if each.contract is Contract.EXACT]  # one that options change is a property
    return [f"{each.name}/{rule}" for each in exact for rule in each.rules]


def rule_counts(records: Iterable[Record]) -> list[RuleCount]:
    """One for each rule of our exact passes, those at zero included, and for whatever else fired."""
    fired: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for record in records:
        fired.update(record.fired)
        for reason, times in record.left.items():
            refused[reason.partition(": ")[0]] += times
    rules = list(dict.fromkeys([*exact_rules(), *sorted(fired)]))
    return [RuleCount(rule, fired[rule], refused[rule] + refused[rule.partition("/")[0]]) for rule in rules]


def untested(counts: Sequence[RuleCount], least: int) -> list[RuleCount]:
    """The rules that fired or were refused less than `least` times."""
    return [each for each in counts if each.least < least]
