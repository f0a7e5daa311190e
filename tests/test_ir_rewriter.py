"""The Rewriter: edits happen in steps, steps are recorded and paid for, and provenance and metadata survive every edit."""

import functools
import inspect

import pytest
import torch
from torch import nn

from graphwright import ir
from graphwright.ir.errors import VerifyError
from graphwright.ir.float64 import to_float64
from graphwright.ir.infer import storage_key
from graphwright.ir.rewriter import RegionBuilder
from graphwright.ir.run import run

ATEN = torch.ops.aten


class Chain(nn.Module):
    def forward(self, x):
        y = x + 1
        z = y * 2
        return z.relu()


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


@functools.cache
def captured() -> ir.Program:
    return ir.capture(Chain(), (torch.ones(6, 4),))


def chain() -> ir.Program:
    return captured().copy()


def named(program: ir.Program, target: object) -> ir.Node:
    return next(node for node in program.main.calls if node.target is target)


def square_instead_of_double(rewriter: ir.Rewriter) -> ir.Node:
    """mul(y, 2) -> add(y, y)."""
    mul = named(rewriter.program, ATEN.mul.Tensor)
    new = rewriter.insert(ATEN.add.Tensor, (mul.args[0], mul.args[0]), before=mul, origin=mul)
    rewriter.replace(mul, new)
    return new


# --- records and provenance ---


def test_a_step_records_its_rule_place_and_what_it_changed() -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example")
    line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
    with rewriter.step("double"):
        square_instead_of_double(rewriter)
    (record,) = rewriter.records
    assert (record.pass_name, record.rule, record.line) == ("example", "double", line)
    assert record.file == "test_ir_rewriter.py"  # from the root of its package, wherever that is installed
    assert len(record.before) == len(record.after) == 1
    assert record.before[0].startswith("aten.mul.Tensor [1]") and record.after[0].startswith("aten.add.Tensor [1]")
    assert "test_ir_rewriter.py:" in record.before[0] and record.microseconds > 0


def test_a_new_node_descends_from_its_origins_and_keeps_their_line() -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example")
    mul = named(rewriter.program, ATEN.mul.Tensor)
    origin, where = mul.meta["origin"], mul.meta["where"]
    with rewriter.step("double"):
        new = square_instead_of_double(rewriter)
    assert new.meta["origin"] == origin and new.meta["where"] == where and where.line > 0


def test_a_node_that_takes_anothers_place_descends_from_both() -> None:
    program = chain()
    rewriter = ir.Rewriter(program, pass_name="example")
    add, mul = program.main.calls[:2]
    with rewriter.step("merge"):
        new = rewriter.insert(ATEN.add.Scalar, (add.args[0], 3), before=mul, origin=add)
        rewriter.replace(mul, new)
    assert new.meta["origin"] == (0, 1)
    assert [node.target for node in program.main.calls] == [ATEN.add.Scalar, ATEN.relu.default]


def test_replacing_erases_what_only_the_old_value_needed() -> None:
    program = ir.capture(FeedForward(), (torch.ones(6, 4),))
    rewriter = ir.Rewriter(program, pass_name="example")
    down = program.main.calls[-2]
    with rewriter.step("cut"):
        new = rewriter.insert(ATEN.relu.default, (program.main.placeholders[0],), before=down, origin=down)
        rewriter.replace(down, new)
    ir.verify(program)
    assert [str(node.target) for node in program.main.graph.nodes if node.op != "output"] == ["x", "aten.relu.default", "aten.add.Tensor"]
    assert len(rewriter.records[0].before) == 3


# --- fuel ---


def test_fuel_stops_after_exactly_that_many_rewrites() -> None:
    class Many(nn.Module):
        def forward(self, x):
            return ((((x * 2) * 2) * 2) * 2) * 2

    many = ir.capture(Many(), (torch.ones(3),))

    def spend(fuel: ir.Fuel) -> tuple[int, ir.Program]:
        program = many.copy()
        rewriter = ir.Rewriter(program, pass_name="example", fuel=fuel)
        try:
            for node in rewriter.nodes():
                with rewriter.step("double"):
                    new = rewriter.insert(ATEN.add.Tensor, (node.args[0], node.args[0]), before=node, origin=node)
                    rewriter.replace(node, new)
        except ir.OutOfFuel:
            pass
        ir.verify(program)
        return len(rewriter.records), program

    for amount in range(7):
        fuel = ir.Fuel(amount)
        records, program = spend(fuel)
        assert records == fuel.spent == min(amount, 5)
        assert sum(node.target is ATEN.add.Tensor for node in program.main.calls) == min(amount, 5)
        assert torch.equal(run(program, [torch.ones(3)])[0][0], torch.full((3,), 32.0))
    assert spend(ir.Fuel())[0] == 5


