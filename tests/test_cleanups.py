"""The exact clean-ups, each rule as a program before and after in the IR's own text, and each near miss that must stay."""

import re
from textwrap import dedent

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir import Program, capture, parse
from graphwright.ir.run import run
from graphwright.passes import (
    CLEANUPS,
    FoldBatchNorm,
    FoldConstants,
    Pass,
    PassManager,
    PassReport,
    RemoveDeadCode,
    RemoveNoOps,
    RemoveProvenAssertions,
    ShareSubexpressions,
    check_exact,
    random_inputs,
    remove_no_ops,
)

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int64: "i64", torch.bool: "bool"}


def program(body: str, weights: dict[str, torch.Tensor] | None = None, symbols: str = "") -> Program:
    """One function: `input` lines first, then calls, then `return`."""
    weights = weights or {}
    lines = dedent(body).strip().splitlines()
    takes = sum(line.startswith("input ") for line in lines)
    gives = lines[-1].count(",") + 1
    text = [
        "graphwright 1",
        symbols,
        *(f'weight @{name} : {DTYPES[w.dtype]}[{", ".join(map(str, w.shape))}] buffer "?"' for name, w in weights.items()),
        "function main {",
        f"  takes (({', '.join(['*'] * takes)}), {{}})",
        f"  gives ({', '.join(['*'] * gives)})",
        *lines,
        "}",
    ]
    return parse("\n".join(text), weights=weights)


def function_text(any_program: Program) -> str:
    """The functions alone: no weight table, no provenance, no history."""
    text = str(any_program).partition("function main")[2].partition("\npipeline")[0]
    return re.sub(r"\s+#.*", "", text)


def clean(each: Pass, before: Program) -> tuple[Program, PassReport]:
    """The program after `each`, which keeps its contract, changes nothing the second time, and prints what parses back."""
    numeric = "numeric" if all(weight.tensor is not None for weight in before.weights.values()) else "structure"
    result = PassManager([each], verify=numeric, checked=True).run(before)
    again = PassManager([each]).run(result.program)
    assert again.reports[0].records == ()
    assert parse(str(result.program), weights=result.program.weights) == result.program
    return result.program, result.reports[0]


def becomes(each: Pass, before: str, after: str, **weights: torch.Tensor) -> PassReport:
    cleaned, report = clean(each, program(before, weights))
    used = {name: tensor for name, tensor in weights.items() if f"@{name}" in after}
    assert function_text(cleaned) == function_text(program(after, used))
    return report


def stays(each: Pass, body: str, reason: str | None = None, **weights: torch.Tensor) -> None:
    report = becomes(each, body, body, **weights)
    assert report.records == ()
    if reason is not None:
        assert [left.reason for left in report.left] == [reason]


# --- remove-dead-code ---


def test_what_reaches_no_output_goes_with_all_that_only_it_needed() -> None:
    before = """
        input %x : f32[4]
        %a = aten.exp.default(%x)
        %b = aten.sin.default(%a)
        %c = aten.mul.Tensor(%b, @w)
        %d = aten.scaled_dot_product_attention.default(%c, %c, %c)
        return %a"""
    report = becomes(RemoveDeadCode(), before, "input %x : f32[4]\n%a = aten.exp.default(%x)\nreturn %a", w=torch.ones(2, 3, 4))
    assert len(report.records) == 1 and len(report.records[0].before) == 3


def test_an_unused_draw_stays_because_later_draws_depend_on_it() -> None:
    body = """
        input %x : f32[4]
        %u = aten.rand.default([4])
        %r = aten.rand.default([4])
        %y = aten.mul.Tensor(%x, %r)
        return %y"""
    stays(RemoveDeadCode(), body, "it is unused, but without it later operations would draw other random numbers")


def test_a_conjugation_that_is_made_to_happen_is_no_no_op() -> None:
    body = """
        input %x : c64[4]
        %c = aten._conj.default(%x)
        %r = aten.resolve_conj.default(%c)
        %y = aten.view_as_real.default(%r)
        return %y"""
    stays(RemoveNoOps(), body)


# --- remove-proven-assertions ---


def with_sizes(body: str) -> Program:
    return program(body, symbols="symbol s0 in [2, 64] hint 5")


