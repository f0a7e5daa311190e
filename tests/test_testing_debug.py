"""A planted fault is found: the pass, the rule with its line, the application; the smallest program; a file that runs alone."""

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.cli import main
from graphwright.ir import Rewriter
from graphwright.ir.run import run
from graphwright.passes import Contract, Outcome, Pass
from graphwright.passes.inputs import random_inputs
from graphwright.testing import programs
from graphwright.testing.bisect import bisect
from graphwright.testing.reduce import reduce, reduced
from graphwright.testing.reproducer import write_reproducer
from graphwright.tests import residual_net

aten = torch.ops.aten


@dataclass(frozen=True)
class SwapsAdds(Pass):
    """Right rewrites but for number `wrong`, which subtracts; at `broken` it raises inside the rewrite, at `untyped` it leaves a wrong type."""

    name, contract = "swaps-adds", Contract.EXACT
    wrong: int = -1
    broken: int = -1

    def run(self, rewriter: Rewriter) -> Outcome:
        adds = [node for node in rewriter.nodes() if node.target is aten.add.Tensor]
        for number, node in enumerate(adds, 1):
            target = aten.sub.Tensor if number == self.wrong else aten.add.Tensor
            with rewriter.step("subtract" if number == self.wrong else "swap"):
                if number == self.broken:
                    raise RuntimeError("no way on")
                rewriter.replace(node, rewriter.insert(target, (node.args[1], node.args[0]), {}, before=node, origin=node))
        return Outcome()


@dataclass(frozen=True)
class Relu(Pass):
    """Takes each gelu for a relu."""

    name, contract = "takes-gelu-for-relu", Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        for node in rewriter.nodes():
            if node.target is aten.gelu.default:
                with rewriter.step("relu"):
                    rewriter.replace(node, rewriter.insert(aten.relu.default, (node.args[0],), {}, before=node, origin=node))
        return Outcome()


@pytest.fixture(scope="module")
def program() -> gw.Program:
    module, args = residual_net.make()
    return gw.capture(module, args)


@pytest.mark.parametrize("wrong", [1, 2, 5])
def test_bisecting_names_the_pass_the_rule_and_the_application(program: gw.Program, wrong: int) -> None:
    found = bisect(program, [*gw.CLEANUPS, SwapsAdds(wrong=wrong)])
    assert found is not None and found.record is not None
    cleaned = sum(len(report.records) for report in gw.PassManager(gw.CLEANUPS).run(program).reports)
    assert (found.blamed, found.application, found.rewrite) == (len(gw.CLEANUPS), wrong, cleaned + wrong)
    assert found.record.rule == "subtract" and found.rule.startswith("subtract (") and "test_testing_debug.py:" in found.rule
    assert found.verdict.kind == "wrong"
    said = str(found)
    assert said.startswith(f"rewrite {wrong} of swaps-adds{{wrong={wrong}}}, number {cleaned + wrong} of the pipeline, is not exact: wrong")
    assert "took away  aten.add.Tensor" in said and "put there  aten.sub.Tensor" in said and "\n-   %" in said


def test_of_two_faults_the_first_is_found(program: gw.Program) -> None:
    found = bisect(program, [Relu(), SwapsAdds(wrong=2)])
    assert found is not None and (found.blamed, found.application, found.rewrite) == (0, 1, 1)


def test_a_pass_that_raises_inside_a_rewrite_is_named_with_the_rewrite(program: gw.Program) -> None:
    found = bisect(program, [SwapsAdds(broken=3)])
    assert found is not None and (found.application, found.record, found.verdict.kind) == (3, None, "crashed")
    assert "rewrite 3 of swaps-adds{broken=3}, number 3 of the pipeline, fails: crashed" in str(found)
    assert "no way on (raised at test_testing_debug.py:44) (in rewrite swap at test_testing_debug.py:42" in str(found)


def test_a_pass_that_fails_before_any_rewrite_is_named(program: gw.Program) -> None:
    @dataclass(frozen=True)
    class Failing(Pass):
        name, contract = "failing", Contract.EXACT

        def run(self, rewriter: Rewriter) -> Outcome:
            raise ZeroDivisionError("at once")

    found = bisect(program, [*gw.CLEANUPS, Failing()])
    assert found is not None and found.application == 0 and str(found).startswith("failing fails before its first rewrite: crashed")


def test_right_passes_have_no_rewrite_to_blame(program: gw.Program) -> None:
    assert bisect(program, [*gw.CLEANUPS, SwapsAdds()]) is None


def test_one_call_is_left_of_a_network_and_one_pass_of_a_pipeline(program: gw.Program) -> None:
    found = bisect(program, [*gw.CLEANUPS, Relu()])
    assert found is not None and found.inputs is not None
    small = reduce(program, found.passes, found.inputs)
    assert [str(node.target) for node in small.program.main.calls] == ["aten.gelu.default"]
    assert [each.name for each in small.passes] == ["takes-gelu-for-relu"] and small.verdict.kind == "wrong"
    assert [tuple(value.shape) for value in small.inputs] == [(3, 16)]  # what the first gelu read in the real run
    gw.ir.verify(small.program)