@pytest.mark.parametrize("checked", [False, True])
def test_a_step_without_an_edit_is_no_rewrite(checked: bool) -> None:
    rewriter = ir.Rewriter(chain(), fuel=ir.Fuel(1), checked=checked)
    with rewriter.step("nothing to do"):
        pass
    assert not rewriter.changed and rewriter.fuel.spent == 0
    with rewriter.step("double"):
        square_instead_of_double(rewriter)
    assert len(rewriter.records) == rewriter.fuel.spent == 1


def test_no_fuel_is_noticed_before_anything_changes() -> None:
    rewriter = ir.Rewriter(chain(), fuel=ir.Fuel(0))
    before = str(rewriter.program)
    with pytest.raises(ir.OutOfFuel):
        with rewriter.step("double"):
            square_instead_of_double(rewriter)
    assert str(rewriter.program) == before and not rewriter.changed


# --- what is refused ---


@pytest.mark.parametrize(
    "edit",
    [
        lambda r, n: r.insert(ATEN.relu.default, (n,), before=n),
        lambda r, n: r.replace(n, n.args[0]),
        lambda r, n: r.erase(n),
        lambda r, n: r.set_arguments(n, n.args),
        lambda r, n: r.weight(ir.Weight.of("w", torch.ones(2))),
        lambda r, n: r.inline(n),
        lambda r, n: r.outline([n], RegionBuilder(r.symbols, 6, 3), [], 2),
    ],
    ids=["insert", "replace", "erase", "set_arguments", "weight", "inline", "outline"],
)
def test_edits_outside_a_step_are_refused(edit) -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example")
    before = str(rewriter.program)
    with pytest.raises(VerifyError, match="pass example edits the program outside a step"):
        edit(rewriter, rewriter.program.main.calls[1])
    assert str(rewriter.program) == before


def test_steps_do_not_nest() -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example")
    with pytest.raises(VerifyError, match="rule inner starts inside another rule of example"):
        with rewriter.step("outer"):
            with rewriter.step("inner"):
                pass


def test_a_call_that_does_not_type_check_is_not_inserted() -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example")
    x, mul = rewriter.program.main.placeholders[0], rewriter.program.main.calls[1]
    before = str(rewriter.program)
    with pytest.raises(VerifyError, match="pass example inserts a aten.mm.default that does not type-check"):
        with rewriter.step("bad"):
            rewriter.insert(ATEN.mm.default, (x, x), before=mul)
    assert str(rewriter.program) == before


def test_what_type_inference_refuses_is_said_by_our_error_alone(capfd) -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example")
    x = rewriter.program.main.placeholders[0]
    with pytest.raises(VerifyError), rewriter.step("bad"):
        rewriter.insert(ATEN.mm.default, (x, x), before=rewriter.program.main.calls[1])
    text = str(rewriter.program).replace("aten.relu.default(%1)", "aten.mm.default(%1, %1)")
    with pytest.raises(ir.errors.ParseError, match="aten.mm.default does not type-check"):
        ir.parse(text)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (ATEN.clamp_min, "inserts clamp_min: give an overload, such as torch.ops.aten.clamp_min.default"),
        (torch.relu, "inserts relu: give an overload, such as torch.ops.aten.relu.default"),
        ("aten.relu.default", "inserts aten.relu.default: give an overload, such as"),
        ([], r"inserts \[\]: give an overload, such as"),
    ],
)
def test_what_is_no_operation_is_not_inserted(target, message) -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example")
    before = str(rewriter.program)
    mul = rewriter.program.main.calls[1]
    with pytest.raises(VerifyError, match=f"pass example {message}"), rewriter.step("bad"):
        rewriter.insert(target, (mul.args[0], 0), before=mul)
    assert str(rewriter.program) == before


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_value_is_not_replaced_by_what_needs_it(times: int) -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example")
    _, mul, relu = rewriter.program.main.calls
    with pytest.raises(VerifyError, match=r"pass example replaces aten.mul.Tensor .*, which needs it: compute the new value"):
        with rewriter.step("wrap"):
            new = mul
            for _ in range(times):
                new = rewriter.insert(ATEN.neg.default, (new,), before=relu, origin=mul)
            rewriter.replace(mul, new)
    ir.verify(rewriter.program)