def test_an_assertion_that_the_ranges_prove_goes() -> None:
    before = with_sizes("""
        input %x : f32[s0]
        %n = aten.sym_size.int(%x, 0)
        %c = sym.ge(%n, 2)
        %p = aten._assert_scalar.default(%c, "at least two")
        %q = aten.sym_constrain_range_for_size.default(%n, min=1, max=64)
        return %x""")
    cleaned, report = clean(RemoveProvenAssertions(), before)
    assert len(report.records) == 2 and "aten" not in str(cleaned)


def test_an_assertion_that_may_fail_stays() -> None:
    before = with_sizes("""
        input %x : f32[s0]
        %n = aten.sym_size.int(%x, 0)
        %c = sym.ge(%n, 3)
        %p = aten._assert_scalar.default(%c, "at least three")
        %q = aten.sym_constrain_range_for_size.default(%n, min=3)
        return %x""")
    cleaned, report = clean(RemoveProvenAssertions(), before)
    assert function_text(cleaned) == function_text(before)
    assert {left.reason for left in report.left} == {"the ranges of the symbols do not prove it"}


# --- share-subexpressions ---


def test_equal_calls_are_computed_once_whole_chains_at_a_time() -> None:
    becomes(
        ShareSubexpressions(),
        """
        input %x : f32[4, 4]
        %a = aten.exp.default(%x)
        %b = aten.sum.dim_IntList(%a, [1], false)
        %c = aten.exp.default(%x)
        %d = aten.sum.dim_IntList(%c, [1])
        %e = aten.add.Tensor(%b, %d)
        return %e""",
        """
        input %x : f32[4, 4]
        %a = aten.exp.default(%x)
        %b = aten.sum.dim_IntList(%a, [1], false)
        %e = aten.add.Tensor(%b, %b)
        return %e""",
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("aten.mul.Tensor(%x, 0.0)", "aten.mul.Tensor(%x, -0.0)"),
        ("aten.add.Tensor(%x, 1)", "aten.add.Tensor(%x, 1.0)"),
        ("aten.add.Tensor(%x, 1)", "aten.add.Tensor(%x, true)"),
        ("aten.add.Tensor(%x, 1)", "aten.add.Tensor(%x, 1, alpha=2)"),
        ("aten.sum.default(%x, dtype=f32)", "aten.sum.default(%x, dtype=f64)"),
        ("aten.sum.dim_IntList(%x, [0], true)", "aten.sum.dim_IntList(%x, [1], true)"),
        ("aten.sub.Tensor(%x, %y)", "aten.sub.Tensor(%y, %x)"),
        ("aten.rand.default([4])", "aten.rand.default([4])"),
        ("aten.rand_like.default(%x)", "aten.rand_like.default(%x)"),
        ("aten.dropout.default(%x, 0.5, true)", "aten.dropout.default(%x, 0.5, true)"),
    ],
)
def test_calls_that_differ_in_anything_or_draw_random_numbers_are_two(first: str, second: str) -> None:
    stays(
        ShareSubexpressions(),
        f"""
        input %x : f32[4, 4]
        input %y : f32[4, 4]
        %a = {first}
        %b = {second}
        %c = aten.cat.default([%x, %y])
        %d = aten.sub.Tensor(%a, %b)
        return %d, %c""",
    )


def test_attention_without_dropout_is_shared() -> None:
    cleaned, _ = clean(
        ShareSubexpressions(),
        program("""
        input %x : f32[1, 2, 4, 4]
        %a = aten.scaled_dot_product_attention.default(%x, %x, %x)
        %b = aten.scaled_dot_product_attention.default(%x, %x, %x, none, 0.0)
        %c = aten.add.Tensor(%a, %b)
        return %c"""),
    )
    assert str(cleaned).count("attention") == 1


def test_two_outputs_are_never_made_one_tensor() -> None:
    stays(
        ShareSubexpressions(),
        "input %x : f32[4]\n%a = aten.exp.default(%x)\n%b = aten.exp.default(%x)\n%v = aten.view.default(%b, [2, 2])\nreturn %a, %v",
        "two outputs would come to share memory",
    )


# --- fold-constants ---


