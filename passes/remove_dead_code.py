"""Removes what nothing uses.

    unused(A(B(x))) -> nothing

A random operation stays even when unused: without it, later ones would draw other numbers. So does an assertion.
"""

from dataclasses import dataclass

from ..ir import Rewriter
from ..ir.calls import draws, is_pure
from .base import LeftAlone, Outcome, Pass
from .contract import Contract


@dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Calls whose results reach no output, no new state and no assertion are removed."""

    name = "remove-dead-code"
    rules = ("remove-unused",)
    contract = Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        for node in [node for node in rewriter.nodes() if not node.users and is_pure(node)]:
            with rewriter.step("remove-unused"):
                rewriter.erase(node)
        reason = "it is unused, but without it later operations would draw other random numbers"
        return Outcome(tuple(LeftAlone.at(node, reason) for node in rewriter.nodes() if not node.users and draws(node)))