@pytest.mark.parametrize(
    ("target", "args", "shown"),
    [
        (ATEN._to_copy.default, {"dtype": torch.float64}, r"f64\[6, 4\]"),
        (ATEN.sum.dim_IntList, [0], r"f32\[4\]"),
        (ATEN.permute.default, [1, 0], r"f32\[4, 6\] strides \[1, 4\]"),
        (ATEN.clone.default, None, "f32"),
    ],
    ids=["dtype", "shape", "strides", "same"],
)
def test_a_value_is_replaced_by_one_of_its_own_type_only(target, args, shown) -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example")
    mul = rewriter.program.main.calls[1]

    def edit() -> None:
        with rewriter.step("replace"):
            call = ((mul.args[0], args), {}) if isinstance(args, list) else ((mul.args[0],), args or {})
            rewriter.replace(mul, rewriter.insert(target, *call, before=mul, origin=mul))

    if args is None:
        edit()
        ir.verify(rewriter.program)
        return
    with pytest.raises(
        VerifyError, match=rf"pass example replaces aten.mul.Tensor \[1\].* of type f32\[6, 4\] by {target} .*of type {shown}"
    ):
        edit()


def test_a_used_value_is_not_erased() -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example")
    with pytest.raises(VerifyError, match="erases aten.mul.Tensor .*, which is still used"):
        with rewriter.step("erase"):
            rewriter.erase(rewriter.program.main.calls[1])


def test_a_weight_joins_once_and_another_of_its_name_is_refused() -> None:
    program = chain()
    rewriter = ir.Rewriter(program, pass_name="example")
    mul = program.main.calls[1]
    with rewriter.step("add a weight"):
        ones = rewriter.weight(ir.Weight.of("ones", torch.ones(6, 4)))
        assert rewriter.weight(ir.Weight.of("ones", torch.ones(6, 4))) is ones
        new = rewriter.insert(ATEN.add.Tensor, (mul.args[0], ones), before=mul, origin=mul)
        rewriter.replace(mul, new)
    ir.verify(program)
    with pytest.raises(VerifyError, match="adds a weight ones, but the program has another of that name"):
        with rewriter.step("add another"):
            rewriter.weight(ir.Weight.of("ones", torch.zeros(6, 4)))


# --- checked mode ---


def test_checked_mode_catches_a_change_that_no_edit_reported() -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example", checked=True)
    with pytest.raises(VerifyError, match="rule sly of example changed the program without the Rewriter"):
        with rewriter.step("sly"):
            relu = rewriter.program.main.calls[2]
            relu.args = (rewriter.program.main.calls[0],)


def test_checked_mode_catches_an_edit_that_changed_nothing() -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example", checked=True)
    with pytest.raises(VerifyError, match="rule idle of example reports a rewrite but the program is the same"):
        with rewriter.step("idle"):
            mul = rewriter.program.main.calls[1]
            rewriter.set_arguments(mul, mul.args)


def test_checked_mode_has_nothing_to_say_about_an_honest_step() -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example", checked=True)
    with rewriter.step("double"):
        square_instead_of_double(rewriter)
    assert len(rewriter.records) == 1


# --- aliasing ---


def test_views_of_a_replaced_value_show_the_new_storage() -> None:
    class Views(nn.Module):
        def forward(self, x):
            return ((x * 2).view(24).unsqueeze(0)[:, :8], x)

    program = ir.capture(Views(), (torch.ones(6, 4),))
    rewriter = ir.Rewriter(program, pass_name="example")
    with rewriter.step("double"):
        new = square_instead_of_double_of_input(rewriter)
    ir.verify(program)
    views = [node for node in program.main.calls if node is not new]
    assert len(views) >= 3 and all(storage_key(node.meta["val"]) == storage_key(new.meta["val"]) for node in views)


def square_instead_of_double_of_input(rewriter: ir.Rewriter) -> ir.Node:
    mul = named(rewriter.program, ATEN.mul.Tensor)
    new = rewriter.insert(ATEN.add.Tensor, (mul.args[0], mul.args[0]), before=mul, origin=mul)
    rewriter.replace(mul, new)
    return new


