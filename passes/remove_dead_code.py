"""Removes what nothing uses.

    unused(A(B(x))) -> nothing

A random operation stays even when unused: without it, later ones would draw other numbers. So does an assertion.
"""

from dataclasses import dataclass

from ..ir import Rewriter
from .base import LeftAlone, Outcome, Pass
from .contract import Contract
from .randomness import draws_random_numbers, is_repeatable


@dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Calls whose results reach no output, no new state and no assertion are removed."""

    name = "remove-dead-code"
    contract = Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        while dead := [node for node in rewriter.nodes() if not node.users and is_repeatable(node)]:
            for node in dead:
                with rewriter.step("remove-unused"):
                    rewriter.erase(node)
        reason = "it is unused, but without it later operations would draw other random numbers"
        return Outcome(tuple(LeftAlone.at(node, reason) for node in rewriter.nodes() if not node.users and draws_random_numbers(node)))
