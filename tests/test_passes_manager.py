"""The manager: verifies after each pass, blames by name, stops when fuel is spent, and bisects a broken contract to its rewrite."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from graphwright.ir import Fuel, Node, Program, Rewriter, capture
from graphwright.ir.errors import BudgetError, ContractError, InputError, PassError
from graphwright.ir.pattern import named_arguments
from graphwright.passes import Contract, LeftAlone, Outcome, Pass, PassManager, Reference, Verdict

aten = torch.ops.aten


class Model(torch.nn.Module):
    """Four linear layers, a norm, a subtraction: enough sites for a fault to hide among."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(4))
        self.norm = torch.nn.LayerNorm(6, eps=1e-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.layers:
            y = torch.nn.functional.gelu(layer(y))
        return self.norm(y - x)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Model().eval(), (torch.randn(3, 6),))


@dataclass(frozen=True)
class EachCall(Pass):
    """Applies `rewrite` to each call of `target`."""

    name = "each-call"
    contract = Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        for node in rewriter.nodes():
            self.visit(rewriter, node)
        return Outcome()

    def visit(self, rewriter: Rewriter, node: Node) -> None:
        """Nothing; the passes below rewrite."""


@dataclass(frozen=True)
class CommuteAdd(EachCall):
    """Correct: x - y -> x + (-1) * y, one rewrite for each subtraction."""

    name = "commute-add"
    ensures = frozenset({"no-subtractions"})

    def visit(self, rewriter: Rewriter, node: Node) -> None:
        if node.target is aten.sub.Tensor:
            with rewriter.step("subtraction-to-addition"):
                negated = rewriter.insert(aten.mul.Tensor, (node.args[1], -1.0), before=node, origin=node)
                rewriter.replace(node, rewriter.insert(aten.add.Tensor, (node.args[0], negated), before=node, origin=node))


@dataclass(frozen=True)
class SpellLinear(EachCall):
    """linear(x, W, b) -> matmul(x, W^T) + b, but the `broken`-th (from 1) loses its bias."""

    name = "spell-linear"

    broken: int = 0

    def run(self, rewriter: Rewriter) -> Outcome:
        layers = [node for node in rewriter.nodes() if node.target is aten.linear.default]
        for number, node in enumerate(layers, start=1):
            x, weight, bias = node.args
            with rewriter.step("spell-linear"):
                transposed = rewriter.insert(aten.t.default, (weight,), before=node, origin=node)
                product = rewriter.insert(aten.matmul.default, (x, transposed), before=node, origin=node)
                if number != self.broken:
                    product = rewriter.insert(aten.add.Tensor, (product, bias), before=node, origin=node)
                rewriter.replace(node, product)
        return Outcome()


@dataclass(frozen=True)
class SwapOperands(EachCall):
    name = "swap-operands"

    def visit(self, rewriter: Rewriter, node: Node) -> None:
        if node.target is aten.sub.Tensor:
            with rewriter.step("swap"):
                rewriter.set_arguments(node, (node.args[1], node.args[0]))


@dataclass(frozen=True)
class ChangeEps(EachCall):
    name = "change-eps"

    def visit(self, rewriter: Rewriter, node: Node) -> None:
        if node.target is aten.layer_norm.default:
            arguments = {**named_arguments(node), "eps": 1.0000001e-2}
            with rewriter.step("eps"):
                rewriter.set_arguments(node, list(arguments.values()))


@dataclass(frozen=True)
class RoundTrip(EachCall):
    """Right in float64, where bfloat16 is float64 as well; imprecise in float32."""

    name = "round-trip"

    def visit(self, rewriter: Rewriter, node: Node) -> None:
        if node.target is aten.sub.Tensor:
            with rewriter.step("through-bfloat16"):
                narrow = rewriter.insert(aten._to_copy.default, (node.args[0],), {"dtype": torch.bfloat16}, before=node, origin=node)
                wide = rewriter.insert(aten._to_copy.default, (narrow,), {"dtype": torch.float32}, before=node, origin=node)
                rewriter.set_arguments(node, (wide, node.args[1]))


