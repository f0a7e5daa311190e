"""One trial of `graphwright.testing`: the ends that it can have, who is blamed, and where rounding alone may flip a value."""

import re
from dataclasses import dataclass

import pytest
import torch

from graphwright.ir import Program, Rewriter, parse
from graphwright.ir.calls import target_of
from graphwright.ir.errors import BudgetError, PassError
from graphwright.passes import Contract, Outcome, Pass, RemoveNoOps, ShareSubexpressions, check_exact, random_inputs
from graphwright.testing.verdict import try_passes

aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("one_thread")


def program(body: str, inputs: str = "%x : f32[4, 6]") -> Program:
    arguments = [f"  input {each.strip()}" for each in inputs.split(";")]
    takes = ", ".join("*" for _ in arguments)
    gives = ", ".join("*" for _ in body.rpartition("return")[2].split(","))
    return parse("\n".join(["graphwright 1", "function main {", f"  takes (({takes}), {{}})", f"  gives ({gives})", *arguments, body, "}"]))


@dataclass(frozen=True)
class Replacing(Pass):
    """Puts the call `new(x)` in the place of each call of `old(x, ..)`."""

    name = "replacing"
    contract = Contract.EXACT

    old: str = ""
    new: str = ""

    def run(self, rewriter: Rewriter) -> Outcome:
        for node in list(rewriter.nodes()):
            if node.target is target_of(self.old):
                with rewriter.step("replace"):
                    rewriter.replace(node, rewriter.insert(target_of(self.new), node.args[:1], before=node, origin=node))
        return Outcome()


@dataclass(frozen=True)
class Raising(Pass):
    name = "raising"
    contract = Contract.EXACT

    error: object = None

    def run(self, rewriter: Rewriter) -> Outcome:
        raise self.error


EXP = "%a = aten.exp.default(%x)\nreturn %a"


def test_an_exact_pass_that_keeps_the_function_is_right() -> None:
    body = "%a = aten.mul.Scalar(%x, 1)\n%b = aten.exp.default(%a)\n%c = aten.exp.default(%a)\n%d = aten.add.Tensor(%b, %c)\nreturn %d"
    before = program(body)
    result = try_passes(before, [RemoveNoOps(), ShareSubexpressions()], [random_inputs(before)])
    assert result.verdict.kind == "right" and not result.fails
    assert [len(report.records) for report in result.reports] == [1, 1]


def test_the_worst_element_its_operation_and_the_pass_are_named() -> None:
    before = program(EXP)
    inputs = random_inputs(before)
    result = try_passes(before, [RemoveNoOps(), Replacing("aten.exp.default", "aten.expm1.default"), ShareSubexpressions()], [inputs])
    worst = result.verdict.worst
    assert (result.verdict.kind, result.blamed, result.input_set) == ("wrong", 1, 0)
    assert worst.expected == inputs[0][worst.index].double().exp().item()
    assert worst.node == "aten.expm1.default" and "aten.expm1.default" in str(worst)


def test_the_first_of_several_wrong_passes_is_blamed() -> None:
    passes = [Replacing("aten.exp.default", "aten.expm1.default"), Replacing("aten.expm1.default", "aten.sin.default")]
    before = program(EXP)
    assert try_passes(before, passes, [random_inputs(before)]).blamed == 0


def test_a_later_input_set_may_be_the_one_that_shows_it() -> None:
    before = program("%a = aten.relu.default(%x)\nreturn %a")
    passes = [Replacing("aten.relu.default", "aten.abs.default")]
    positive, negative = [torch.ones(4, 6)], [-torch.ones(4, 6)]
    assert try_passes(before, passes, [positive]).verdict.kind == "right"
    assert try_passes(before, passes, [positive, negative]).input_set == 1


