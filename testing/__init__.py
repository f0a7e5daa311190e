"""Public: random programs and pipelines, and checks that hold any pass to its contract on them. Needs hypothesis.

from graphwright.testing import check_pass

def test_my_pass() -> None:
    check_pass(MyPass())
"""

from .check_pass import check_pass
from .inputs import input_sets, inputs_for
from .pipelines import pipelines
from .programs import programs
from .verdict import TrialResult, try_passes

__all__ = ["TrialResult", "check_pass", "input_sets", "inputs_for", "pipelines", "programs", "try_passes"]