def place_of(rule: str) -> str:
    """File and line of the step of `rule` in this file."""
    lines, marker = Path(__file__).read_text().splitlines(), f'rewriter.step("{rule}")'
    return f"test_passes_manager.py:{next(n for n, line in enumerate(lines, start=1) if marker in line)}"


# --- what a run gives ---


def test_each_pass_works_on_a_copy_and_the_history_keeps_every_stage(program: Program) -> None:
    before = str(program)
    result = PassManager([CommuteAdd(), SpellLinear()]).run(program)
    assert str(program) == before
    assert [stage.pipeline for stage in result.history] == ["", "commute-add", "commute-add,spell-linear"]
    assert result.history[0] is program and result.history[-1] is result.program
    assert result.program.history[-1].source is result.history[1]


def test_weights_that_nothing_uses_any_more_leave_the_table(program: Program) -> None:
    result = PassManager([SpellLinear(broken=2)]).run(program)
    assert program.weights.keys() - result.program.weights.keys() == {"layers.1.bias"}


def test_a_report_says_what_was_rewritten_where_and_what_was_left_alone(program: Program) -> None:
    @dataclass(frozen=True)
    class Shy(EachCall):
        name = "shy"

        def run(self, rewriter: Rewriter) -> Outcome:
            left = [LeftAlone.at(node, "it is beautiful") for node in rewriter.nodes() if node.target is aten.gelu.default]
            return Outcome(tuple(left), ("a line of its own",), {"seen": 4})

    commute, shy = PassManager([CommuteAdd(), Shy()], verify="numeric").run(program).reports
    assert f"commute-add  {Contract.EXACT}  1 rewrite" in str(commute)
    assert f"subtraction-to-addition x 1  ({place_of('subtraction-to-addition')})" in str(commute)
    assert "right; float64 error" in str(commute) and "x the original's own)" in str(commute)
    assert shy.left[0].what == "aten.gelu.default" and "test_passes_manager.py" in shy.left[0].where and shy.data == {"seen": 4}
    assert "a line of its own" in str(shy) and "left 4 aten.gelu.default: it is beautiful" in str(shy)
    assert "right: nothing changed" in str(shy)


def test_a_pipeline_promises_what_its_weakest_pass_does(program: Program) -> None:
    @dataclass(frozen=True)
    class Bounded(EachCall):
        name = "bounded"
        contract = Contract.BOUNDED

    manager = PassManager([CommuteAdd(), Bounded(), CommuteAdd()])
    assert manager.contract is Contract.BOUNDED and manager.run(program).contract is Contract.BOUNDED
    assert PassManager("").run(program).contract is Contract.EXACT


def test_progress_is_told_before_each_pass_and_at_the_end(program: Program) -> None:
    told: list[tuple[int, int, str]] = []
    PassManager([CommuteAdd(), SpellLinear()], progress=lambda *step: told.append(step)).run(program)
    assert told == [(0, 2, "commute-add"), (1, 2, "spell-linear"), (2, 2, "")]


# --- facts ---


def test_a_missing_fact_names_the_pass_that_ensures_it(program: Program) -> None:
    @dataclass(frozen=True)
    class Needy(EachCall):
        name = "needy"
        requires = frozenset({"no-subtractions"})

    PassManager([CommuteAdd(), Needy()]).run(program)
    with pytest.raises(PassError, match="pass needy requires no-subtractions: put commute-add before it"):
        PassManager([Needy(), CommuteAdd()]).run(program)
    with pytest.raises(PassError, match="pass needy requires no-subtractions: no known pass ensures that"):
        PassManager([Needy()]).run(program)


# --- fuel ---


