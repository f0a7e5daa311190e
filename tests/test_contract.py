"""The exact contract's check: the float64 program, the verdict rule row by row, and inputs made from a signature."""

import re
from typing import Any

import pytest
import torch

from graphwright.ir import Program, Weight, capture, parse
from graphwright.ir.calls import draws
from graphwright.ir.errors import InputError
from graphwright.ir.float64 import NoFloat64, RoundedWeight, to_float64
from graphwright.ir.run import run
from graphwright.ir.strides import laid_out
from graphwright.passes import Verdict, check_exact, random_inputs


def program(body: str, inputs: str = "%x : f32[4, 6]", gives: str = "*", **weights: torch.Tensor) -> Program:
    """A program of one function; each weight is declared as its tensor is."""
    table = [f'weight @{name} : {_type(tensor)} buffer "?"' for name, tensor in weights.items()]
    arguments = [f"  input {each.strip()}" for each in inputs.split(";") if each.strip()]
    takes = f"  takes (({', '.join('*' for _ in arguments)}), {{}})"
    text = ["graphwright 1", *table, "function main {", takes, f"  gives {gives}", *arguments, *body.splitlines(), "}"]
    return parse("\n".join(text), weights=weights)


def _type(tensor: torch.Tensor) -> str:
    short = {torch.float32: "f32", torch.int64: "i64", torch.bool: "bool", torch.bfloat16: "bf16"}[tensor.dtype]
    return f"{short}[{', '.join(map(str, tensor.shape))}]"


def verdict(before: str, after: str, inputs: str = "%x : f32[4, 6]", gives: str = "*", values: list[Any] | None = None) -> Verdict:
    original = program(before, inputs, gives)
    return check_exact(original, program(after, inputs, gives), random_inputs(original) if values is None else values)


def test_the_check_draws_the_same_numbers_for_both_and_leaves_all_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)
    state = torch.get_rng_state()
    drop = "%a = aten.dropout.default(%x, 0.5, true)\n"
    assert verdict(drop + "return %a", drop + "return %a").kind == "right"
    assert verdict(drop + "return %a", drop + "%b = aten.add.Scalar(%a, 1.0)\nreturn %b").kind == "wrong"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("dropout", "train", "is_random"), [(0.0, True, False), (0.5, False, False), (0.5, True, True)])
def test_a_recurrent_layer_draws_only_with_dropout_in_training(dropout: float, train: bool, is_random: bool) -> None:
    model = torch.nn.LSTM(3, 3, num_layers=2, dropout=dropout).train(train)
    calls = capture(model, (torch.ones(2, 1, 3),)).main.calls
    assert any(map(draws, calls)) == is_random


# --- the float64 program ---


def test_every_float_becomes_float64_and_integers_booleans_and_literals_stay() -> None:
    wide = to_float64(
        program(
            """
            %a = aten.mul.Tensor(%x, @w) : f32[4, 6]
            %b = aten._to_copy.default(%a, dtype=bf16) : bf16[4, 6]
            %c = aten.full.default([6], -3.4028234663852886e+38, dtype=f32) : f32[6]
            %d = aten.sum.dim_IntList(%b, [1], dtype=f32) : f32[4]
            %e = aten.ones.default([6]) : f32[6]
            %f = aten.arange.default(6) : i64[6]
            %g = aten.gt.Scalar(%x, 0.5) : bool[4, 6]
            return %b, %c, %d, %e, %f, %g""",
            gives="(*, *, *, *, *, *)",
            w=torch.ones(6),
        )
    )
    dtypes = [output.dtype for output in wide.main.signature().outputs]
    assert dtypes == [*[torch.float64] * 4, torch.int64, torch.bool]
    outputs, _ = run(wide, [torch.randn(4, 6, dtype=torch.float64)])
    assert [output.dtype for output in outputs] == dtypes
    assert outputs[1][0].item() == -3.4028234663852886e38


def test_the_bodies_of_regions_are_widened_too() -> None:
    body = """
        %r = gw.sliced(%x) in_dims=[0] out_dims=[0] count=2 {
          input %p : f32[2, 6]
          %q = aten.zeros_like.default(%p, dtype=f32)
          %s = aten.add.Tensor(%p, %q)
          return %s
        }
        %y = getitem(%r, 0)
        return %y"""
    (output,) = run(to_float64(program(body)), [torch.randn(4, 6, dtype=torch.float64)])[0]
    assert output.dtype == torch.float64