def test_a_causal_mask_over_positions_becomes_one_weight() -> None:
    before = """
        input %x : f32[1, 3, 3]
        %p = aten.arange.default(3)
        %q = aten.unsqueeze.default(%p, 1)
        %m = aten.le.Tensor(%p, %q)
        %f = aten.zeros.default([])
        %n = aten.where.ScalarOther(%m, %f, -3.4028234663852886e+38)
        %e = aten.expand.default(%n, [1, 3, 3])
        %y = aten.add.Tensor(%x, %e)
        return %y"""
    cleaned, report = clean(FoldConstants(), program(before))
    weight = cleaned.weights["constant"]
    assert weight.tensor is not None and weight.kind == "constant"
    low = torch.finfo(torch.float32).min
    assert torch.equal(weight.tensor, torch.full((3, 3), low).triu(1))
    assert function_text(cleaned) == function_text(
        program(
            "input %x : f32[1, 3, 3]\n%e = aten.expand.default(@constant, [1, 3, 3])\n%y = aten.add.Tensor(%x, %e)\nreturn %y",
            {"constant": weight.tensor},
        )
    )
    assert report.data == {"folded_bytes": 36} and report.lines == ("1 constant, 36 bytes in all",)


def test_rounding_a_constant_is_no_error_of_the_rewrite() -> None:
    """cos of a table in float32 is 6e-8 off float64; the folded weight remembers what it was rounded from."""
    before = """
        input %x : f32[4]
        %p = aten.arange.default(4, dtype=f32)
        %a = aten.mul.Tensor(%p, @frequency)
        %c = aten.cos.default(%a)
        %y = aten.mul.Tensor(%x, %c)
        return %y"""
    original = program(before, {"frequency": torch.rand(4)})
    cleaned, _ = clean(FoldConstants(), original)
    verdict = check_exact(original, cleaned, [torch.randn(4)])
    assert verdict.kind == "right" and verdict.rewrite_error == 0
    again, _ = clean(FoldConstants(), cleaned)
    assert check_exact(original, again, [torch.randn(4)]).kind == "right"


def test_a_weight_is_named_after_its_module_and_captured_node_and_never_collides() -> None:
    line = "  # [7] model.py:3 block.rotary"
    before = f"""
        input %x : f32[4]
        %c = aten.cos.default(@w){line}
        %s = aten.sin.default(@w){line}
        %y = aten.mul.Tensor(%x, %c)
        %z = aten.mul.Tensor(%y, %s)
        return %z"""
    cleaned, _ = clean(FoldConstants(), program(before, {"w": torch.rand(4)}))
    assert list(cleaned.weights) == ["block.rotary.constant_7", "block.rotary.constant_7_1"]


@pytest.mark.parametrize(
    "constant",
    [
        "aten.rand.default([4])",
        "aten.empty.memory_format([4])",
        "aten.new_empty.default(@w, [4])",
        "aten.view.default(@w, [4])",
        "aten.expand.default(@w, [4])",
        "aten.split.Tensor(@w, 4)\n%c = getitem(%p, 0)",
    ],
)
def test_random_uninitialised_and_merely_viewed_values_are_not_folded(constant: str) -> None:
    first = "%p" if "%p" in constant else "%c"
    body = f"input %x : f32[4]\n{first} = {constant}\n%y = aten.mul.Tensor(%x, %c)\nreturn %y, %x"
    before = program(body, {"w": torch.rand(4)})
    after = PassManager([FoldConstants()]).run(before)
    assert function_text(after.program) == function_text(before)


def test_a_constant_that_the_caller_receives_is_made_anew_for_each_call() -> None:
    stays(
        FoldConstants(),
        "input %x : f32[4]\n%c = aten.arange.default(4)\n%v = aten.view.default(%c, [2, 2])\nreturn %v, %x",
        None,
    )


def test_dynamic_sizes_are_no_constants() -> None:
    before = with_sizes("""
        input %x : f32[s0]
        %n = aten.sym_size.int(%x, 0)
        %p = aten.arange.default(%n)
        %y = aten.mul.Tensor(%x, %p)
        return %y""")
    cleaned, _ = clean(FoldConstants(), before)
    assert function_text(cleaned) == function_text(before)


def test_a_result_over_the_limit_is_left_and_its_operands_are_folded() -> None:
    cleaned, report = clean(
        FoldConstants(limit="1KiB"),
        program(
            """
        input %x : f32[40, 40]
        %a = aten.cos.default(@w)
        %b = aten.unsqueeze.default(%a, 1)
        %c = aten.mul.Tensor(%a, %b)
        %y = aten.mul.Tensor(%x, %c)
        return %y""",
            {"w": torch.rand(40)},
        ),
    )
    assert "aten.cos" not in str(cleaned) and str(cleaned).count("aten.mul") == 2
    assert [left.reason for left in report.left] == ["its 6400 bytes are more than the limit of 1024 above what they replace"]


