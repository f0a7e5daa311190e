"""Planted mistakes: where each stands, that they go away again, and that those which need few programs are seen, and named by bisection.

All of them are run by `python -m graphwright.testing.mutants`.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from graphwright.ir.where import PACKAGE_ROOT
from graphwright.passes.fold_batch_norm import folded_weights
from graphwright.testing.mutants import CATCHERS, MUTANTS, Mutant, NoSite, check, planted
from graphwright.testing.mutants.command import main
from graphwright.testing.mutants.hunts import QUESTIONS, Hunt

pytestmark = pytest.mark.usefixtures("one_thread")
BY_NAME = {each.name: each for each in MUTANTS}
GROUPS = {"slices", "operands", "constants", "masks", "state", "bookkeeping", "routing", "kernels", "infrastructure"}
HERE = Hunt("fold-batch-norm", ("motifs.layer_then_batch_norm",), 2)


def test_there_are_more_than_a_hundred_of_all_groups_with_names_of_their_own() -> None:
    mistakes = [each for each in MUTANTS if not each.equivalent]
    assert len(mistakes) >= 180 and len(BY_NAME) == len(MUTANTS)
    assert {each.group for each in mistakes} == GROUPS
    assert len(MUTANTS) - len(mistakes) <= 0.05 * len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.name)
def test_each_stands_once_in_the_source(mutant: Mutant) -> None:
    text = (Path(PACKAGE_ROOT) / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1 and mutant.old != mutant.new
    assert mutant.old.count("\n") == mutant.new.count("\n")
    assert mutant.catchers and set(mutant.catchers) <= set(CATCHERS)
    assert mutant.hunt.question in QUESTIONS


# The kinds of mistakes that the compiler must see without exception, one of each; the command tries all of them.
@pytest.mark.parametrize(
    "name",
    [
        "slices-overlap",  # an off-by-one chunk
        "outputs-along-the-first-dim",  # the wrong dim of a slice
        "stale-sizes",
        "bias-dropped",
        "operands-are-not-compared",
        "broadcast-dims-are-cut",
        "result-in-a-slot-that-lives",
        "output-may-be-the-input",
        "fuel-ends-one-late",
        "weights-not-in-the-key",
        "minus-infinity-is-infinity",
    ],
)
def test_a_planted_mistake_is_seen(name: str) -> None:
    outcome = check(BY_NAME[name], most=150, seconds=120)
    assert outcome.caught, outcome
    if outcome.named is not None:
        assert outcome.named.rule and outcome.named.application


def test_what_is_no_mistake_is_not_seen() -> None:
    mutant = BY_NAME["rows-of-the-next-layer"]
    assert mutant.equivalent
    outcome = check(mutant, most=4)
    assert not outcome.caught and outcome.trials == 4 and outcome.ran > 0


def test_a_mistake_goes_away_again() -> None:
    values = dict(layer_weight=torch.ones(1, 1), layer_bias=None, scale=None, shift=None, mean=torch.zeros(1), variance=torch.zeros(1))
    right = folded_weights(**values, eps=4.0)["weight"]
    with planted(BY_NAME["eps-dropped"]):
        assert folded_weights(**values, eps=4.0)["weight"].isinf()
    with pytest.raises(KeyError), planted(BY_NAME["eps-dropped"]):
        raise KeyError
    assert torch.equal(folded_weights(**values, eps=4.0)["weight"], right)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("no such text", "x", "stands 0 times"),
        ("return", "return", "stands .* times"),
        ("    weight = layer_weight * s.reshape(", "    weight = (\n layer_weight) * s.reshape(", "other lines"),
    ],
)
def test_a_mistake_whose_place_is_gone_says_so(old: str, new: str, said: str) -> None:
    mutant = Mutant("here", "constants", "passes/fold_batch_norm.py", old, new, ("float64",), HERE)
    with pytest.raises(NoSite, match=said), planted(mutant):
        pass


def test_the_command_counts_keeps_a_record_and_fails_where_too_many_survive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mutants.json"
    assert main(["eps-dropped", "mean-added", "view-keeps-its-first-dim", "--most", "1", "--json", str(file)]) == 1
    data = json.loads(file.read_text())
    assert (data["figures"]["caught"], data["figures"]["survive"], data["figures"]["named"]) == (2, 1, 2)
    assert Counter(each["by"] for each in data["mutants"]) == {"float64": 2, "": 1}
    captured = capsys.readouterr()
    assert "caught" in captured.out and "view-keeps-its-first-dim: survives 1 subjects" in captured.err


def test_a_name_of_no_mistake_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such"]) == 2
    assert "there is no mutant no-such" in capsys.readouterr().err