def test_float64_is_no_cast_of_the_model_that_casts_inside() -> None:
    """model.double() keeps the casts that a model makes itself, and is off by their rounding."""

    class Casting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float32).exp()

    x = torch.linspace(0.1, 1.0, 7, dtype=torch.float64)
    (exact,) = run(to_float64(capture(Casting(), (x.float(),))), [x])[0]
    assert torch.equal(exact, x.exp())
    assert not torch.equal(Casting().double()(x).double(), x.exp())


@pytest.mark.parametrize(
    "body",
    [
        *("aten.div.Tensor(%i, 3)", "aten.mul.Scalar(%i, 0.1)", "aten.exp.default(%i)", "aten.rsub.Scalar(%i, 0.1)"),
        *("aten.mul.Scalar(%b, 0.1)", "aten.pow.Scalar(2.1, %i)", "aten.where.ScalarOther(%b, %i, 0.1)"),
        "aten.where.Scalar(%b, 1.1, 0.1)",
    ],
)
def test_what_makes_floats_of_integers_makes_float64(body: str) -> None:
    made = program(f"%a = {body}\nreturn %a", "%i : i64[3]; %b : bool[3]")
    i, b = torch.tensor([1, 2, 5]), torch.tensor([True, False, True])
    (narrow,), (wide,) = run(made, [i, b])[0], run(to_float64(made), [i, b])[0]
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert 0 < (wide - narrow.double()).abs().max() < 1e-6 * wide.abs().max(), "no more precise than float32"
    assert check_exact(made, made, [i, b]).kind == "right"


def test_a_jump_is_found_behind_integers_that_became_floats() -> None:
    """The float64 program has a cast more, so its calls are not those of the program one by one."""
    rest = "%q = aten.div.Tensor(%i, 4)\n%j = aten.gt.Scalar(%t, 0.6)\n%y = aten.mul.Tensor(%q, %j)\nreturn %y"
    inputs = "%i : i64[1]; %x : f64[1]; %y : f64[1]; %z : f64[1]"
    sums = [f"%s = aten.add.Tensor({a}, {b})\n%t = aten.add.Tensor(%s, {c})\n" for a, b, c in (("%x", "%y", "%z"), ("%y", "%z", "%x"))]
    before, after = (
        program((body + rest).replace("%y = aten.mul", "%o = aten.mul").replace("return %y", "return %o"), inputs) for body in sums
    )
    values = [torch.tensor([4]), *(torch.tensor([v], dtype=torch.float64) for v in (0.1, 0.2, 0.3))]
    assert check_exact(before, after, values).kind == "inconclusive"


def test_a_view_of_a_floats_bits_has_no_float64_form() -> None:
    bits = "%a = aten.view.dtype(%x, i32) : i32[4, 6]\nreturn %a"
    with pytest.raises(NoFloat64, match="aten.view.dtype looks at the bits of a float"):
        to_float64(program(bits))
    assert verdict(bits, bits).kind == "inconclusive"
    same = "%a = aten.view.dtype(%x, f32) : f32[4, 6]\nreturn %a"
    assert verdict(same, same).kind == "right"


def test_a_weight_that_a_pass_computed_stands_for_what_it_was_rounded_from() -> None:
    third = torch.full((6,), 1 / 3, dtype=torch.float64)
    rounded = RoundedWeight.computed("w", third.float(), lambda: third)
    folded = program("%a = aten.mul.Tensor(%x, @w)\nreturn %a", w=torch.ones(6))
    folded.weights["w"] = rounded
    original = program("%c = aten.full.default([6], 1.0)\n%t = aten.div.Tensor(%c, 3)\n%a = aten.mul.Tensor(%x, %t)\nreturn %a")
    assert check_exact(original, folded, random_inputs(original)).kind == "right"
    folded.weights["w"] = Weight.of("w", third.float(), "constant")
    assert check_exact(original, folded, random_inputs(original)).kind == "wrong"  # 3e-8, the rounding of 1/3