def test_fuel_counts_rewrites_over_all_passes_and_ends_the_pipeline_with_a_whole_program(program: Program) -> None:
    fuel = Fuel(left=3)
    result = PassManager([CommuteAdd(), SpellLinear(), CommuteAdd()], fuel=fuel).run(program)
    assert fuel.spent == 3
    assert [len(report.records) for report in result.reports] == [1, 2]
    assert [report.out_of_fuel for report in result.reports] == [False, True]
    assert "(out of fuel)" in str(result.reports[-1])
    assert str(result.program).count("aten.linear") == 2


def test_fuel_that_suffices_stops_nothing(program: Program) -> None:
    result = PassManager([CommuteAdd(), SpellLinear()], fuel=Fuel(left=5)).run(program)
    assert not any(report.out_of_fuel for report in result.reports)


# --- failures ---


def failing(error: Exception) -> Pass:
    @dataclass(frozen=True)
    class Failing(EachCall):
        name = "failing"

        def run(self, rewriter: Rewriter) -> Outcome:
            raise error

    return Failing()


def test_an_exception_inside_a_pass_names_it_and_those_before_it(program: Program) -> None:
    with pytest.raises(PassError, match=r"pass failing \(after commute-add, spell-linear\) failed: KeyError: 'x'") as caught:
        PassManager([CommuteAdd(), SpellLinear(), failing(KeyError("x"))]).run(program)
    assert isinstance(caught.value.__cause__, KeyError)


def test_our_own_errors_pass_through_with_a_note(program: Program) -> None:
    with pytest.raises(BudgetError, match="too little") as caught:
        PassManager([failing(BudgetError("too little"))]).run(program)
    assert caught.value.__notes__ == ["while running pass failing (the first)"]


def test_a_pass_that_leaves_a_broken_program_is_blamed_with_the_lines_around_it(program: Program) -> None:
    @dataclass(frozen=True)
    class Vandal(EachCall):
        name = "vandal"

        def visit(self, rewriter: Rewriter, node: Node) -> None:
            if node.target is aten.gelu.default:
                node.meta["val"] = node.meta["val"].to(torch.float64)

    with pytest.raises(
        PassError, match=r"pass vandal \(after commute-add\) breaks a rule of the IR: aten.gelu.default is stored as"
    ) as caught:
        PassManager([CommuteAdd(), Vandal()]).run(program)
    assert "aten.gelu.default" in caught.value.__notes__[0]


def test_checked_mode_finds_a_rule_that_changes_nothing(program: Program) -> None:
    @dataclass(frozen=True)
    class Idle(EachCall):
        name = "idle"

        def visit(self, rewriter: Rewriter, node: Node) -> None:
            with rewriter.step("again"):
                rewriter.set_arguments(node, node.args, node.kwargs)

    PassManager([Idle()]).run(program)
    with pytest.raises(PassError, match="rule again of idle reports a rewrite but the program is the same"):
        PassManager([Idle()], checked=True).run(program)


def test_an_unknown_way_to_verify_is_told(program: Program) -> None:
    with pytest.raises(PassError, match="verify is 'thorough', but must be one of 'structure', 'numeric'"):
        PassManager([], verify="thorough")


# --- the numeric check ---


def test_correct_passes_are_right_on_given_and_on_made_up_inputs(program: Program) -> None:
    for inputs in (None, [torch.full((3, 6), 0.25) + torch.randn(3, 6)]):
        result = PassManager([CommuteAdd(), SpellLinear()], verify="numeric", inputs=inputs, checked=True).run(program)
        assert [report.verdict.kind for report in result.reports if report.verdict] == ["right", "right"]


