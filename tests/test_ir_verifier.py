"""The verifier: one broken program a rule; each error names the rule, the user's line, and shows the lines around it."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from graphwright import ir
from graphwright.ir.errors import VerifyError
from graphwright.ir.program import Function, region_of
from graphwright.ir.tree import flat
from graphwright.ir.verifier import _same_constants

ATEN = torch.ops.aten


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(4))

    def forward(self, x):
        self.steps.add_(1)
        y = self.proj(x)
        return (y.relu() * 2).view(24)


@functools.cache
def captured() -> ir.Program:
    return ir.capture(Model(), (torch.ones(6, 4),))


def model() -> ir.Program:
    return captured().copy()


REGION = """graphwright 1
weight @w : f32[3, 4] parameter "?"

function main {
  takes ((*), {})
  gives (*)
  input %x : f32[6, 4]
  %0 = gw.sliced(%x, @w) in_dims=[0, -1] out_dims=[0] count=4 {  # [0,1] model.py:7 ffn
    input %1 : f32[2, 4]
    input %2 : f32[3, 4]
    %3 = aten.linear.default(%1, %2)  # [0] model.py:7 ffn
    %4 = aten.relu.default(%3)  # [1] model.py:8 ffn
    return %4
  }
  %5 = getitem(%0, 0)  # [1] model.py:8 ffn
  return %5
}
"""


def broken(program: ir.Program, message: str) -> VerifyError:
    with pytest.raises(VerifyError, match=message) as caught:
        ir.verify(program)
    return caught.value


def call(program: ir.Program, target: object) -> ir.Node:
    return next(node for node in program.main.calls if node.target is target)


def fresh(program: ir.Program, target: object, args: tuple, val: object = None) -> ir.Node:
    """A raw node before the output, behind the Rewriter's back."""
    graph = program.main.graph
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(target, args)
    node.meta.update(val=val, origin=(), where=program.main.calls[0].meta["where"])
    return node


def test_a_captured_program_and_a_region_hold_every_rule() -> None:
    ir.verify(model())
    ir.verify(ir.parse(REGION))


# --- one broken program a rule of calls ---


def moved_up(p: ir.Program) -> None:
    p.main.placeholders[0].append(call(p, ATEN.relu.default))


def foreign(p: ir.Program) -> None:
    call(p, ATEN.relu.default).args = (call(model(), ATEN.linear.default),)


def unknown(p: ir.Program) -> None:
    call(p, ATEN.relu.default).target = math.sin


def mutating(p: ir.Program) -> None:
    call(p, ATEN.relu.default).target = ATEN.relu_.default


def training(p: ir.Program) -> None:
    view = call(p, ATEN.view.default)
    view.target, view.args = ATEN.instance_norm.default, (view.args[0], None, None, *[view.args[0]] * 2, True, 0.1, 1e-5, False)


def no_metadata(p: ir.Program) -> None:
    del call(p, ATEN.relu.default).meta["val"]


def stale_shape(p: ir.Program) -> None:
    relu = call(p, ATEN.relu.default)
    with p.symbols.inference():
        relu.meta["val"] = torch.empty(6, 5)


def stale_dtype(p: ir.Program) -> None:
    relu = call(p, ATEN.relu.default)
    with p.symbols.inference():
        relu.meta["val"] = torch.empty(6, 4, dtype=torch.float16)


def stale_strides(p: ir.Program) -> None:
    relu = call(p, ATEN.relu.default)
    with p.symbols.inference():
        relu.meta["val"] = torch.empty_strided((6, 4), (1, 6))


def no_type(p: ir.Program) -> None:
    view = call(p, ATEN.view.default)
    view.args = (view.args[0], [25])


def stale_alias(p: ir.Program) -> None:
    view = call(p, ATEN.view.default)
    with p.symbols.inference():
        view.meta["val"] = torch.empty(24)