@pytest.mark.parametrize("stride", [(1, 4), (0, 1), (1, 0), (16, 2)])
def test_a_float64_weight_lies_in_memory_as_the_weight_does(stride: tuple[int, ...]) -> None:
    """What a call gives may be laid out as its operands are, and a region's body is typed for it."""
    table = torch.rand(64, dtype=torch.float64).as_strided((4, 6), stride)
    rounded = RoundedWeight(
        "w", "constant", torch.float32, (4, 6), stride, table.device, laid_out(table.float(), stride), exact=table.clone
    )
    plain = Weight.of("v", laid_out(table.float(), stride))
    both = program("%a = aten.mul.Tensor(%x, @w)\n%b = aten.add.Tensor(%a, @v)\nreturn %b", w=torch.ones(4, 6), v=torch.ones(4, 6))
    both.weights.update(w=rounded, v=plain)
    wide = to_float64(both).weights
    assert wide["w"].stride == wide["v"].stride == stride
    assert torch.equal(wide["w"].tensor, table) and torch.equal(wide["v"].tensor, table.float().double())


def test_a_program_without_values_cannot_be_checked() -> None:
    text = 'graphwright 1\nweight @w : f32[6] buffer "?"\nfunction main {\n  takes ((*), {})\n  gives *\n  input %x : f32[6]\n'
    bare = parse(text + "  %a = aten.mul.Tensor(%x, @w)\n  return %a\n}")
    with pytest.raises(InputError, match="weight w has no values"):
        check_exact(bare, bare, [torch.randn(6)])


# --- structure ---


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ("%a = aten.exp.default(%x)\n%b = aten._to_copy.default(%a, dtype=f64)\nreturn %b", "has dtype torch.float64, not torch.float32"),
        ("%a = aten.exp.default(%x)\n%b = aten.view.default(%a, [6, 4])\nreturn %b", r"has shape \[6, 4\], not \[4, 6\]"),
        (
            '%t = aten.t.default(%x)\n%c = aten.clone.default(%t, memory_format=memory_format("contiguous_format"))\n'
            "%e = aten.exp.default(%c)\n%b = aten.t.default(%e)\nreturn %b",
            r"has strides \[1, 4\], not \[6, 1\]",
        ),
    ],
)
def test_another_type_or_layout_of_an_output_is_wrong(after: str, reason: str) -> None:
    result = verdict("%a = aten.exp.default(%x)\nreturn %a", after)
    assert result.kind == "wrong" and re.search(reason, result.reason)


def test_strides_of_dims_of_size_one_address_nothing() -> None:
    same = verdict(
        "%a = aten.exp.default(%x)\nreturn %a",
        "%a = aten.exp.default(%x)\n%b = aten.as_strided.default(%a, [1, 6], [17, 1])\nreturn %b",
        "%x : f32[1, 6]",
    )
    assert same.kind == "right"


@pytest.mark.parametrize(
    ("before", "after", "gives", "reason"),
    [
        ("%a = aten.clone.default(%x)\nreturn %a", "return %x", "*", "output 0 shares memory with input 0, not nothing"),
        (
            "%a = aten.exp.default(%x)\n%b = aten.exp.default(%x)\nreturn %a, %b",
            "%a = aten.exp.default(%x)\nreturn %a, %a",
            "(*, *)",
            "output 0 shares memory with output 1, not nothing",
        ),
    ],
)
def test_an_output_that_newly_shares_memory_is_wrong(before: str, after: str, gives: str, reason: str) -> None:
    result = verdict(before, after, gives=gives)
    assert result.kind == "wrong" and result.reason == reason


def test_another_nesting_or_other_states_are_wrong() -> None:
    before, after = program("return %x", gives="*"), program("return %x", gives="(*)")
    assert check_exact(before, after, random_inputs(before)).reason == "the nesting of inputs or outputs changed"


def test_a_program_that_fails_to_run_is_wrong() -> None:
    before = program("%a = aten.view.default(%x, [24])\nreturn %a")
    after = before.copy()
    next(n for n in after.nodes() if n.op == "call_function").args = (next(n for n in after.nodes()), [25])
    assert "fails to run: RuntimeError" in check_exact(before, after, random_inputs(before)).reason


# --- values ---


def test_reassociated_sums_are_right_and_their_error_is_measured() -> None:
    before = "%a = aten.sum.dim_IntList(%x, [1])\nreturn %a"
    after = "%v = aten.view.default(%x, [4, 2, 3])\n%p = aten.sum.dim_IntList(%v, [2])\n%a = aten.sum.dim_IntList(%p, [1])\nreturn %a"
    result = verdict(before, after)
    assert result.kind == "right" and result.rewrite_error < 1e-14 and result.error_ratio <= 4