def test_a_copy_replaced_by_its_source_makes_the_views_share_it() -> None:
    class Cloned(nn.Module):
        def forward(self, x):
            return (x.relu().clone().view(24), x)

    program = ir.capture(Cloned(), (torch.ones(6, 4),))
    relu, clone, view = program.main.calls
    rewriter = ir.Rewriter(program, pass_name="example")
    with rewriter.step("drop the copy"):
        rewriter.replace(clone, relu)
    ir.verify(program)
    assert storage_key(view.meta["val"]) == storage_key(relu.meta["val"])


# --- regions ---


def outline(program: ir.Program, count: int, dim: int = 0) -> ir.Node:
    rewriter = ir.Rewriter(program, pass_name="by-hand")
    calls, units = list(rewriter.nodes()), program.main.placeholders[0].meta["val"].size(dim)
    body, inner = RegionBuilder(rewriter.symbols, units, -(-units // count)), {}
    with rewriter.step("outline"):
        for node in calls:
            args, kwargs = torch.fx.map_arg(
                (node.args, node.kwargs), lambda o: inner[o] if o in inner else body.operand(o, -1 if o.op == "get_attr" else dim)
            )
            inner[node] = body.call(node.target, args, kwargs, like=node)
        region = rewriter.outline(calls, body, [(calls[-1], inner[calls[-1]], dim)], count)
    ir.verify(program)
    return region


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_outlining_then_inlining_gives_the_same_function(count: int) -> None:
    model, x = FeedForward(), torch.randn(6, 4)
    program = ir.capture(model, (x,))
    original = program.copy()
    region = outline(program, count)
    assert [node.target for node in program.main.calls][0] is ir.sliced
    expected = run(to_float64(original), [x.double()])[0][0]
    torch.testing.assert_close(run(to_float64(program), [x.double()])[0][0], expected, rtol=1e-13, atol=1e-13)  # sums of 6 terms in float64
    rewriter = ir.Rewriter(program, pass_name="by-hand")
    with rewriter.step("inline"):
        rewriter.inline(region)
    ir.verify(program)
    assert str(program) == str(original)
    assert torch.equal(run(program, [x])[0][0], run(original, [x])[0][0])


def test_a_region_descends_from_its_members_and_its_body_keeps_each() -> None:
    program = ir.capture(FeedForward(), (torch.ones(6, 4),))
    members = [(node.meta["origin"], node.meta["where"]) for node in program.main.calls]
    region = outline(program, 2)
    assert region.meta["origin"] == tuple(range(len(members)))
    body = ir.program.region_of(region)
    assert [(n.meta["origin"], n.meta["where"]) for n in body.graph.nodes if n.op == "call_function"] == members


def test_members_that_are_not_convex_are_refused() -> None:
    class Detour(nn.Module):
        def forward(self, x):
            y = x.relu()
            return y + y.softmax(0)

    program = ir.capture(Detour(), (torch.ones(6, 4),))
    relu, softmax, add = program.main.calls
    rewriter = ir.Rewriter(program, pass_name="example")
    body = RegionBuilder(rewriter.symbols, 6, 3)
    with pytest.raises(VerifyError, match="the members are not convex: aten.add.Tensor"):
        with rewriter.step("outline"):
            inner = body.call(relu.target, (body.operand(relu.args[0], 0),), like=relu)
            total = body.call(add.target, (inner, body.operand(softmax, 0)), like=add)
            rewriter.outline([relu, add], body, [(relu, inner, 0), (add, total, 0)], 2)


def test_only_a_region_is_inlined() -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example")
    with pytest.raises(VerifyError, match="aten.add.Tensor .* is no region"):
        with rewriter.step("inline"):
            rewriter.inline(rewriter.program.main.calls[0])


def test_nodes_skips_what_was_erased_or_inserted_meanwhile() -> None:
    rewriter = ir.Rewriter(chain(), pass_name="example")
    seen = []
    for node in rewriter.nodes():
        seen.append(node.target)
        if node.target is ATEN.add.Tensor:
            with rewriter.step("double"):
                square_instead_of_double(rewriter)
    assert seen == [ATEN.add.Tensor, ATEN.relu.default]


def test_a_copy_is_independent_of_its_program() -> None:
    program = chain()
    text, twin = str(program), program.copy()
    rewriter = ir.Rewriter(twin)
    with rewriter.step("double"):
        square_instead_of_double(rewriter)
    assert str(program) == text != str(twin)