def test_in_tests_the_bound_is_that_of_the_programs_own_noise() -> None:
    off = 1 + 1e-11  # within the promise of 1e-10, and 50,000 roundings away
    before, after = program(EXP), program(f"%a = aten.exp.default(%x)\n%b = aten.mul.Scalar(%a, {off!r})\nreturn %b")
    assert check_exact(before, after, random_inputs(before)).kind == "right"

    @dataclass(frozen=True)
    class Off(Pass):
        name, contract = "off", Contract.EXACT

        def run(self, rewriter: Rewriter) -> Outcome:
            (node,) = rewriter.nodes()
            with rewriter.step("off"):
                new = rewriter.insert(aten.mul.Scalar, (rewriter.insert(node.target, node.args, before=node), off), before=node)
                rewriter.replace(node, new)
            return Outcome()

    assert try_passes(before, [Off()], [random_inputs(before)]).verdict.kind == "wrong"


@pytest.mark.parametrize(
    ("error", "kind"),
    [(BudgetError("too small"), "refused"), (PassError("pass raising needs more"), "refused"), (ValueError("oops"), "crashed")],
)
def test_a_typed_error_is_a_refusal_and_any_other_a_crash(error: Exception, kind: str) -> None:
    result = try_passes(program(EXP), [RemoveNoOps(), Raising(error)], [])
    assert result.verdict.kind == kind and str(error) in result.verdict.reason


def test_a_broken_rule_of_the_ir_is_a_crash() -> None:
    result = try_passes(program(EXP), [Replacing("aten.exp.default", "aten.sum.default")], [])
    assert result.verdict.kind == "crashed" and result.blamed == 0


def test_inputs_that_the_program_itself_refuses_say_nothing() -> None:
    before = program("%a = aten.index_select.default(%x, 0, %i)\n%b = aten.exp.default(%a)\nreturn %b", "%x : f32[4, 6]; %i : i64[2]")
    passes = [Replacing("aten.exp.default", "aten.expm1.default")]
    assert try_passes(before, passes, [[torch.ones(4, 6), torch.tensor([9, 9])]]).verdict.kind == "inconclusive"


# --- jumps ---

REORDERED = "%s = aten.add.Tensor(%x, %y)\n%t = aten.add.Tensor(%s, %z)\n"
OTHER = "%s = aten.add.Tensor(%y, %z)\n%t = aten.add.Tensor(%x, %s)\n"
THREE = "%x : f64[3]; %y : f64[3]; %z : f64[3]"
EDGE = [torch.full((3,), value, dtype=torch.float64) for value in (0.1, 0.2, 0.3)]


@pytest.mark.parametrize("jump", ["aten.gt.Scalar(%t, 0.6)", "aten.floor.default(%u)", "aten.argmax.default(%v)"])
def test_a_value_at_the_edge_of_a_jump_settles_nothing(jump: str) -> None:
    """(0.1 + 0.2) + 0.3 and 0.1 + (0.2 + 0.3) are one step apart, on both sides of the jump."""
    rest = "%u = aten.mul.Scalar(%t, 1.6666666666666667)\n%c = aten.full.default([3], 0.6, dtype=f64)\n%v = aten.cat.default([%c, %t])\n"
    before, after = (program(f"{sums}{rest}%j = {jump}\nreturn %j", THREE) for sums in (REORDERED, OTHER))
    verdict = check_exact(before, after, EDGE)
    assert verdict.kind == "inconclusive" and re.search("stands so near a jump|too ill-conditioned to judge", verdict.reason)


def test_a_fault_away_from_every_jump_is_still_wrong() -> None:
    before = program("%j = aten.gt.Scalar(%x, 0.6)\n%s = aten.exp.default(%x)\nreturn %j, %s", "%x : f64[3]")
    after = program("%j = aten.gt.Scalar(%x, 0.6)\n%s = aten.expm1.default(%x)\nreturn %j, %s", "%x : f64[3]")
    at_edge = [torch.full((3,), 0.6, dtype=torch.float64)]
    assert check_exact(before, after, at_edge).kind == "wrong"


def test_a_fault_of_a_comparison_far_from_its_edge_is_wrong() -> None:
    before, after = (program(f"%j = aten.{op}.Scalar(%x, 0.6)\nreturn %j", "%x : f64[3]") for op in ("gt", "lt"))
    assert check_exact(before, after, EDGE[:1]).kind == "wrong"