def test_the_worst_element_is_named_with_both_values_and_the_users_line() -> None:
    x = torch.zeros(4, 6)
    x[2, 3] = 1.0
    line = "  # [0] model.py:7 block.act"
    result = verdict(f"%a = aten.exp.default(%x){line}\nreturn %a", f"%a = aten.expm1.default(%x){line}\nreturn %a", values=[x])
    assert result.kind == "wrong" and result.worst is not None
    assert (result.worst.index, result.worst.where) == ((0, 0), "model.py:7 block.act")
    assert str(result.worst) == "output 0[0, 0] is 0.0, expected 1.0 (from aten.expm1.default at model.py:7 block.act)"


def test_a_wrong_sample_of_small_scale_does_not_hide_behind_a_large_one() -> None:
    x = torch.ones(4, 6)
    x[1:] *= 1e12
    before, after = "%a = aten.mul.Tensor(%x, 2.0)\nreturn %a", "%b = aten.add.Tensor(%x, 1e-9)\n%a = aten.mul.Tensor(%b, 2.0)\nreturn %a"
    result = verdict(before, after, values=[x])
    assert result.kind == "wrong" and result.worst is not None and result.worst.index[0] == 0


def test_a_moved_nan_or_infinity_is_wrong_and_equal_ones_are_not() -> None:
    before = "%a = aten.log.default(%x)\nreturn %a"
    assert verdict(before, before, values=[torch.tensor([[0.0, -1.0, 2.0]])], inputs="%x : f32[1, 3]").kind == "right"
    result = verdict(before, "%b = aten.abs.default(%x)\n%a = aten.log.default(%b)\nreturn %a", values=[torch.full((4, 6), -2.0)])
    assert result.kind == "wrong" and result.reason == "NaN or infinity moved"


def test_an_overflow_in_the_working_dtype_alone_is_unstable() -> None:
    before = "%a = aten.mul.Tensor(%x, 1.0)\nreturn %a"
    after = """
        %b = aten.mul.Tensor(%x, 1e30)
        %c = aten.mul.Tensor(%b, 1e30)
        %d = aten.mul.Tensor(%c, 1e-30)
        %a = aten.mul.Tensor(%d, 1e-30)
        return %a"""
    result = verdict(before, after)
    assert result.kind == "unstable" and result.reason == "NaN or infinity moved in the working dtype"


def test_lost_precision_in_the_working_dtype_is_unstable() -> None:
    """Variance in one pass is the same function in float64 and cancels in float32."""
    x = torch.randn(4, 600) + 100
    mean = "%m = aten.mean.dim(%x, [1], true)\n"
    two = mean + "%d = aten.sub.Tensor(%x, %m)\n%s = aten.mul.Tensor(%d, %d)\n%v = aten.mean.dim(%s, [1], true)\nreturn %v"
    one = "%s = aten.mul.Tensor(%x, %x)\n%q = aten.mean.dim(%s, [1], true)\n" + mean
    one += "%p = aten.mul.Tensor(%m, %m)\n%v = aten.sub.Tensor(%q, %p)\nreturn %v"
    result = verdict(two, one, "%x : f32[4, 600]", values=[x])
    assert result.kind == "unstable" and result.error_ratio > 4


def test_integers_and_booleans_are_equal_or_wrong() -> None:
    before = "%a = aten.gt.Scalar(%x, 0.0)\nreturn %a"
    assert verdict(before, before).kind == "right"
    result = verdict(before, "%a = aten.ge.Scalar(%x, 0.0)\nreturn %a", values=[torch.zeros(4, 6)])
    assert result.kind == "wrong" and result.reason == "integers differ"


def test_sizes_are_equal_or_wrong() -> None:
    before = "%a = aten.sym_size.int(%x, 0)\nreturn %a"
    assert verdict(before, before).kind == "right"
    assert verdict(before, "%a = aten.sym_size.int(%x, 1)\nreturn %a").kind == "wrong"


def test_a_program_too_noisy_to_judge_is_inconclusive() -> None:
    cancelling = "%b = aten.add.Tensor(%x, 1e15)\n%c = aten.sub.Tensor(%b, 1e15)\nreturn %c"
    result = verdict(cancelling, cancelling)
    assert result.kind == "inconclusive" and "too ill-conditioned to judge" in result.reason