CALLS: list[tuple[Callable[[ir.Program], None], str]] = [
    (moved_up, "aten.relu.default uses aten.linear.default before it is defined, or from outside its function"),
    (foreign, "aten.relu.default uses aten.linear.default before it is defined, or from outside its function"),
    (unknown, "is not an operation of the IR"),
    (mutating, "aten.relu_.default writes to an operand: programs are functional"),
    (training, "aten.instance_norm.default writes to an operand: programs are functional"),
    (no_metadata, "aten.relu.default has no metadata"),
    (stale_shape, r"aten.relu.default is stored as f32\[6, 5\] but computes f32\[6, 4\]"),
    (stale_dtype, r"aten.relu.default is stored as f16\[6, 4\] but computes f32\[6, 4\]"),
    (stale_strides, r"aten.relu.default is stored as f32\[6, 4\] strides \[1, 6\] but computes f32\[6, 4\]"),
    (no_type, "aten.view.default does not type-check"),
    (stale_alias, "aten.view.default is stored as aliasing other operands than it does"),
]


@pytest.mark.parametrize(("damage", "message"), CALLS, ids=[damage.__name__ for damage, _ in CALLS])
def test_a_broken_call_is_named_with_the_users_line(damage: Callable[[ir.Program], None], message: str) -> None:
    program = model()
    damage(program)
    error = broken(program, message)
    assert "test_ir_verifier.py:" in str(error)


@pytest.mark.parametrize(("damage", "message"), [c for c in CALLS if c[0] in (mutating, stale_shape, no_type, stale_alias)])
def test_the_lines_around_a_broken_call_are_a_note(damage: Callable[[ir.Program], None], message: str) -> None:
    program = model()
    damage(program)
    (note,) = broken(program, message).__notes__
    assert 2 <= len(note.splitlines()) <= 5 and " = aten." in note and "test_ir_verifier.py:" in note


def test_damage_after_a_program_was_verified_is_still_found() -> None:
    for damage, message in CALLS:
        program = model()
        ir.verify(program)
        damage(program)
        broken(program, message)


@pytest.mark.parametrize(("before", "after"), [(2, 2.0), (2, True), (0.0, -0.0), ([2], [2.0]), (2, [2]), (float("nan"), 2.0)])
def test_a_constant_of_another_type_is_another_program(before: object, after: object) -> None:
    assert not _same_constants((before, {"alpha": 1}), (after, {"alpha": 1}))
    assert not _same_constants((1, {"alpha": before}), (1, {"alpha": after}))
    assert _same_constants(([before], {"alpha": after}), ([before], {"alpha": after}))


def test_a_scalar_that_changes_its_type_after_the_program_was_verified_is_found() -> None:
    text = "graphwright 1\nfunction main {\n takes ((*), {})\n gives (*)\n input %a : i64[2]\n %0 = aten.mul.Scalar(%a, 2)\n return %0\n}"
    program = ir.parse(text)
    ir.verify(program)
    node = program.main.calls[0]
    node.args = (node.args[0], 2.0)
    broken(program, r"aten.mul.Scalar is stored as i64\[2\] but computes f32\[2\]")


# --- structure ---


def test_a_program_needs_main() -> None:
    program = model()
    program.functions["other"] = program.functions.pop("main")
    broken(program, "a program needs a function main")


@pytest.mark.parametrize("data", [float("inf"), {"a": [float("nan")]}, torch.ones(2)], ids=["inf", "nan", "tensor"])
def test_a_schedule_is_data_that_text_can_hold(data: object) -> None:
    program = model()
    program.schedules["steps"] = data
    broken(program, "schedule steps is no plain data")


def test_a_function_needs_an_output() -> None:
    program = model()
    program.main.graph.erase_node(program.main.graph.output_node())
    broken(program, "a function has no output")


def test_nothing_follows_the_output() -> None:
    program = model()
    relu = call(program, ATEN.relu.default)
    node = fresh(program, ATEN.relu.default, (relu,), relu.meta["val"])
    program.main.graph.output_node().append(node)
    broken(program, "a node follows the output")


