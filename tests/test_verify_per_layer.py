"""The errors of calls against float64: the first that a pass makes diverge, as a table, as data and as a plot."""

import json
import math
import sys
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import graphwright as gw
from graphwright.cli import main
from graphwright.explorer.divergence import described, first_divergence, picture, worst_first
from graphwright.explorer.layer_errors import call_errors
from graphwright.ir import Rewriter
from graphwright.passes import Contract, Outcome, Pass
from graphwright.passes.inputs import random_inputs
from graphwright.tests import residual_net

aten = torch.ops.aten
MODULE = sys.modules[call_errors.__module__]  # the package has a function of its name


@dataclass(frozen=True)
class ScalesThird(Pass):
    """Not exact: the third GELU is of a value that is a thousandth larger."""

    name, contract = "scales-third", Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        third = [node for node in rewriter.nodes() if node.target is aten.gelu.default][2]
        with rewriter.step("scale"):
            scaled = rewriter.insert(aten.mul.Scalar, (third.args[0], 1.001), before=third, origin=third)
            rewriter.replace(third, rewriter.insert(aten.gelu.default, (scaled,), before=third, origin=third))
        return Outcome()


@pytest.fixture(scope="module")
def program() -> gw.Program:
    return gw.capture(*residual_net.make())


def test_the_first_call_that_diverges_is_the_one_that_a_pass_changed(program: gw.Program) -> None:
    after = gw.PassManager([*gw.CLEANUPS, ScalesThird()]).run(program).program
    errors = call_errors(program, after, random_inputs(program))
    first = first_divergence(errors)
    assert first is not None and first.source is [node for node in program.main.calls if node.target is aten.gelu.default][2]
    assert first.before < 1e-6 < 1e-4 < (first.after or 0) < 1e-2  # a thousandth
    assert worst_first(errors)[0].after is not None and described(first)["diverges"] and described(first)["call"] == "aten.gelu.default"


def test_of_right_passes_no_call_diverges(program: gw.Program) -> None:
    after = gw.PassManager(gw.CLEANUPS).run(program).program
    errors = call_errors(program, after, random_inputs(program))
    assert first_divergence(errors) is None and len(worst_first(errors)) > 20


def test_what_is_held_at_once_does_not_change_the_errors(program: gw.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(program)
    whole = call_errors(program, program, inputs)
    monkeypatch.setattr(MODULE, "_MOST_HELD", 300)  # about one call
    assert call_errors(program, program, inputs) == whole


def test_a_value_that_became_infinite_is_infinitely_far_off() -> None:
    def error(value: list[float], exact: list[float]) -> float:
        [node] = [node for node in gw.parse(ONE_CALL).main.calls]
        return MODULE._error_of({node: torch.tensor(exact, dtype=torch.float64)}, node, torch.tensor(value))

    assert error([1.0, math.inf], [1.0, 2.0]) == math.inf
    assert error([1.0, math.inf], [1.0, math.inf]) == 0.0
    assert error([1.0, math.inf], [1.0, -math.inf]) == math.inf
    assert error([3.0, math.nan], [4.0, math.nan]) == pytest.approx(0.25)


ONE_CALL = str(gw.capture(torch.nn.ReLU(), (torch.zeros(2),)))


def test_the_plot_is_svg_that_asks_for_nothing(program: gw.Program) -> None:
    after = gw.PassManager([ScalesThird()]).run(program).program
    text = picture("<a & b>", call_errors(program, after, random_inputs(program)))
    root = xml.etree.ElementTree.fromstring(text)
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 2
    assert "&lt;a &amp; b&gt;" in text and "first that diverges: aten.gelu.default" in text
    assert "href" not in text and "<script" not in text


# --- on the command line ---------------------------------------------------------------------------------------------------------


def test_verify_prints_and_draws_the_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plot = tmp_path / "errors.svg"
    passes = "graphwright.tests.test_verify_per_layer:ScalesThird"
    arguments = ["verify", "graphwright.tests.residual_net:make", "--passes", passes, "--per-layer"]
    assert main([*arguments, "--plot", str(plot)]) == 1  # it says that it is exact
    said = capsys.readouterr().out
    assert "\nnot verified: calls diverge (below)\n\n" in said and "\nverified" not in said
    assert "first aten.gelu.default" in said and " diverges  " in said and plot.read_text().startswith("<svg")
    assert main([*arguments, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    layers = data["layers"]
    assert data["verdict"] == "diverges"
    assert [each["call"] for each in layers if each["diverges"]][0] == "aten.gelu.default"


def test_what_a_bounded_pass_changes_is_no_fault(capsys: pytest.CaptureFixture) -> None:
    arguments = ["verify", "graphwright.tests.residual_net:make", "--per-layer", "--passes", "quantize{weight=int8-channel,min_numel=1}"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "diverge, first aten.linear.default" in said and "\nverified\n" in said


def drawing() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """A model that draws, as MODEL on the command line."""
    return torch.nn.Dropout().train(), (torch.ones(3),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "vit:tiny", "--plot", "errors.png"], "plots are called something.svg"),
        (["verify", "vit:tiny", "--plot", "nowhere/errors.svg"], "the folder nowhere does not exist"),
        (["verify", "graphwright.tests.test_verify_per_layer:drawing", "--per-layer"], "put the model in eval mode"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