def test_a_result_as_large_as_the_weights_that_it_replaces_is_folded_whatever_the_limit() -> None:
    body = "input %x : f32[40, 40]\n%c = aten.cos.default(@w)\n%y = aten.mul.Tensor(%x, %c)\nreturn %y"
    cleaned, _ = clean(FoldConstants(limit=0), program(body, {"w": torch.rand(40, 40)}))
    assert list(cleaned.weights) == ["constant"]
    shared = body.replace("%y =", "%z = aten.add.Tensor(%x, @w)\n%y =").replace("return %y", "return %y, %z")
    _, report = clean(FoldConstants(limit=0), program(shared, {"w": torch.rand(40, 40)}))
    assert len(report.left) == 1  # the weight itself is needed elsewhere, so nothing is replaced


def test_the_parts_of_a_split_constant_are_folded() -> None:
    cleaned, _ = clean(
        FoldConstants(),
        program("""
        input %x : f32[2]
        %p = aten.arange.default(4)
        %e = aten.exp.default(%p)
        %t = aten.topk.default(%e, 2)
        %a = getitem(%t, 0)
        %i = getitem(%t, 1)
        %b = aten.mul.Tensor(%a, %i)
        %y = aten.mul.Tensor(%x, %b)
        return %y"""),
    )
    assert function_text(cleaned).count("aten.") == 1


def test_of_a_call_whose_parts_the_caller_receives_only_the_operands_are_folded() -> None:
    cleaned, _ = clean(
        FoldConstants(),
        program(
            """
        input %x : f32[2]
        %e = aten.exp.default(@w)
        %t = aten.topk.default(%e, 2)
        %a = getitem(%t, 0)
        return %a, %x""",
            {"w": torch.rand(4)},
        ),
    )
    assert list(cleaned.weights) == ["constant"] and "aten.exp" not in str(cleaned) and "aten.topk" in str(cleaned)


def test_a_program_without_values_says_why_nothing_was_folded() -> None:
    text = str(program("input %x : f32[4]\n%c = aten.cos.default(@w)\n%y = aten.mul.Tensor(%x, %c)\nreturn %y", {"w": torch.rand(4)}))
    (report,) = PassManager([FoldConstants()]).run(parse(text)).reports
    assert report.left[0].reason == "the program was read from text and its weights have no values"


# --- remove-no-ops ---


@pytest.mark.parametrize(
    "call",
    [
        "aten.view.default(%y, [2, 3, 4])",
        "aten.view.default(%y, [2, -1, 4])",
        "aten.reshape.default(%y, [2, 3, 4])",
        "aten.expand.default(%y, [-1, 3, 4])",
        "aten.permute.default(%y, [0, 1, 2])",
        "aten.slice.Tensor(%y, 1, 0, 9223372036854775807)",
        "aten.slice.Tensor(%y, 2)",
        "aten.squeeze.dim(%y, 0)",
        "aten.alias.default(%y)",
        "aten.detach.default(%y)",
        "aten.clone.default(%y)",
        "aten.copy.default(%x, %y)",
        'aten.clone.default(%y, memory_format=memory_format("contiguous_format"))',
        "aten._to_copy.default(%y, dtype=f32)",
        "aten.contiguous.default(%y)",
        "aten.to.dtype(%y, f32)",
        "aten.dropout.default(%y, 0.5, false)",
        "aten.dropout.default(%y, 0.0, true)",
        "aten.feature_dropout.default(%y, 0.5, false)",
        "aten.mul.Tensor(%y, 1)",
        "aten.mul.Tensor(%y, 1.0)",
        "aten.div.Tensor(%y, 1.0)",
        "aten.pow.Tensor_Scalar(%y, 1)",
        "aten.sub.Tensor(%y, 0.0)",
        "aten.sub.Tensor(%y, 0)",
        "aten.add.Tensor(%y, -0.0)",
    ],
)
def test_what_returns_its_operand_bit_for_bit_goes(call: str) -> None:
    body = "input %x : f32[2, 3, 4]\n%y = aten.exp.default(%x)\n{}%s = aten.sin.default({})\nreturn %s"
    becomes(RemoveNoOps(), body.format(f"%z = {call}\n", "%z"), body.format("", "%y"))