@pytest.mark.parametrize("broken", [1, 2, 3, 4])
def test_a_dropped_bias_is_bisected_to_its_rewrite_and_rule(program: Program, broken: int) -> None:
    rewrite = rf"rewrite {broken} of 4, rule spell-linear \({place_of('spell-linear')}\)"
    message = rf"pass spell-linear breaks its contract \(exact\), first in {rewrite}: wrong: .*expected"
    with pytest.raises(ContractError, match=message) as caught:
        PassManager([CommuteAdd(), SpellLinear(broken)], verify="numeric").run(program)
    assert f"layers.{broken - 1}" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(SwapOperands(), "wrong: off by"), (ChangeEps(), "wrong: off by"), (RoundTrip(), "unstable: .* x as far from float64")],
    ids=lambda value: value.name if isinstance(value, Pass) else "",
)
def test_faults_of_every_kind_are_caught_after_a_correct_pass(program: Program, fault: Pass, kind: str) -> None:
    with pytest.raises(ContractError, match=rf"pass {fault.name} breaks its contract .* rewrite 1 of 1.*{kind}"):
        PassManager([SpellLinear(), fault], verify="numeric").run(program)


def test_structure_mode_does_not_look_at_numbers(program: Program) -> None:
    PassManager([SwapOperands()]).run(program)


def test_a_pass_that_changes_the_program_behind_the_rewriter_is_caught(program: Program) -> None:
    @dataclass(frozen=True)
    class Sneak(EachCall):
        name = "sneak"

        def visit(self, rewriter: Rewriter, node: Node) -> None:
            if node.target is aten.sub.Tensor:
                node.args = node.args[::-1]

    with pytest.raises(ContractError, match="pass sneak breaks its contract .*, without reporting a rewrite: wrong"):
        PassManager([Sneak()], verify="numeric").run(program)


def changing(contract: Contract, check: Callable[[Reference, Program], Verdict] | None = None) -> Pass:
    @dataclass(frozen=True)
    class Changing(SwapOperands):
        name = "changing"

        def check(self, reference: Reference, after: Program) -> Verdict:
            return check(reference, after) if check is not None else super().check(reference, after)

    Changing.contract = contract  # type: ignore[method-assign, assignment]
    return Changing()


def test_a_substitution_is_held_to_its_signature_and_later_passes_to_what_it_made(program: Program) -> None:
    result = PassManager([changing(Contract.SUBSTITUTION), CommuteAdd()], verify="numeric").run(program)
    assert [report.verdict.kind for report in result.reports if report.verdict] == ["unmeasured", "right"]


@pytest.mark.parametrize("contract", [Contract.BOUNDED, Contract.SUBSTITUTION])
def test_what_no_check_measured_is_called_so_and_has_no_figures(program: Program, contract: Contract) -> None:
    (report,) = PassManager([changing(contract)], verify="numeric").run(program).reports
    assert f"unmeasured: nothing holds changing to its contract ({contract}): override its method check" in str(report)
    assert "float64 error" not in str(report)


def test_a_pass_may_bring_its_own_check(program: Program) -> None:
    refuse = changing(Contract.BOUNDED, lambda reference, after: Verdict("wrong", "over budget"))
    with pytest.raises(ContractError, match=r"pass changing breaks its contract \(bounded\), .*: wrong: over budget"):
        PassManager([refuse], verify="numeric").run(program)


def test_an_inconclusive_check_is_reported_not_raised(program: Program) -> None:
    unsure = changing(Contract.BOUNDED, lambda reference, after: Verdict("inconclusive", "noise"))
    (report,) = PassManager([unsure], verify="numeric").run(program).reports
    assert report.verdict is not None and report.verdict.kind == "inconclusive"


def test_inputs_that_the_program_refuses_are_the_callers_mistake(program: Program) -> None:
    with pytest.raises(InputError, match="the program fails on the example inputs"):
        PassManager([CommuteAdd()], verify="numeric", inputs=[torch.randn(3, 5)]).run(program)


def test_a_pass_that_returns_nothing_is_named():
    class Forgetful(Pass):
        name, contract = "forgetful", Contract.EXACT

        def run(self, rewriter):
            return None

    with pytest.raises(PassError, match=r"^pass forgetful returned None from run: return an Outcome, such as Outcome\(\)"):
        PassManager([Forgetful()]).run(capture(torch.nn.ReLU(), (torch.randn(2),)))