def test_counts_and_converted_integers_are_not_perturbed() -> None:
    # Each number is the lower end of its bin: one that fell short of it by a rounding would be counted elsewhere.
    counted = "%0 = aten._to_copy.default(%x, dtype=f32) : f32[8]\n  %1 = aten.histc.default(%0, 4, 0, 3) : f32[4]\n"
    ends = counted + "  %2 = aten.cumsum.default(%1, 0, dtype=i64) : i64[4]\n  return %2"
    found = verdict(ends, ends, "%x : i64[8]", values=[torch.arange(8) // 2])
    assert found.kind == "right", found


def test_random_numbers_come_from_one_state_and_their_draws_may_not_move() -> None:
    first, second = "%r = aten.rand.default([6])\n", "%s = aten.rand.default([6])\n"
    rest = "%a = aten.mul.Tensor(%x, %r)\n%b = aten.add.Tensor(%a, %s)\nreturn %b"
    state = torch.get_rng_state()
    assert verdict(first + second + rest, first + second + rest).kind == "right"
    assert verdict(first + second + rest, second + first + rest).kind == "wrong"
    assert torch.equal(state, torch.get_rng_state())  # the caller's generator is as it was


def test_masks_at_the_end_of_the_range_do_not_overflow_when_perturbed() -> None:
    masked = """
        %b = aten.lt.Scalar(%x, 0.0)
        %m = aten.masked_fill.Scalar(%x, %b, -3.4028234663852886e+38)
        %s = aten.softmax.int(%m, -1)
        return %m, %s"""
    assert verdict(masked, masked, gives="(*, *)", values=[torch.linspace(-1, 1, 24).reshape(6, 4).t()]).kind == "right"


def test_new_states_are_outputs() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(x.sum(0))
            return x * 2

    original = capture(Counting(), (torch.randn(4, 6),))
    wrong = parse(str(original).replace("aten.sum.dim_IntList(%x, [0])", "aten.amax.default(%x, [0])"), weights=original.weights)
    assert check_exact(original, original.copy(), random_inputs(original)).kind == "right"
    result = check_exact(original, wrong, random_inputs(original), states={"total": torch.zeros(6)})
    assert result.kind == "wrong" and result.worst is not None and result.worst.output == "state total"


# --- made-up inputs ---


def test_inputs_fit_the_signature_and_integers_stay_below_what_they_index() -> None:
    embedded = program(
        """
        %v = aten.view.default(%ids, [8])
        %e = aten.embedding.default(@table, %v)
        %s = aten.index_select.default(@short, 0, %v)
        return %e, %s""",
        "%ids : i64[2, 4]; %x : f32[4, 6] strides [1, 4]; %flag : bool[3]; %n = 3",
        "(*, *)",
        table=torch.randn(100, 3),
        short=torch.randn(2, 3),
    )
    ids, x, flag, n = random_inputs(embedded, seed=3)
    assert 0 <= ids.min() and ids.max() < 2 and ids.shape == (2, 4)
    assert x.stride() == (1, 4) and flag.dtype == torch.bool and n == 3
    again = random_inputs(embedded, seed=3)
    assert torch.equal(again[0], ids) and torch.equal(again[1], x) and not torch.equal(random_inputs(embedded, seed=4)[1], x)


def test_symbols_stand_at_their_hints() -> None:
    class Scale(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.shape[0]

    dynamic = capture(Scale(), (torch.randn(5, 2),), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=64)}})
    (x,) = random_inputs(dynamic)
    assert x.shape == (5, 2)
    assert check_exact(dynamic, dynamic.copy(), [x]).kind == "right"
    assert check_exact(dynamic, dynamic.copy(), [torch.randn(9, 2)]).kind == "right"


def test_sizes_that_move_with_rounding_are_inconclusive() -> None:
    """As many numbers as are no less than 1: all are 1, or a rounding less."""
    counted = "%t = aten.div.Scalar(%x, 3.0)\n%u = aten.mul.Scalar(%t, 3.0)\n%m = aten.ge.Scalar(%u, 1.0)\n%n = aten.nonzero.default(%m)\nreturn %n"
    result = verdict(counted, counted, values=[torch.ones(4, 6)])
    assert result.kind == "inconclusive" and result.reason == "output 0 is of other sizes when values move by their rounding"