@pytest.mark.parametrize(
    "call",
    [
        "aten.view.default(%y, [3, 2, 4])",
        "aten.permute.default(%y, [1, 0, 2])",
        "aten.slice.Tensor(%y, 1, 1)",
        "aten.slice.Tensor(%y, 2, 0, 9223372036854775807, 2)",
        'aten.clone.default(%t, memory_format=memory_format("contiguous_format"))',
        "aten._to_copy.default(%y, dtype=bf16)",
        "aten.dropout.default(%y, 0.5, true)",
        "aten.mul.Tensor(%y, 1.000009)",
        "aten.mul.Tensor(%y, %y)",
        "aten.mul.Tensor(%one, %y)",
        "aten.add.Tensor(%y, 1e-8)",
        "aten.sub.Tensor(%y, 0.0, alpha=-1)",
        "aten.sub.Tensor(%y, -0.0)",
        "aten.rsub.Scalar(%y, 0)",
        "aten.pow.Scalar(1, %y)",
    ],
)
def test_a_near_miss_stays(call: str) -> None:
    stays(
        RemoveNoOps(),
        f"""
        input %x : f32[2, 3, 4]
        input %one : f32[]
        %y = aten.exp.default(%x)
        %t = aten.transpose.int(%y, 1, 2)
        %z = {call}
        %s = aten.sin.default(%z)
        %w = aten.sum.default(%t)
        %v = aten.mul.Tensor(%w, %one)
        return %s, %v""",
    )


def test_adding_zero_to_a_float_stays_because_of_the_sign_of_zero() -> None:
    body = "input %x : f32[4]\n%y = aten.add.Tensor(%x, 0)\n%z = aten.reciprocal.default(%y)\nreturn %z"
    stays(RemoveNoOps(), body, "x + 0.0 turns -0.0 into 0.0")
    assert run(program(body), [torch.full((4,), -0.0)])[0][0][0] == torch.inf  # 1/-0.0 would be -inf


@pytest.mark.parametrize(
    ("dtype", "call"), [("i64", "aten.add.Tensor(%x, 0)"), ("i64", "aten.mul.Tensor(%x, 1)"), ("i64", "aten.sub.Tensor(%x, 0)")]
)
def test_neutral_arithmetic_on_integers_goes(dtype: str, call: str) -> None:
    body = f"input %x : {dtype}[4]\n" + "{}%z = aten.neg.default({})\nreturn %z"
    becomes(RemoveNoOps(), body.format(f"%y = {call}\n", "%y"), body.format("", "%x"))


@pytest.mark.parametrize("call", ["aten.mul.Tensor(%x, 1.0)", "aten.div.Tensor(%x, 1)", "aten.add.Tensor(%x, 0.0)"])
def test_arithmetic_that_changes_the_dtype_stays(call: str) -> None:
    stays(RemoveNoOps(), f"input %x : i64[4]\n%y = {call}\n%z = aten.neg.default(%y)\nreturn %z")


@given(
    st.sampled_from([1, 1.0, 0, 0.0, -0.0]), st.sampled_from(["mul.Tensor", "div.Tensor", "add.Tensor", "sub.Tensor", "pow.Tensor_Scalar"])
)
@settings(max_examples=25)
def test_whatever_goes_was_the_identity_on_every_kind_of_float(scalar: float, name: str) -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, torch.inf, -torch.inf, torch.nan])
    before = program(f"input %x : f32[10]\n%y = aten.{name}(%x, {scalar!r})\n%z = aten.abs.default(%y)\nreturn %y, %z")
    after = PassManager([RemoveNoOps()]).run(before).program
    if function_text(after) == function_text(before):
        return
    (y, _), _ = run(before, [special])
    assert torch.equal(y.view(torch.int32), special.view(torch.int32))