# --- the order of the numeric check, and what it runs ---


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Each unperturbed run of the check as it is made: (id of the program's text, whether in float64)."""
    from graphwright.passes import check

    made: list[tuple[int, bool]] = []
    run = check.run

    def counted(program: Program, inputs, *, states=None, observe=None):
        if observe is None:
            made.append((hash(str(program)), any(w.dtype == torch.float64 for w in program.weights.values())))
        return run(program, inputs, states=states, observe=observe)

    monkeypatch.setattr(check, "run", counted)
    return made


def test_a_pass_that_fails_is_told_before_anything_is_run(program: Program, runs: list) -> None:
    with pytest.raises(PassError, match="pass failing .* failed: TypeError: 'x'"):
        PassManager([CommuteAdd(), SpellLinear(), failing(TypeError("'x'"))], verify="numeric").run(program)
    assert runs == []


def test_a_pass_that_fails_is_told_before_an_earlier_one_that_breaks_its_contract(program: Program) -> None:
    with pytest.raises(PassError, match=r"pass failing \(after swap-operands\) failed"):
        PassManager([SwapOperands(), failing(TypeError("x"))], verify="numeric").run(program)


def test_of_two_passes_that_break_their_contract_the_first_is_named(program: Program) -> None:
    with pytest.raises(ContractError, match="pass spell-linear breaks its contract .* rewrite 3 of 4"):
        PassManager([CommuteAdd(), SpellLinear(3), ChangeEps()], verify="numeric").run(program)
    with pytest.raises(ContractError, match="pass change-eps breaks its contract .* rewrite 1 of 1"):
        PassManager([CommuteAdd(), ChangeEps(), SpellLinear(3)], verify="numeric").run(program)


def test_each_program_is_run_once_in_each_precision(program: Program, runs: list) -> None:
    exact_rule = changing(Contract.SUBSTITUTION, lambda reference, after: replace(reference.judge_exact(after), kind="right"))
    idle = EachCall()
    PassManager([SpellLinear(), idle, exact_rule, CommuteAdd(), idle], verify="numeric").run(program)
    assert len(runs) == len(set(runs)) == 2 * 4  # the captured one and three that changed


def test_other_inputs_are_tried_with_one_run_of_the_original(program: Program, runs: list) -> None:
    @dataclass(frozen=True)
    class Unsure(SpellLinear):
        def check(self, reference: Reference, after: Program) -> Verdict:
            return replace(super().check(reference, after), kind="inconclusive")

    @dataclass(frozen=True)
    class UnsureAdd(CommuteAdd):
        def check(self, reference: Reference, after: Program) -> Verdict:
            return replace(super().check(reference, after), kind="inconclusive")

    PassManager([UnsureAdd(), Unsure()], verify="numeric").run(program)
    captured = [made for made in runs if made[0] == hash(str(program))]
    assert len(captured) == 3  # one on each of the three sets of inputs


def test_the_outputs_of_a_judged_program_are_let_go(program: Program) -> None:
    held: list[Reference] = []

    @dataclass(frozen=True)
    class Watched(CommuteAdd):
        def check(self, reference: Reference, after: Program) -> Verdict:
            held.append(reference)
            return super().check(reference, after)

    PassManager([Watched()], verify="numeric").run(program)
    assert held[0]._judged is None


def test_progress_of_the_numeric_check_counts_passes_that_are_checked(program: Program) -> None:
    told: list[tuple[int, int, str]] = []
    PassManager([CommuteAdd(), SpellLinear()], verify="numeric", progress=lambda *step: told.append(step)).run(program)
    ran = [(0, 2, "commute-add"), (0, 2, "spell-linear")]
    assert told == [*ran, (0, 2, "checking commute-add"), (1, 2, "checking spell-linear"), (2, 2, "")]
