"""Public: random programs and pipelines, and the trial that holds a pass to its contract on them. Needs hypothesis."""

from .inputs import input_sets, inputs_for
from .pipelines import pipelines
from .programs import programs
from .verdict import TrialResult, try_passes

__all__ = ["TrialResult", "input_sets", "inputs_for", "pipelines", "programs", "try_passes"]