def test_a_copy_stays_where_the_caller_would_receive_the_input_a_weight_or_another_output() -> None:
    stays(RemoveNoOps(), "input %x : f32[4]\n%y = aten.clone.default(%x)\nreturn %y",
          "the caller receives it, and without it would receive input x itself")  # fmt: skip
    stays(RemoveNoOps(), "input %x : f32[4]\n%y = aten.mul.Tensor(%x, 1.0)\n%v = aten.view.default(%y, [2, 2])\nreturn %v",
          "the caller receives it, and without it would receive input x itself")  # fmt: skip
    stays(RemoveNoOps(), "input %x : f32[4]\n%y = aten.clone.default(@w)\nreturn %y, %x",
          "the caller receives it, and without it would receive weight w itself", w=torch.ones(4))  # fmt: skip
    stays(RemoveNoOps(), "input %x : f32[4]\n%e = aten.exp.default(%x)\n%y = aten.clone.default(%e)\nreturn %e, %y",
          "two outputs would come to share memory")  # fmt: skip


def test_of_two_copies_on_the_way_to_an_output_one_stays() -> None:
    becomes(
        RemoveNoOps(),
        "input %x : f32[4]\n%a = aten.clone.default(%x)\n%v = aten.view.default(%a, [2, 2])\n%b = aten.clone.default(%v)\nreturn %b",
        "input %x : f32[4]\n%v = aten.view.default(%x, [2, 2])\n%b = aten.clone.default(%v)\nreturn %b",
    )


def test_a_copy_that_the_caller_receives_goes_when_its_source_is_the_programs_own() -> None:
    becomes(
        RemoveNoOps(),
        "input %x : f32[4]\n%e = aten.exp.default(%x)\n%y = aten.clone.default(%e)\nreturn %y",
        "input %x : f32[4]\n%e = aten.exp.default(%x)\nreturn %e",
    )


def test_a_view_of_an_input_may_go_because_it_is_the_input_already() -> None:
    becomes(RemoveNoOps(), "input %x : f32[4]\n%y = aten.alias.default(%x)\nreturn %y", "input %x : f32[4]\nreturn %x")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            ["aten.view.default(%x, [6, 4])", "aten.view.default(%0, [3, 8])", "aten.view.default(%1, [8, -1])"],
            ["aten.view.default(%x, [8, -1])"],
        ),
        (["aten.permute.default(%x, [1, 2, 0])", "aten.permute.default(%0, [1, 0, 2])"], ["aten.permute.default(%x, [2, 1, 0])"]),
        (["aten.transpose.int(%x, 0, 1)", "aten.transpose.int(%0, 1, 0)"], []),
        (["aten.permute.default(%x, [2, 0, 1])", "aten.permute.default(%0, [-2, -1, -3])"], []),
        (["aten.view.default(%x, [6, 4])", "aten.t.default(%0)", "aten.t.default(%1)"], ["aten.view.default(%x, [6, 4])"]),
        (["aten.view.default(%x, [24])", "aten.view.default(%0, [2, 3, 4])"], []),
    ],
)
def test_chains_of_views_become_one_or_none(before: list[str], after: list[str]) -> None:
    def chain(calls: list[str]) -> str:
        lines = [f"%{n} = {call}" for n, call in enumerate(calls)]
        last = f"%{len(calls) - 1}" if calls else "%x"
        return "\n".join(["input %x : f32[2, 3, 4]", *lines, f"%s = aten.exp.default({last})", "return %s"])

    becomes(RemoveNoOps(), chain(before), chain(after))


def test_a_view_that_something_else_uses_too_is_not_merged() -> None:
    stays(
        RemoveNoOps(),
        """
        input %x : f32[2, 3, 4]
        %a = aten.view.default(%x, [6, 4])
        %b = aten.view.default(%a, [24])
        %c = aten.exp.default(%a)
        %d = aten.exp.default(%b)
        return %c, %d""",
    )


def test_a_view_of_a_reshape_that_had_to_copy_is_not_merged() -> None:
    stays(
        RemoveNoOps(),
        """
        input %x : f32[4, 6]
        %t = aten.t.default(%x)
        %r = aten.reshape.default(%t, [24])
        %v = aten.view.default(%r, [3, 8])
        return %v""",
    )


def test_what_leads_to_channels_last_is_not_replaced_by_what_does_not() -> None:
    """Strides of dims of size 1 address nothing, but operations lay out their results by them."""
    body = """
        input %x : f32[1, 4, 3, 1]
        %p = aten.permute.default(%x, [3, 0, 1, 2])
        %t = aten.transpose.int(%p, 0, 1)
        %c = aten.conv2d.default(%t, @w)
        return %c"""
    merged = body.replace("%p = aten.permute.default(%x, [3, 0, 1, 2])\n", "").replace(
        "aten.transpose.int(%p, 0, 1)", "aten.permute.default(%x, [0, 3, 1, 2])"
    )
    becomes(RemoveNoOps(), body, merged, w=torch.ones(2, 1, 1, 1))


