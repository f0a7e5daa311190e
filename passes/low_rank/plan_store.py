"""What was chosen for sites, kept in the folder that a killed run resumes from: choosing takes as long as calibrating does."""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError

from ...ir.program import content_digest
from .choose import Choice
from .fit import Problem
from .folds import Fold
from .recipe import Recipe, Setting
from .resume import read_state, write_state
from .statistics import Statistics

_VERSION = 1  # of how choices are made and written


class PlanStore:
    """The choice of one site: found for equal weights, statistics and options, where factors fold alike and the same bound is known."""

    def __init__(self, folder: Path, problem: Problem, statistics: Statistics, recipe: Recipe, fold: Fold | str, bound: float | None):
        weights = [content_digest(weight) for weight in problem.weights]
        place = [fold.ties.tolist() if isinstance(fold, Fold) else None, bound]
        key = json.dumps([_VERSION, weights, str(problem.dtype), problem.branches, statistics.digest, asdict(recipe), place])
        self._file = folder / f"choice-{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def load(self) -> Choice | None:
        found = read_state(self._file)
        if found is None:
            return None
        tensors, data = found
        setting = None if data["setting"] is None else Setting(**data["setting"], smooth=tensors.get("smooth"))
        return Choice(setting, data["plain_error"], tuple(map(tuple, data["errors"])), data["left"], data["note"])

    def save(self, choice: Choice) -> None:
        """A full disk is not worth losing a run for: then nothing is kept."""
        smooth = None if choice.setting is None else choice.setting.smooth
        data = asdict(replace(choice, setting=None if choice.setting is None else replace(choice.setting, smooth=None)))
        if data["setting"] is not None:
            del data["setting"]["smooth"]
        with suppress(OSError, SafetensorError):
            write_state(self._file, {} if smooth is None else {"smooth": smooth}, data)