def test_nodes_are_inputs_weights_calls_and_the_output() -> None:
    program = model()
    relu = call(program, ATEN.relu.default)
    with program.main.graph.inserting_before(relu):
        program.main.graph.call_method("sin", (relu.args[0],))
    broken(program, "a node of kind call_method has no place in the IR")


# --- weights ---


def test_a_weight_must_be_in_the_table() -> None:
    program = model()
    del program.weights["proj.bias"]
    broken(program, "weight proj.bias is not in the table")


@pytest.mark.parametrize("changed", [{"shape": (5,), "stride": (1,)}, {"dtype": torch.float16}, {"stride": (2,)}])
def test_a_weight_must_be_what_the_graph_takes_it_for(changed: dict) -> None:
    program = model()
    program.weights["proj.bias"] = replace(program.weights["proj.bias"], tensor=None, **changed)
    broken(program, "weight proj.bias is .* in the table but not in the graph")


def test_a_weights_tensor_must_be_what_its_entry_says() -> None:
    program = model()
    program.weights["proj.bias"] = replace(program.weights["proj.bias"], tensor=torch.zeros(5))
    broken(program, "weight proj.bias has a tensor that its entry does not describe")


def test_a_state_must_be_in_the_table_as_what_the_graph_takes_it_for() -> None:
    program = model()
    steps = program.weights["steps"]
    for changed, message in (
        ({"kind": "buffer"}, "state steps is a buffer in the table"),
        ({"shape": (5,)}, "weight steps is .* in the table but not in the graph"),
        ({"tensor": torch.zeros(5)}, "weight steps has a tensor that its entry does not describe"),
    ):
        program.weights["steps"] = replace(steps, **({"tensor": None} | changed))
        broken(program, message)
    del program.weights["steps"]
    broken(program, "weight steps is not in the table")


# --- the signature ---


def test_the_trees_have_a_leaf_for_each_input_and_output() -> None:
    program = model()
    main = program.main
    program.functions["main"] = Function("main", main.graph, flat(2), main.out_tree)
    broken(program, "main has 1 inputs but its tree has 2")
    program.functions["main"] = Function("main", main.graph, main.in_tree, flat(3))
    broken(program, "main returns 1 values but its tree has 3")


def test_new_states_are_states() -> None:
    program = model()
    program.main.graph.output_node().meta["new_states"] = ("nowhere",)
    broken(program, "main gives a new value to nowhere, which is no state of it")


STATE = """graphwright 1
weight @s : f32[3] state "?"

function main {
  takes ((*), {})
  gives (*)
  state %s : f32[3]
  input %x : f32[3]
  %0 = aten.add.Tensor(%s, %x)
  %1 = aten.sum.default(%0)
  %2 = aten._to_copy.default(%0, dtype=f64)
  return %0 state NAME = NEW
}
"""


@pytest.mark.parametrize("name", ["s", '"input:x"'])
def test_a_new_state_is_a_tensor_of_its_states_type(name: str) -> None:
    ir.verify(ir.parse(STATE.replace("NAME = NEW", f"{name} = %0")))
    for new in ("5", "none", "%1", "%2"):
        broken(ir.parse(STATE.replace("NAME = NEW", f"{name} = {new}")), "a new value that is not of its dtype, shape and device")


def test_a_state_has_one_new_value() -> None:
    with pytest.raises(ir.errors.ParseError, match="line 12, column 27: s gets two new values"):
        ir.parse(STATE.replace("NAME = NEW", "s = %0, s = %0"))
    program = ir.parse(STATE.replace("NAME = NEW", "s = %0"))
    output = program.main.graph.output_node()
    output.args, output.meta["new_states"] = (output.args[0] + output.args[0][1:],), ("s", "s")
    broken(program, "main gives two new values to one state")


def test_an_output_is_a_value_or_a_constant() -> None:
    broken(ir.parse(STATE.replace("%0 state NAME = NEW", "[%0]")), "main returns a list of values: each is an output of its own")