def test_views_that_stay_two_are_declined_with_a_reason() -> None:
    read_twice = "input %x : f32[2, 6]\n%a = {}\n%b = {}\n%c = aten.exp.default(%a)\n%d = aten.exp.default(%b)\nreturn %c, %d"
    copying = "input %x : f32[4, 6]\n%t = aten.t.default(%x)\n%r = aten.reshape.default(%t, [24])\n{}return %v"
    for body, rule, reason in (
        (
            read_twice.format("aten.view.default(%x, [12])", "aten.view.default(%a, [3, 4])"),
            "merge-views",
            "the one before it is read 2 times",
        ),
        (
            read_twice.format("aten.t.default(%x)", "aten.permute.default(%a, [1, 0])"),
            "merge-permutes",
            "the one before it is read 2 times",
        ),
        (copying.format("%v = aten.view.default(%r, [3, 8])\n"), "merge-views", "one of the two copies"),
    ):
        _, report = clean(RemoveNoOps(), program(body))
        assert [(each.rule, each.reason) for each in report.declined] == [(rule, reason)]
        assert report.left == () and "left" not in str(report)


def test_a_constant_that_cannot_be_computed_here_stays_and_others_are_folded() -> None:
    text = """graphwright 1
weight @w : f8e4m3fn[4] buffer "?"
weight @v : f32[4] buffer "?"
function main {
  takes ((*), {})
  gives (*)
  input %x : f32[4]
  %s = aten.sum.default(@w)
  %f = aten._to_copy.default(%s, dtype=f32)
  %e = aten.exp.default(@v)
  %a = aten.add.Tensor(%x, %f)
  %b = aten.add.Tensor(%a, %e)
  return %b
}"""
    before = parse(text, weights={"w": torch.ones(4).to(torch.float8_e4m3fn), "v": torch.zeros(4)})
    result = PassManager([FoldConstants()], checked=True).run(before)
    assert [record.rule for record in result.reports[0].records] == ["fold"]
    (left,) = result.reports[0].left
    assert left.what == "aten._to_copy.default" and left.reason.startswith("it cannot be computed here: ")
    assert "aten.sum.default(@w)" in str(result.program) and "aten.exp" not in str(result.program)


# --- fold-batch-norm ---