def test_all_that_a_fault_needs_is_left(program: gw.Program) -> None:
    small = reduce(program, [SwapsAdds(wrong=3)], random_inputs(program))
    targets = [str(node.target) for node in small.program.main.calls]
    assert targets.count("aten.add.Tensor") == 3 and set(targets) <= {"aten.add.Tensor", "aten.mul.Tensor"}  # which joins them


def test_what_is_left_fails_for_the_reason_for_which_the_whole_did() -> None:
    """Of the addition alone a pass that drops it gives the input back, which is wrong too, and not what was found."""

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x / (x.abs().sum(-1, keepdim=True) + 1e-15)).softmax(-1)

    @dataclass(frozen=True)
    class DropsTiny(Pass):
        name, contract = "drops-tiny", Contract.EXACT

        def run(self, rewriter: Rewriter) -> Outcome:
            for node in rewriter.nodes():
                if node.target is torch.ops.aten.add.Tensor and node.args[1] == 1e-15:
                    with rewriter.step("drop"):
                        rewriter.replace(node, node.args[0])
            return Outcome()

    small = reduce(gw.capture(Net(), (torch.zeros(2, 4),)), [DropsTiny()], [torch.zeros(2, 4)])
    assert small.verdict.worst is not None and "shares memory" not in small.verdict.reason
    assert 2 <= len(small.program.main.calls) <= 3


def test_what_does_not_fail_is_not_reduced(program: gw.Program) -> None:
    with pytest.raises(ValueError, match="the trial is right, so that there is nothing to reduce"):
        reduce(program, gw.CLEANUPS, random_inputs(program))


@given(programs(max_nodes=10), st.integers(0, 2**16), st.data())
@settings(max_examples=25)
def test_a_part_of_any_program_is_a_program_that_runs(program: gw.Program, seed: int, data: st.DataObject) -> None:
    """Reduced to what one operation needs, whichever is asked for."""
    inputs = random_inputs(program, seed)
    calls = [node for node in program.main.calls if isinstance(node.meta["val"], torch.Tensor)]
    if not calls:
        return
    wanted = data.draw(st.sampled_from([str(node.target) for node in calls]))
    small, given_ = reduced(program, inputs, lambda part, _: any(str(node.target) == wanted for node in part.main.calls))
    gw.ir.verify(small)
    assert len([node for node in small.main.calls if isinstance(node.meta["val"], torch.Tensor)]) <= len(calls)
    run(small, given_)


def test_a_reproducer_was_run_and_runs_alone(program: gw.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_own.py").write_text(PASS)
    monkeypatch.syspath_prepend(str(tmp_path))
    from mine_own import Mine

    small = reduce(program, [Mine()], random_inputs(program))
    path = tmp_path / "case.py"
    write_reproducer(path, small.program, small.passes, small.inputs, small.verdict)
    done = subprocess.run([sys.executable, "case.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith("wrong: "), done.stderr
    (tmp_path / "mine_own.py").write_text(PASS.replace("gelu", "sin"))
    assert subprocess.run([sys.executable, "case.py"], cwd=tmp_path, capture_output=True, text=True).returncode == 0
    with pytest.raises(gw.InputError, match="a file of the trial alone does not reproduce it"):
        write_reproducer(tmp_path / "other.py", small.program, small.passes, small.inputs, small.verdict)
    assert not (tmp_path / "other.py").exists()


PASS = textwrap.dedent('''
    from dataclasses import dataclass
    import torch
    from graphwright.passes import Contract, Outcome, Pass

    @dataclass(frozen=True)
    class Mine(Pass):
        """One of a user's."""

        name, contract = "mine", Contract.EXACT

        def run(self, rewriter):
            for node in rewriter.nodes():
                if node.target is torch.ops.aten.gelu.default:
                    with rewriter.step("activation"):
                        new = rewriter.insert(torch.ops.aten.relu.default, (node.args[0],), {}, before=node, origin=node)
                        rewriter.replace(node, new)
            return Outcome()
''')


# --- on the command line ---------------------------------------------------------------------------------------------------------


def test_the_command_line_bisects_reduces_and_writes_the_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "mine_too.py").write_text(PASS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["bisect", "graphwright.tests.residual_net:make", "--passes", "mine_too:Mine", "-o", "case.py", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["pass"], said["application"], said["verdict"], said["output"]) == ("mine", 1, "wrong", "case.py")
    assert (tmp_path / "case.py").exists()
    assert main(["reduce", "graphwright.tests.residual_net:make", "--passes", "mine_too:Mine"]) == 1
    assert "1 of " in capsys.readouterr().out
    assert main(["bisect", "graphwright.tests.residual_net:make"]) == 0
    assert "no rewrite is wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bisect", "vit:tiny", "-o", "case.txt"], "reproducers are called something.py"),
        (["bisect", "vit:tiny", "-o", "nowhere/case.py"], "the folder nowhere does not exist"),
        (["reduce", "vit:tiny"], "no rewrite is wrong on these inputs, so that there is nothing to reduce"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_pass_explains_what_it_left_alone(capsys: pytest.CaptureFixture) -> None:
    assert main(["explain", "absorb-outliers", "dit:tiny"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("absorb-outliers (bounded) made ") and "left alone, " in said and "dit.py:" in said
    assert main(["explain", "fold-batch-norm", "vit:tiny"]) == 0
    assert "nothing else came near" in capsys.readouterr().out