def test_a_function_takes_arguments_and_named_ones() -> None:
    program = model()
    main = program.main
    program.functions["main"] = Function("main", main.graph, flat(1), main.out_tree)
    broken(program, "main takes no call: its tree is a tuple of arguments and a dict of named ones")


def test_inputs_have_names_of_their_own() -> None:
    program = ir.parse(
        "graphwright 1\nfunction main {\n takes ((*, *), {})\n gives (*)\n input %a : f32[2]\n input %b : f32[2]\n"
        " %0 = aten.add.Tensor(%a, %b)\n return %0\n}"
    )
    program.main.placeholders[1].target = "a"
    broken(program, "main has two inputs of one name")


# --- regions ---


def region() -> tuple[ir.Program, ir.Node]:
    program = ir.parse(REGION)
    return program, program.main.calls[0]


def with_args(node: ir.Node, **changed: object) -> None:
    names = ("body", "in_dims", "out_dims", "count")
    node.args = tuple(changed.get(name, value) for name, value in zip(names, node.args)) + node.args[4:]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"in_dims": [0]}, "gw.sliced does not type-check: it has other numbers of operands, dims or outputs than its body"),
        ({"out_dims": [0, 0]}, "gw.sliced does not type-check: it has other numbers of operands, dims or outputs than its body"),
        ({"in_dims": [-1, -1]}, "it slices no operand"),
        ({"count": 7}, "it has count 7 for 6 units"),
        ({"count": 0}, "it has count 0 for 6 units"),
        ({"count": 3}, r"gw.sliced"),
        ({"out_dims": [1]}, "gw.sliced"),
    ],
    ids=["in_dims", "out_dims", "nothing sliced", "count too high", "count too low", "", "wrong out dim"],
)
def test_a_broken_region_is_named_with_the_users_line(changed: dict, message: str) -> None:
    program, node = region()
    with_args(node, **changed)
    if changed == {"count": 3}:
        ir.verify(program)  # slices of exactly 2 units: the body fits
        return
    assert "model.py:7 ffn" in str(broken(program, message))


def test_units_divide_every_sliced_dim() -> None:
    program, node = region()
    node.kwargs = {"units": 4}
    broken(program, "it cuts dim 0 of size 6 into 4 units")


SQUARE = """graphwright 1

function main {
  takes ((*), {})
  gives (*)
  input %x : f32[4, 4]
  %0 = gw.sliced(%x) in_dims=[0] out_dims=[0] count=2 units=4 orders=[[0, 1]] {
    input %1 : f32[2, 4]
    %2 = aten.relu.default(%1)
    return %2
  }
  %3 = getitem(%0, 0)
  return %3
}
"""


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        ("input %1 : f32[2, 4]", "input %1 : f32[3, 4]", r"input 0 of its body is f32\[3, 4\], but its operand has f32\[2, 4\] there"),
        ("input %1 : f32[2, 4]", "input %1 : i64[2, 4]", r"input 0 of its body is i64\[2, 4\], but"),
        ("in_dims=[0]", "in_dims=[2]", "in_dims has 2 for an operand of 2 dims"),
        ("in_dims=[0]", "in_dims=[-2]", "in_dims has -2 for an operand of 2 dims"),
        ("in_dims=[0]", "in_dims=[false]", "in_dims and out_dims are lists of integers"),
        ("out_dims=[0]", "out_dims=[-1]", "out_dims has -1 for output 0, which has 2 dims"),
        ("out_dims=[0]", "out_dims=[2]", "out_dims has 2 for output 0, which has 2 dims"),
        ("out_dims=[0]", "out_dims=%x", "in_dims and out_dims are lists of integers"),
        ("count=2", "count=true", "count is an integer or a size of the program, not a bool"),
        ("count=2", "count=%x", "count is an integer or a size of the program, not a FakeTensor"),
        ("count=2", "count=-1", "it has count -1 for 4 units"),
        ("units=4", "units=3", "it cuts dim 0 of size 4 into 3 units"),
        ("units=4", "units=0", "it has 0 units"),
        ("units=4", "units=4.0", "units is an integer or a size of the program, not a float"),
        ("orders=[[0, 1]]", "orders=[]", r"orders has a list of dims for each of 1 outputs, and this is \[\]"),
        ("orders=[[0, 1]]", "orders=[[0, 0]]", r"orders has \[0, 0\] for output 0, which has 2 dims"),
        ("orders=[[0, 1]]", "orders=[[0, -1]]", r"orders has \[0, -1\] for output 0, which has 2 dims"),
    ],
)
def test_a_regions_numbers_and_inputs_fit_its_operands(written: str, instead: str, message: str) -> None:
    ir.verify(ir.parse(SQUARE))
    with pytest.raises(ir.errors.ParseError, match=f"line 8, column 5: gw.sliced does not type-check: {message}"):
        ir.parse(SQUARE.replace(written, instead))


