"""Random programs and inputs of `graphwright.testing`: well typed, runnable, the same for the same decisions, and shrinkable."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from graphwright.ir import Program, parse, verify
from graphwright.ir.calls import name_of
from graphwright.ir.errors import InputError
from graphwright.ir.op import REGISTRY
from graphwright.ir.run import run
from graphwright.testing import input_sets, inputs_for, programs
from graphwright.testing.builder import MAX_ELEMENTS, Builder, Rejected
from graphwright.testing.choices import RandomChoices
from graphwright.testing.ops import MAKERS
from graphwright.testing.programs import random_program
from graphwright.testing.values import numel

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(max_examples=25, suppress_health_check=list(HealthCheck), derandomize=True)


def made(seed: int, **options) -> Program:
    return random_program(RandomChoices(random.Random(seed)), **options)


def calls(program: Program) -> list[str]:
    return [name_of(node.target) for node in program.main.calls]


@given(programs())
@few
def test_a_program_keeps_every_rule_of_the_ir_and_its_text_parses_back(program: Program) -> None:
    verify(program)
    again = parse(str(program), weights=program.weights)
    assert again == program and str(again) == str(program)


@given(programs(max_nodes=6), st.integers(0, 50))
@few
def test_it_runs_on_plain_and_hard_inputs_at_all_sizes_of_its_symbols(program: Program, seed: int) -> None:
    types = [value.dtype if isinstance(value, torch.Tensor) else None for value in program.main.signature().outputs]
    for inputs in input_sets(program, seed):
        outputs, states = run(program, inputs)
        assert [value.dtype if isinstance(value, torch.Tensor) else None for value in outputs] == types
        assert states.keys() == set(program.main.signature().new_states)


def test_what_plain_inputs_give_is_finite_but_where_a_mask_hides_all() -> None:
    """Intervals keep operands where operations are defined."""
    for seed in range(40):
        program = made(seed, ops=("elementwise", "reductions", "norms", "products"))
        for value in run(program, inputs_for(program, seed))[0]:
            assert not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(value.isfinite().all()), program


@pytest.mark.parametrize("family", sorted(MAKERS))
def test_every_maker_of_a_family_makes_calls(family: str) -> None:
    for maker in dict.fromkeys(MAKERS[family]):
        for seed in range(60):
            builder = Builder(RandomChoices(random.Random(seed)), dynamic=family == "sizes")
            if family == "sizes":
                builder.input((*builder.symbolic(), 4))
            try:
                maker(builder)
            except Rejected:
                continue
            if builder.calls:
                break
        else:
            pytest.fail(f"{maker.__name__} fits nothing in 60 programs")


def test_the_dialect_is_covered_whole_but_for_what_onnxruntime_computes() -> None:
    missing = {f"gw.{name}.default" for name in REGISTRY}
    for seed in range(150):
        missing -= set(calls(made(seed, ops=("dialect", "attention"), max_nodes=4)))
        if len(missing) == 1:
            break
    assert missing == {"gw.onnx_node.default"}


def test_programs_have_what_real_ones_have() -> None:
    """Each of these in some of 600 programs: specs/trust.md, 3.3 and 3.4."""
    wanted = {"symbols", "states", "several outputs", "an input as output", "one value twice", "a constant as output", "dead code",
              "a shared weight", "a tensor without elements", "odd sizes", "other strides", "torch.float32", "torch.float64",
              "torch.bfloat16", "torch.float16", "torch.int64", "torch.int32", "torch.int8", "torch.uint8", "torch.bool"}  # fmt: skip
    found: Counter[str] = Counter()
    for seed in range(600):
        if wanted <= (+found).keys():
            break
        program = made(seed, max_nodes=6)
        signature, outputs = program.main.signature(), program.main.outputs
        tensors = [a.value for a in signature.inputs if isinstance(a.value, torch.Tensor)]
        found["symbols"] += bool(program.used_symbols())
        found["states"] += bool(signature.states)
        found["several outputs"] += len(outputs) > 1
        found["an input as output"] += any(isinstance(leaf, torch.fx.Node) and leaf.op == "placeholder" for leaf in outputs)
        found["one value twice"] += len({id(leaf) for leaf in outputs}) < len(outputs)
        found["a constant as output"] += any(not isinstance(leaf, torch.fx.Node) for leaf in outputs)
        found["dead code"] += any(not node.users for node in program.main.calls)
        found["a shared weight"] += any(len(node.users) > 1 for node in program.nodes() if node.op == "get_attr")
        found["a tensor without elements"] += any(0 in value.shape for value in tensors)
        found["odd sizes"] += any(isinstance(n, int) and n > 30 and n % 2 for value in tensors for n in value.shape)
        found["other strides"] += any(not value.is_contiguous() for value in tensors)
        found |= Counter(str(value.dtype) for value in tensors)
    assert wanted - (+found).keys() == set()


def test_families_can_be_chosen() -> None:
    elementwise = {name for seed in range(20) for name in calls(made(seed, ops=["elementwise"]))}
    assert not elementwise & {"aten.linear.default", "aten.view.default", "aten.sum.dim_IntList"}
    with pytest.raises(
        InputError, match="convs is neither an operation, such as aten.relu.default, nor a family: these are attention, conv"
    ):
        made(0, ops=["convs"])


@pytest.mark.parametrize("name", ["aten.relu.default", "aten.sub.Tensor", "aten.hypot.default", "aten.cat.default", "aten.cummax.default"])
def test_single_operations_can_be_chosen_by_name(name: str) -> None:
    assert {call for seed in range(10) for call in calls(made(seed, ops=[name]))} - {"getitem"} == {name}


def test_values_stay_small_enough_to_run_often() -> None:
    for seed in range(40):
        for node in made(seed).main.calls:
            if isinstance(node.meta["val"], torch.Tensor):
                assert numel(node.meta["val"].shape) <= MAX_ELEMENTS


def test_equal_decisions_give_equal_programs_and_inputs() -> None:
    for seed in range(10):
        one, two = made(seed), made(seed)
        assert str(one) == str(two)
        assert str(inputs_for(one, seed, "hard")) == str(inputs_for(two, seed, "hard"))


def test_a_program_shrinks_to_what_matters() -> None:
    smallest = find(programs(ops=["elementwise", "shapes"]), lambda p: "aten.exp.default" in calls(p), settings=settings(max_examples=400))
    assert len(calls(smallest)) <= 2 and len(smallest.main.outputs) == 1


# --- inputs ---


def lines(text: str) -> Program:
    return parse(f"graphwright 1\n{text}\n")


BOTH = lines("""symbol s0 in [2, 12] hint 3
function main {
  takes ((*, *, *), {})
  gives *
  input %x : f32[5, 4]
  input %y : f32[5, 4]
  input %z : f32[s0, 4]
  %0 = aten.add.Tensor(%x, %y)
  return %0
}""")


def test_hard_inputs_hold_the_rows_that_networks_stumble_over() -> None:
    rows = torch.cat([inputs_for(BOTH, seed, "hard")[0] for seed in range(6)])
    is_constant = (rows == rows[:, :1]).all(1)
    assert (is_constant & (rows[:, 0] == 0.5)).any() and (rows == 0).all(1).any()
    assert (rows.min(1).values > 50).any()
    tiny = torch.finfo(torch.float32).tiny
    assert ((rows.abs() > 0) & (rows.abs() < tiny)).any()
    assert ((rows == 0) & rows.signbit()).any()


def test_plain_inputs_have_several_scales_and_one_tensor_twice_now_and_then() -> None:
    scales = {round(inputs_for(BOTH, seed)[0].std().log10().item()) for seed in range(3)}
    assert scales == {-2, 0, 1}
    assert inputs_for(BOTH, 3)[0] is inputs_for(BOTH, 3)[1] or any((v := inputs_for(BOTH, s))[0] is v[1] for s in range(8))


def test_symbols_stand_at_capture_and_at_both_ends_and_inside() -> None:
    sizes = [inputs[2].size(0) for inputs in input_sets(BOTH)]
    assert sizes == [3, 3, 2, 12, 5]


@pytest.mark.parametrize("stride", [(0, 1), (8, 2), (1, 3)])
def test_an_input_lies_in_memory_as_it_is_declared(stride: tuple[int, int]) -> None:
    program = lines(f"function main {{\n  takes ((*), {{}})\n  gives *\n  input %x : f32[3, 4] strides {list(stride)}\n  return %x\n}}")
    assert all(inputs_for(program, seed, kind)[0].stride() == stride for seed in range(3) for kind in ("plain", "hard"))


def test_a_narrow_integer_names_places_that_it_can_hold() -> None:
    program = lines("""function main {
  takes ((*, *), {})
  gives *
  input %x : f32[300]
  input %i : i8[64]
  %0 = aten._to_copy.default(%i, dtype=i64)
  %1 = aten.index_select.default(%x, 0, %0)
  return %1
}""")
    assert all(int(inputs_for(program, seed)[1].min()) >= 0 for seed in range(5))


def test_an_unknown_kind_of_inputs_is_an_error() -> None:
    with pytest.raises(InputError, match="inputs are plain or hard, not odd"):
        inputs_for(BOTH, kind="odd")
