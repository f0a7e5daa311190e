"""More than a hundred planted mistakes, of which the verifier and the checks must see nearly all: the test of the tests.

python -m graphwright.testing.mutants            # all of them, and what saw each after how many programs
python -m graphwright.testing.mutants eps-dropped slices-overlap
"""

from . import in_bookkeeping, in_cleanups, in_low_rank, in_runtime, in_slicing
from .check import Named, Outcome, check
from .mutant import CATCHERS, Mutant, NoSite, planted

MUTANTS: tuple[Mutant, ...] = (
    *in_cleanups.MUTANTS,
    *in_slicing.MUTANTS,
    *in_low_rank.MUTANTS,
    *in_runtime.MUTANTS,
    *in_bookkeeping.MUTANTS,
)

__all__ = ["CATCHERS", "MUTANTS", "Mutant", "Named", "NoSite", "Outcome", "check", "planted"]