def test_an_edited_region_holds_the_same_rules() -> None:
    program = ir.parse(SQUARE)
    with program.symbols.inference():
        program.main.placeholders[0].meta["val"] = torch.empty(8, 4)
    broken(program, r"gw.sliced does not type-check: input 0 of its body is f32\[2, 4\], but its operand has f32\[4, 4\] there")


def test_a_region_reads_weights_as_operands_only() -> None:
    program, node = region()
    body = region_of(node).graph
    first = next(n for n in body.nodes if n.op == "call_function")
    with body.inserting_before(first):
        weight = body.create_node("get_attr", "w")
    weight.meta["val"] = first.args[1].meta["val"]
    broken(program, "a region reads weight w directly: pass it as an operand")


def test_a_region_captures_nothing() -> None:
    program, node = region()
    first = next(n for n in region_of(node).graph.nodes if n.op == "call_function")
    first.args = (program.main.placeholders[0], first.args[1])
    broken(program, "before it is defined, or from outside its function")


@pytest.mark.parametrize(
    ("target", "args"), [(ATEN.bernoulli.default, ()), (ATEN.dropout.default, (0.5, True))], ids=["bernoulli", "dropout"]
)
def test_a_region_draws_nothing(target: object, args: tuple) -> None:
    program, node = region()
    relu = next(n for n in region_of(node).graph.nodes if n.target is ATEN.relu.default)
    relu.target, relu.args = target, (relu.args[0], *args)
    broken(program, "may not stand inside a region")


def test_regions_are_not_nested() -> None:
    with pytest.raises((VerifyError, ir.errors.ParseError), match="may not stand inside a region|does not type-check"):
        inner = "    %3 = gw.sliced(%1) in_dims=[0] out_dims=[0] count=1 {\n      input %6 : f32[2, 4]\n      %7 = aten.relu.default(%6)\n"
        inner += "      return %7\n    }\n    %8 = getitem(%3, 0)\n    return %8\n"
        begin, end = REGION.index("    %3"), REGION.index("  }\n  %5")
        ir.verify(ir.parse(REGION[:begin] + inner + REGION[end:]))


def test_an_output_depends_on_the_slice() -> None:
    text = (
        REGION.replace("aten.linear.default(%1, %2)", "aten.linear.default(%2, %2)")
        .replace("count=4", "count=6")
        .replace("f32[2, 4]", "f32[1, 4]")
    )
    broken(ir.parse(text), "output 0 of gw.sliced does not depend on the slice: compute it outside")


def test_a_body_holds_for_its_shorter_slices_too() -> None:
    text = REGION.replace("aten.relu.default(%3)", "aten.view.default(%3, [2, 3])")
    assert "model.py:7 ffn" in str(broken(ir.parse(text), "the body of gw.sliced fails on a slice of 1 units"))


def test_random_outputs_of_fx_are_not_trusted() -> None:
    program = ir.Program([Function("main", fx.Graph(), flat(0), flat(0))], {}, ir.SymbolTable())
    broken(program, "a function has no output")
