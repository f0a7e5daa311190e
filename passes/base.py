"""What a pass is: options, a name, facts it needs and gives, a contract, and one method that rewrites a function.

@dataclass(frozen=True)
class ShareSubexpressions(Pass):
    name = "share-subexpressions"
    contract = Contract.EXACT
    ensures = frozenset({"subexpressions-shared"})

    def run(self, rewriter: Rewriter) -> Outcome: ...
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from ..ir import Node, Program, Rewriter
from ..ir.calls import name_of
from ..ir.errors import PassError
from .check import Reference
from .contract import Contract
from .options import spell_value
from .verdict import Verdict

_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class LeftAlone:
    """A site that a pass looked at and did not touch: what it is, why, and the user's line. `rule` is the one that refused it, of a pass
    with several; empty where all did."""

    what: str
    reason: str
    where: str = ""
    rule: str = ""

    @staticmethod
    def at(node: Node, reason: str, rule: str = "") -> "LeftAlone":
        """The entry of `node`, with its operation and the user's line; `reason` says why it was left alone."""
        target: Any = node.target
        what = name_of(target) if node.op == "call_function" else str(target)
        return LeftAlone(what, reason, str(node.meta.get("where") or ""), rule)


@dataclass(frozen=True)
class Outcome:
    """What a pass has to say: what it left alone, lines for the report, and data for programs that read the report. `declined` holds
    sites that one rule refused where a report has nothing to tell: another rule took them, or they cost nothing."""

    left: tuple[LeftAlone, ...] = ()
    lines: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    declined: tuple[LeftAlone, ...] = ()

    @staticmethod
    def merged(outcomes: "Sequence[Outcome]") -> "Outcome":
        """The outcomes of one pass over several functions as one."""
        return Outcome(
            tuple(left for outcome in outcomes for left in outcome.left),
            tuple(line for outcome in outcomes for line in outcome.lines),
            {key: value for outcome in outcomes for key, value in outcome.data.items()},
            tuple(declined for outcome in outcomes for declined in outcome.declined),
        )


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of programs. A subclass is a frozen dataclass whose fields are its options.

    `after` and `before` name passes that must not stand on the other side of this one in a pipeline that has both. `rules` names its
    rewrites, as its steps do.

    Raises (on construction):
        PassError: an option is unknown or out of range; the message says what is legal.
    """

    name: ClassVar[str]
    rules: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[frozenset[str]] = frozenset()
    before: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def contract(self) -> Contract:
        """What this pass, as configured, promises."""

    @abstractmethod
    def run(self, rewriter: Rewriter) -> Outcome:
        """Rewrites one function of a program."""

    def check(self, reference: Reference, after: Program) -> Verdict:
        """Whether `after` keeps the contract towards the program that `reference` holds.

        An exact pass is judged by the exact rule. A policy leaves the graph as it was, which the exact rule covers. A bounded
        pass or a substitution overrides this with its own metric; without one its numbers are unmeasured, and the verdict says so.
        """
        if self.contract in (Contract.EXACT, Contract.POLICY):
            return reference.judge_exact(after)
        verdict = reference.judge_structure(after)
        if verdict.fails:
            return verdict
        return Verdict("unmeasured", f"nothing holds {self.name} to its contract ({self.contract}): override its method check")

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        if "name" in cls.__dict__ and not _KEBAB.fullmatch(cls.name):
            raise PassError(f"the pass {cls.__name__} is named {cls.name!r}: names are kebab-case, such as fold-batch-norm")

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        known = cls.option_names()
        unknown = [name for name in options if name not in known]
        if unknown:
            raise PassError(f"pass {cls.name} has no option {unknown[0]}: {_options_text(known)}")
        if len(arguments) > len(known):
            raise PassError(f"pass {cls.name} takes {len(known)} options, not {len(arguments)}: {_options_text(known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, option.name, value)
            if "accepts" in option.metadata and not _accepts(option.metadata["accepts"], value):
                raise PassError(f"pass {self.name}: option {option.name} is {value!r}, but must be {option.metadata['legal']}")

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        return tuple(option.name for option in fields(cls))

    @property
    def spelling(self) -> str:
        """The pass as pipelines write it, options at their defaults left out: `slice-groups{memory_budget=25%}`."""
        given = [
            f"{option.name}={spell_value(getattr(self, option.name))}"
            for option in fields(self)
            if option.metadata.get("spelled", True) and getattr(self, option.name) != option.default
        ]
        return f"{self.name}{{{','.join(given)}}}" if given else self.name

    def __str__(self) -> str:
        return self.spelling


def _accepts(accepts: Any, value: Any) -> bool:
    try:
        return bool(accepts(value))
    except (TypeError, ValueError):
        return False


def _options_text(known: Sequence[str]) -> str:
    return f"its options are {', '.join(known)}" if known else "it has no options"