def batch_norm_model(layer: torch.nn.Module, norm: torch.nn.Module) -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(layer, norm, torch.nn.ReLU())
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.dtype.is_floating_point:
            torch.nn.init.uniform_(tensor.detach(), 0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (torch.nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (torch.nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
        (torch.nn.Conv2d(4, 6, 3, padding="same", bias=False), torch.nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (torch.nn.Conv1d(4, 6, 3), torch.nn.BatchNorm1d(6), (2, 4, 9)),
        (torch.nn.Conv3d(2, 3, 2), torch.nn.BatchNorm3d(3, eps=0.1), (2, 2, 4, 4, 4)),
        (torch.nn.Linear(4, 6, bias=False), torch.nn.BatchNorm1d(6), (5, 4)),
    ],
)
def test_a_batch_norm_in_eval_mode_disappears_into_the_layer_before_it(
    layer: torch.nn.Module, norm: torch.nn.Module, shape: tuple[int, ...]
) -> None:
    cleaned, report = clean(FoldBatchNorm(), capture(batch_norm_model(layer, norm), (torch.randn(shape),)))
    assert [record.rule for record in report.records] == ["fold-batch-norm"]
    assert "batch_norm" not in str(cleaned)
    assert [weight.name for weight in cleaned.weights.values()] == ["0.folded.weight", "0.folded.bias"]


@pytest.mark.parametrize(
    ("layer", "norm", "shape", "reason"),
    [
        (torch.nn.ConvTranspose2d(4, 6, 3), torch.nn.BatchNorm2d(6), (2, 4, 5, 5), "what it normalises is no convolution or linear layer"),
        (torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(3), (2, 3, 4), "its channels are not the layer's"),
        (torch.nn.ReLU(), torch.nn.BatchNorm1d(3), (2, 3, 4), "what it normalises is no convolution or linear layer"),
    ],
)
def test_a_batch_norm_that_cannot_be_folded_says_why(
    layer: torch.nn.Module, norm: torch.nn.Module, shape: tuple[int, ...], reason: str
) -> None:
    _, report = clean(FoldBatchNorm(), capture(batch_norm_model(layer, norm), (torch.randn(shape),)))
    assert report.records == () and [left.reason for left in report.left] == [reason]


def test_a_layer_whose_result_is_used_elsewhere_keeps_its_batch_norm() -> None:
    class Branching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    _, report = clean(FoldBatchNorm(), capture(Branching().eval(), (torch.randn(2, 3, 6, 6),)))
    assert [left.reason for left in report.left] == ["the result of the layer before it is used 2 times"]


def test_a_batch_norm_in_training_mode_is_left_alone() -> None:
    model = batch_norm_model(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).train()
    before = capture(model, (torch.randn(2, 3, 6, 6),))
    result = PassManager([FoldBatchNorm()]).run(before)
    assert function_text(result.program) == function_text(before)


# --- all of them ---


def test_the_clean_ups_help_each_other() -> None:
    before = program(
        """
        input %x : f32[2, 4]
        %p = aten.arange.default(4)
        %q = aten.add.Tensor(%p, 0)
        %r = aten.arange.default(4)
        %m = aten.ge.Scalar(%q, 2)
        %n = aten.ge.Scalar(%r, 2)
        %b = aten.logical_and.default(%m, %n)
        %c = aten.clone.default(%x)
        %d = aten.exp.default(%c)
        %e = aten.exp.default(%x)
        %f = aten.add.Tensor(%d, %e)
        %y = aten.where.ScalarOther(%b, %f, 0.0)
        return %y"""
    )
    cleaned = PassManager(CLEANUPS, verify="numeric", checked=True).run(before).program
    assert function_text(cleaned) == function_text(
        program(
            """
            input %x : f32[2, 4]
            %d = aten.exp.default(%x)
            %f = aten.add.Tensor(%d, %d)
            %y = aten.where.ScalarOther(@constant, %f, 0.0)
            return %y""",
            {"constant": torch.tensor([False, False, True, True])},
        )
    )
    assert not any(report.records for report in PassManager(CLEANUPS).run(cleaned).reports)


def test_state_updates_survive_the_clean_ups() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps.add_(1)
            return x * self.steps.clone()

    before = capture(Counting(), (torch.randn(3),))
    cleaned = PassManager(CLEANUPS, verify="numeric").run(before).program
    assert check_exact(before, cleaned, random_inputs(before), states={"steps": torch.tensor(4.0)}).kind == "right"


def chain(sites: int) -> str:
    """Work for every clean-up at each of `sites` places."""
    lines, last = ["input %x : f32[4, 6]", "%c = aten.arange.default(6)"], "%x"
    for n in range(sites):
        lines += [
            f"%a{n} = aten.clone.default({last})",
            f"%b{n} = aten.view.default(%a{n}, [24])",
            f"%d{n} = aten.view.default(%b{n}, [4, 6])",
            f"%e{n} = aten.relu.default(%d{n})",
            f"%f{n} = aten.relu.default(%d{n})",
            f"%g{n} = aten.add.Tensor(%e{n}, %f{n})",
            f"%h{n} = aten.mul.Tensor(%c, {n})",
            f"%i{n} = aten.add.Tensor(%g{n}, %h{n})",
            f"%j{n} = aten.sin.default(%i{n})",
        ]
        last = f"%i{n}"
    return "\n".join([*lines, f"return {last}"])


def test_each_site_is_looked_at_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear, as counted: inferences a site do not grow with the program."""

    def inferences(sites: int) -> int:
        counted, before = [0], program(chain(sites))
        original = remove_no_ops.infer

        def counting(*args: object) -> object:
            counted[0] += 1
            return original(*args)

        monkeypatch.setattr(remove_no_ops, "infer", counting)
        result = PassManager(CLEANUPS).run(before)
        monkeypatch.setattr(remove_no_ops, "infer", original)
        assert [len(report.records) > 0 for report in result.reports] == [False, True, True, True, False, True]
        return counted[0]

    few, many = inferences(4), inferences(32)
    assert many <= 8 * few
