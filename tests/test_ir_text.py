"""The text of a program: what is printed parses back to an equal program in equal bytes, and what is no program says where."""

import json
import math
import random
import re
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphwright import ir
from graphwright.ir.errors import InputError, ParseError, VerifyError
from graphwright.ir.printer import literal
from graphwright.ir.run import run
from graphwright.ir.types import DTYPES, type_text
from graphwright.passes import PassManager

HEAD = "graphwright 1\n"


def function(body: str, *, takes: str = "((*,), {})", gives: str = "(*)", returns: str = "%0", before: str = "") -> str:
    return f"{HEAD}{before}\nfunction main {{\n  takes {takes.replace('(*,)', '(*)')}\n  gives {gives}\n{body}\n  return {returns}\n}}\n"


def call(text: str, argument: str = "f32[2, 3, 4, 4]") -> str:
    return function(f"  input %x : {argument}\n  %0 = {text}")


def roundtrip(text: str) -> str:
    """The canonical text of `text`, after checking that it is a fixed point of parse and print."""
    program = ir.parse(text)
    ir.verify(program)
    printed = str(program)
    again = ir.parse(printed)
    ir.verify(again)
    assert again == program and str(again) == printed
    return printed


# --- argument kinds ---


@pytest.mark.parametrize(
    "written",
    [
        "aten.add.Scalar(%x, 3)",
        "aten.add.Scalar(%x, -3)",
        "aten.add.Scalar(%x, 0)",
        "aten.add.Scalar(%x, 9223372036854775807)",
        "aten.add.Scalar(%x, -9223372036854775808)",
        "aten.add.Scalar(%x, 0.5)",
        "aten.add.Scalar(%x, -0.0)",
        "aten.add.Scalar(%x, 1e-05)",
        "aten.add.Scalar(%x, -1e-05)",
        "aten.add.Scalar(%x, 1e+22)",
        "aten.add.Scalar(%x, 5e-324)",
        "aten.add.Scalar(%x, 1.7976931348623157e+308)",
        "aten.add.Scalar(%x, inf)",
        "aten.add.Scalar(%x, -inf)",
        "aten.add.Scalar(%x, nan)",
        "aten.add.Scalar(%x, true)",
        "aten.add.Scalar(%x, complex(1.0, -2.5))",
        "aten.add.Scalar(%x, complex(-0.0, inf))",
        "aten.add.Scalar(%x, complex(nan, -inf))",
        "aten.sum.dim_IntList(%x, [1, -1], true)",
        "aten.sum.dim_IntList(%x, [])",
        "aten.sum.dim_IntList(%x, none)",
        "aten.sum.dim_IntList(%x, [0], dtype=f64)",
        'aten.gelu.default(%x, approximate="tanh")',
        "aten.clamp.default(%x, none, 1.0)",
        "aten._to_copy.default(%x, dtype=bf16)",
        'aten._to_copy.default(%x, dtype=f16, layout=layout("strided"), device=device("cpu"))',
        'aten.clone.default(%x, memory_format=memory_format("channels_last"))',
        'aten.clone.default(%x, memory_format=memory_format("contiguous_format"))',
        'aten.clone.default(%x, memory_format=memory_format("preserve_format"))',
        'aten.full.default([2, 3], 1.0, dtype=f32, device=device("cpu"), pin_memory=false)',
        "aten.cat.default([%x, %x], 1)",
        "aten.index.Tensor(%x, [none, none])",  # no item at all: the whole value
    ],
)
def test_every_argument_kind_is_written_back_as_it_was_read(written: str) -> None:
    assert f"%0 = {written} : " in roundtrip(call(written))


def test_lists_keep_their_none_items() -> None:
    text = function("  input %x : f32[2, 3, 4]\n  input %i : i64[5]\n  %0 = aten.index.Tensor(%x, [none, %i, none])", takes="((*, *), {})")
    assert "[none, %i, none]) : f32[2, 5, 4]" in roundtrip(text)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_is_a_type_and_an_argument(name: str) -> None:
    text = function(f"  input %x : {name}[2]\n  %0 = aten.empty.memory_format([2], dtype={name})")
    assert f"dtype={name}) : {name}[2]" in roundtrip(text)


def test_a_float_that_is_written_as_an_integer_stays_a_float() -> None:
    assert literal(1.0) == "1.0" and literal(1) == "1" and literal(True) == "true"
    assert "aten.add.Scalar(%x, 2.0)" in roundtrip(call("aten.add.Scalar(%x, 2.0)"))


@given(st.one_of(st.integers(-(2**63), 2**64 - 1), st.floats(), st.booleans(), st.complex_numbers()))
@settings(max_examples=150)
def test_any_scalar_survives_bit_for_bit(value: complex) -> None:
    text = call(f"aten.add.Scalar(%x, {literal(value)})")
    (node,) = ir.parse(text).main.calls
    assert type(node.args[1]) is type(value) and repr(node.args[1]) == repr(value)
    roundtrip(text)


@given(st.text(max_size=40))
@settings(max_examples=150)
def test_any_string_survives(value: str) -> None:
    tree = f"object {json.dumps(value)} {json.dumps(value)} (*)"
    text = function("  input %x : f32[2]\n  %0 = aten.relu.default(%x)", gives=tree)
    program = ir.parse(text)
    assert program.main.out_tree.type_name == value and program.main.out_tree.context == value
    assert ir.parse(str(program)) == program


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_unsigned_scalars_of_64_bits_are_constants_too(value: int) -> None:
    class Filled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("top", torch.tensor([value], dtype=torch.uint64))

        def forward(self, x, fill):
            return torch.full((2,), value, dtype=torch.uint64), torch.full((2,), fill, dtype=torch.uint64), self.top, x

    program = ir.capture(Filled(), (torch.ones(2), value))
    again = ir.parse(str(program), program.weights)
    assert again == program and f"input %fill = {value}" in str(program)
    full, filled, top, _ = run(again, [torch.ones(2), value])[0]
    assert [full.tolist(), filled.tolist(), top.tolist()] == [[value] * 2, [value] * 2, [value]]


# --- types ---


@pytest.mark.parametrize(
    "type_",
    [
        "f32[]",
        "f32[0, 3]",
        "i64[2, 3]",
        "bool[1]",
        "f32[2, 3] strides [1, 2]",
        "f32[2, 3] strides [0, 1]",
        "f32[2] on meta",
        "f32[4] on cuda:0",
    ],
)
def test_a_type_says_strides_and_device_only_where_not_the_default(type_: str) -> None:
    text = function(f"  input %x : {type_}", returns="%x")
    assert f"  input %x : {type_}\n" in roundtrip(text)


def test_a_type_at_a_call_may_be_left_out_or_spelled_with_other_spaces() -> None:
    plain = roundtrip(call("aten.relu.default(%x)", "f32[2, 3]"))
    assert roundtrip(call("aten.relu.default( %x ) :f32[ 2,3 ]", "f32[2,3]")) == plain


def test_a_call_with_several_results_has_the_types_of_all() -> None:
    text = function("  input %x : f32[4, 6]\n  %0 = aten.split.Tensor(%x, 3, 1)\n  %1 = getitem(%0, 1)", returns="%1")
    assert "%0 = aten.split.Tensor(%x, 3, 1) : (f32[4, 3] strides [6, 1], f32[4, 3] strides [6, 1])" in roundtrip(text)


# --- symbols ---


@pytest.mark.parametrize(
    "size",
    ["s0", "2*s0", "s0 + 1", "s0 - 1", "s0 // 2", "s0 % 2", "(s0 + 1) // 2", "s0*s1", "2*s0 + 3*s1", "s0*s0", "(s0 + s1) % 3", "-1 + s0"],
)
def test_sizes_are_expressions_over_named_symbols(size: str) -> None:
    text = function(
        f"  input %x : f32[s0, {size}]\n  %0 = aten.relu.default(%x)",
        before="symbol s0 in [2, 64] hint 5\nsymbol s1 in [0, inf] hint 7\n",
    )
    printed = roundtrip(text)
    assert "symbol s0 in [2, 64] hint 5\n" in printed
    assert ("symbol s1 in [0, inf] hint 7\n" in printed) == ("s1" in size), "only symbols that an input's sizes are made of are written"


@pytest.mark.parametrize("hints", [(3, 3), (3, 4)])
@pytest.mark.parametrize(
    ("x", "y", "needs_one_size"),
    [
        ("[a]", "[b]", "aten.add.Tensor(%x, %y)"),
        ("[2*a]", "[b + 3]", "aten.add.Tensor(%x, %y)"),
        ("[2, a]", "[b, 2]", "aten.mm.default(%x, %y)"),
        ("[2, a]", "[2, b]", "aten.cat.default([%x, %y], 0)"),
    ],
)
def test_two_symbols_are_two_sizes_whatever_their_hints(hints: tuple[int, int], x: str, y: str, needs_one_size: str) -> None:
    symbols = "".join(f"symbol {name} in [1, 9] hint {hint}\n" for name, hint in zip("ab", hints))

    def text(one: str, other: str, call: str) -> str:
        return function(f"  input %x : f32{one}\n  input %y : f32{other}\n  %0 = {call}", takes="((*, *), {})", before=symbols)

    with pytest.raises(ParseError, match=r"does not type-check: .*\ba\b.*\bb\b"):
        ir.parse(text(x, y, needs_one_size))
    ir.verify(ir.parse(text("[a, 2]", "[a, 2]", "aten.add.Tensor(%x, %y)")))
    ir.verify(ir.parse(text("[a, 2]", "[b, 2]", "aten.cat.default([%x, %y], 0) : f32[a + b, 2]")))


def test_size_arithmetic_is_part_of_the_program() -> None:
    text = function(
        "  input %x : f32[batch, 6]\n  %0 = aten.sym_size.int(%x, 0)\n  %1 = sym.mul(%0, 2)\n  %2 = aten.view.default(%x, [%1, 3])",
        returns="%2, %1", gives="(*, *)", before="symbol batch in [1, 8] hint 3\n",
    )  # fmt: skip
    printed = roundtrip(text)
    assert "%1 = sym.mul(%0, 2) : size(2*batch)" in printed and "%2 = aten.view.default(%x, [%1, 3]) : f32[2*batch, 3]" in printed


def test_equal_programs_print_equal_bytes_whatever_torch_calls_their_symbols() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x):
            return torch.cat([x, x], 0)

    def text() -> str:
        return str(ir.capture(Doubled(), (torch.ones(5, 2),), dynamic_shapes={"x": {0: torch.export.Dim("rows", max=32)}}))

    first = text()
    assert first == text() and "f32[2*rows, 2]" in first


def test_a_dim_that_is_named_as_data_dependent_sizes_are_gets_another_name() -> None:
    net = torch.nn.ReLU()
    program = ir.capture(net, (torch.ones(5, 2),), dynamic_shapes={"input": {0: torch.export.Dim("u0", max=32)}})
    assert "symbol s0 in" in str(program) and ir.parse(str(program)) == program


# --- states, constants, trees, regions, schedules ---


def test_states_are_inputs_that_get_a_new_value() -> None:
    text = function(
        "  state %cache.k : f32[3]\n  input %x : f32[3]\n  %0 = aten.add.Tensor(%cache.k, %x)",
        returns='%0 state cache.k = %0, "input:x" = %0', before='weight @cache.k : f32[3] state "?"\n',
    )  # fmt: skip
    assert 'return %0 state cache.k = %0, "input:x" = %0' in roundtrip(text)
    assert ir.parse(text).main.signature().new_states == ("cache.k", "input:x")


def test_a_size_that_is_at_least_one_is_written_so_and_a_stride_is_not() -> None:
    text = function(
        "  input %x : f32[Max(1, n), n, 2]\n  %0 = aten.mul.Tensor(%x, %x)\n  %1 = aten.transpose.int(%0, 0, 1)",
        returns="%1", before="symbol n in [0, 64] hint 5\n",
    )  # fmt: skip
    printed = roundtrip(text)
    assert "input %x : f32[Max(1, n), n, 2]\n" in printed and ": f32[n, Max(1, n), 2] strides [2, 2*n, 1]\n" in printed
    symbols = ir.SymbolTable()
    n = symbols.declare(ir.Symbol("n", 0, 64, 5))
    assert symbols.text(torch.sym_max(1, n)) == "Max(1, n)"


@pytest.mark.parametrize("value", ["none", "true", "3", "-2.5", "inf", '"cubic"', "f16", '[1, none, ["a"]]'])
def test_a_constant_input_is_written_with_its_value(value: str) -> None:
    text = function(f"  input %x : f32[2]\n  input %mode = {value}\n  %0 = aten.relu.default(%x)", takes="((*, *), {})")
    assert f"  input %mode = {value}\n" in roundtrip(text)
    assert ir.parse(text).main.signature().inputs[1].is_constant


def test_trees_of_dicts_lists_and_objects() -> None:
    takes = '((*, [*, {"a": *, 7: ()}]), {"b": {"c": [*]}})'
    gives = 'object "some.Output" "[\\"x\\", \\"y\\"]" (*, (*))'
    inputs = "\n".join(f"  input %i{k} : f32[2]" for k in range(4))
    printed = roundtrip(function(inputs, takes=takes, gives=gives, returns="%i0, %i3"))
    assert f"  takes {takes}\n  gives {gives}\n" in printed


REGION = function(
    """  input %x : f32[6, 4]
  %4 = gw.sliced(%x, @w) in_dims=[0, -1] out_dims=[0] count=4 : (f32[6, 3]) {  # [0,1] model.py:7 ffn
    input %0 : f32[2, 4]
    input %1 : f32[3, 4]
    %2 = aten.linear.default(%0, %1) : f32[2, 3]  # [0] model.py:7 ffn
    %3 = aten.relu.default(%2) : f32[2, 3]  # [1] model.py:8 ffn
    return %3
  }
  %5 = getitem(%4, 0) : f32[6, 3]  # [1] model.py:8 ffn""",
    returns="%5", before='weight @w : f32[3, 4] parameter "?"\n',
)  # fmt: skip


def test_a_region_is_an_indented_body_and_keeps_dims_count_and_provenance() -> None:
    printed = roundtrip(REGION)
    assert printed.splitlines()[2:] == REGION.splitlines()[2:]
    region_call = ir.parse(REGION).main.calls[0]
    body = ir.program.region_of(region_call)
    assert region_call.args[1:4] == ([0, -1], [0], 4)
    assert [(n.meta["origin"], str(n.meta["where"])) for n in body.graph.nodes if n.op == "call_function"] == [
        ((0,), "model.py:7 ffn"),
        ((1,), "model.py:8 ffn"),
    ]


def test_regions_keep_units_and_orders() -> None:
    text = (
        REGION.replace("count=4", "count=2 units=3 orders=[[1, 0]]")
        .replace(": (f32[6, 3])", ": (f32[6, 3] strides [1, 6])").replace("f32[2, 4]", "f32[4, 4]")
        .replace(": f32[2, 3]", ": f32[4, 3]").replace("%5 = getitem(%4, 0) : f32[6, 3]", "%5 = getitem(%4, 0)")
    )  # fmt: skip
    assert "count=2 units=3 orders=[[1, 0]] : (f32[6, 3] strides [1, 6]) {" in roundtrip(text)


def test_schedules_and_the_pipeline_are_part_of_the_text() -> None:
    text = function("  input %x : f32[2]", returns="%x") + (
        '\nschedule steps = {"rows": [[1, 0.5, null, true, "a"], []]}\n\npipeline "remove-dead-code"\npipeline "slice-groups{memory_budget=10%}"\n'
    )
    program = ir.parse(text)
    assert program.schedules == {"steps": {"rows": [[1, 0.5, None, True, "a"], []]}}
    assert program.pipeline == "remove-dead-code,slice-groups{memory_budget=10%}"
    assert roundtrip(text) == str(program)


@pytest.mark.parametrize("number", [1e-05, 1e22, -0.0, 2**62, -3, 1.5e300])
def test_schedule_numbers_survive(number: float) -> None:
    text = function("  input %x : f32[2]", returns="%x") + f"\nschedule s = {json.dumps([number])}\n"
    again = ir.parse(str(ir.parse(text))).schedules["s"][0]
    assert type(again) is type(number) and repr(again) == repr(number)


def test_provenance_is_read_back_and_other_comments_are_not() -> None:
    text = call("aten.relu.default(%x)  # [3,5] models/unet.py:41 down.0.attn") + "# a note\n"
    (node,) = ir.parse(text).main.calls
    assert node.meta["origin"] == (3, 5) and str(node.meta["where"]) == "models/unet.py:41 down.0.attn"
    assert "# [3,5] models/unet.py:41 down.0.attn" in roundtrip(text) and "a note" not in roundtrip(text)


# --- names ---

HOSTILE = [
    'n"); import os; os.system("id', "x\nimport os", "lambda", "\u202eevil", "../../x", "", " ", "a b", "%0", "@w", "# no comment", "\0", "é", "0",
    "a.b.", "{", "return", "state", "\\", "\U0001f600", "a\r\nb", "input", "\u2028",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_any_weight_name_is_data(name: str) -> None:
    text = function(
        f"  input %x : f32[2]\n  %0 = aten.add.Tensor(%x, @{json.dumps(name)})",
        before=f'weight @{json.dumps(name)} : f32[2] parameter "?"\n',
    )
    printed = roundtrip(text)
    assert list(ir.parse(printed).weights) == [name]
    if any(not " " <= c <= "~" for c in name):
        assert printed.isascii() and len(printed.splitlines()) == len(text.splitlines())


@pytest.mark.parametrize("name", HOSTILE)
def test_any_input_name_is_data(name: str) -> None:
    text = function(f"  input %{json.dumps(name)} : f32[2]\n  %1000 = aten.relu.default(%{json.dumps(name)})", returns="%1000")
    printed = roundtrip(text)
    assert ir.parse(printed).main.signature().inputs[0].name == name


def test_hostile_names_change_nothing_but_the_name() -> None:
    def text(name: str) -> str:
        return roundtrip(
            function(f"  input %{json.dumps(name)} : f32[2]\n  %1000 = aten.relu.default(%{json.dumps(name)})", returns="%1000")
        )

    for name in HOSTILE:
        spelled = json.dumps(name) if f"%{json.dumps(name)}" in text(name) else name
        assert text(name).replace(f"%{spelled}", "%plain").replace("%plain", "%") == text("plain").replace("%plain", "%")


def test_a_hostile_module_path_stays_in_its_comment() -> None:
    from graphwright.ir.program import Where

    program = ir.parse(call("aten.relu.default(%x)"))
    program.main.calls[0].meta["where"] = Where("a.py", 1, "x\nreturn %0\n}\u202e")
    assert str(program).isascii() and str(ir.parse(str(program))) == str(program)
    assert len(str(program).splitlines()) == len(call("aten.relu.default(%x)").splitlines())


# --- random programs ---


@st.composite
def programs(draw: st.DrawFn) -> str:
    """Texts of small programs: elementwise chains with scalars, views and reductions over one square input."""
    lines, values = ["  input %x : f32[4, 4]"], ["%x"]
    for k in range(draw(st.integers(0, 8))):
        a, b = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        scalar = literal(draw(st.one_of(st.integers(-5, 5), st.floats(width=32))))
        shape = draw(
            st.sampled_from(
                [
                    f"aten.add.Tensor({a}, {b})", f"aten.mul.Tensor({a}, {b})", f"aten.add.Scalar({a}, {scalar})",
                    f"aten.matmul.default({a}, {b})", f"aten.permute.default({a}, [1, 0])", f"aten.softmax.int({a}, {draw(st.integers(-2, 1))})",
                    "aten.cat.default([aten_placeholder])".replace("[aten_placeholder]", f"[{a}, {b}]") + "",
                    f"aten.layer_norm.default({a}, [4], none, none, 1e-05)", f"aten.view.default({a}, [4, 4])", f"aten.where.self(%m, {a}, {b})",
                ]
            )
        )  # fmt: skip
        if "cat.default" in shape:
            lines.append(f"  %{k}c = {shape}")
            shape = f"aten.slice.Tensor(%{k}c, 0, 0, 4)"
        if "view.default" in shape:
            lines.append(f'  %{k}v = aten.clone.default({a}, memory_format=memory_format("contiguous_format"))')
            shape = f"aten.view.default(%{k}v, [2, 8])"
            lines.append(f"  %{k}w = {shape}")
            shape = f"aten.reshape.default(%{k}w, [4, 4])"
        lines.append(f"  %{k} = {shape}")
        values.append(f"%{k}")
    lines.insert(1, "  input %m : bool[4, 4]")
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    gives = f"({', '.join('*' for _ in outputs)})"
    return function("\n".join(lines), takes="((*, *), {})", gives=gives, returns=", ".join(outputs))


@given(programs())
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_random_programs_print_parse_and_run_alike(text: str) -> None:
    program = ir.parse(text)
    again = ir.parse(roundtrip(text))
    inputs = [torch.randn(4, 4), torch.rand(4, 4) > 0.5]
    for a, b in zip(run(program, inputs)[0], run(again, inputs)[0], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()) and a.stride() == b.stride()


# --- errors ---

ERRORS = [
    ("", 1, 1, "expected 'graphwright'"),
    ("graphwright 2\n", 1, 13, "version 2; this graphwright reads version 1"),
    ("graphwright 1\n", 2, 1, "no function main"),
    ("graphwright 1\n  ;", 2, 3, "unexpected character ';'"),
    ("graphwright 1\nfoo", 2, 1, "expected a section"),
    ("graphwright 1\n3", 2, 1, "expected a section"),
    ("graphwright 1\nsymbol _s in [1, 2] hint 1", 2, 8, "symbols are"),
    ("graphwright 1\nsymbol Min in [1, 2] hint 1", 2, 8, "no keyword"),
    ("graphwright 1\nsymbol u0 in [1, 2] hint 1", 2, 8, "not u0, u1"),
    ("graphwright 1\nsymbol s in [1, 2] hint 3", 2, 8, "low <= hint <= high"),
    ("graphwright 1\nsymbol s in [1, 2] hint 1\nsymbol s in [1, 2] hint 1", 3, 8, "each once"),
    ("graphwright 1\nweight @w : f33[1] parameter \"?\"", 2, 13, "unknown dtype f33"),
    ("graphwright 1\nweight @w : f32[1] thing \"?\"", 2, 20, "a weight is one of"),
    ("graphwright 1\nweight @w : f32[1] buffer \"?\"\nweight @w : f32[1] buffer \"?\"", 3, 8, "declared twice"),
    ("graphwright 1\nweight @w : f32[1] buffer \"\\q\"", 2, 27, "bad escape"),
    ("graphwright 1\nsymbol s in [1, 9] hint 1\nweight @w : f32[s] buffer \"?\"", 3, 8, "symbolic size"),
    ("graphwright 1\nweight @w : f32[-1] buffer \"?\"", 2, 17, "-1 is no size"),
    ("graphwright 1\nweight @w : f32[99999999999999999999999] buffer \"?\"", 2, 17, "64 bits"),
    ("graphwright 1\nweight @w : f32[2] strides [1, 1] buffer \"?\"", 2, 13, "1 sizes and 2 strides"),
    ("graphwright 1\nweight @w : f32[q] buffer \"?\"", 2, 17, "unknown symbol q"),
    ("graphwright 1\nweight @w : f32[2 // 0] buffer \"?\"", 2, 19, "division by zero"),
    ("graphwright 1\nweight @w : f32[2 % 0] buffer \"?\"", 2, 19, "division by zero"),
    ("graphwright 1\nweight @w : f32[2] on nowhere buffer \"?\"", 2, 13, "unknown device nowhere"),
    (call("aten.rleu.default(%x)"), 7, 8, "unknown operation aten.rleu.default"),
    (call("aten.relu.default(%y)"), 7, 26, "%y is not defined here"),
    (call("aten.relu.default(@w)"), 7, 26, "weight @w is not declared"),
    (call("aten.relu.default(%x) : f32[2]"), 7, 8, "gives f32\\[2, 3, 4, 4\\], not f32\\[2\\]"),
    (call("aten.matmul.default(%x, 3)"), 7, 8, "does not type-check"),
    (call("aten.relu.default(%x %x)"), 7, 29, "expected ','"),
    (call("aten.add.Tensor(%x, other=%x, other=%x)"), 7, 38, "other is given twice"),
    (call("aten.add.Tensor(other=%x, %x)"), 7, 34, "positional argument follows a named one"),
    (call("aten.relu.default(wat)"), 7, 26, "expected an argument, found wat"),
    (call("aten.relu.default(:)"), 7, 26, "expected an argument"),
    (call('aten.clone.default(%x, memory_format=memory_format("odd"))'), 7, 45, "unknown memory_format odd"),
    (call('aten.clone.default(%x, device=device("odd"))'), 7, 38, "unknown device odd"),
    (function("  input %x : f32[2]\n  input %x : f32[2]", returns="%x", takes="((*, *), {})"), 7, 9, "%x is defined twice"),
    (function("  input %x : f32[2]\n  %x = aten.relu.default(%x)", returns="%x"), 7, 3, "%x is defined twice"),
    (function("  input %x : f32[2]", returns="%x, %x"), 6, 3, "takes 1 and gives 1 leaves, but has 1 inputs and returns 2"),
    (function("  input %x : f32[2]", returns="%x").rstrip("}\n"), 7, 12, "expected"),
    (function("  input %x : f32[2]", returns="%x") + function("  input %x : f32[2]", returns="%x").removeprefix(HEAD), 10, 10, "defined twice"),
    (function("  input %x : f32[2]", returns="%x", takes="*"), 4, 9, "takes a tuple of arguments and a dict of named ones"),
    (function("  input %x : f32[2]", returns="%x", takes="((*), ())"), 4, 9, "takes a tuple of arguments and a dict of named ones"),
    (function("  input %x : f32[2]", returns="%x", takes="((), {7: *})"), 4, 9, "takes a tuple of arguments and a dict of named ones"),
    (function("  input %x : f32[2]", returns="%x", gives='{"a": *, "a": *}'), 5, 18, 'the key "a" is given twice'),
    (HEAD + 'weight @w : f32[3, 9223372036854775807] buffer "?"', 2, 13, "more than 2\\*\\*63 - 1 bytes"),
    (HEAD + 'weight @w : f32[0, 9223372036854775807, 3] buffer "?"', 2, 13, "more than 2\\*\\*63 - 1 bytes"),
    (HEAD + 'weight @w : f32[3] buffer ""', 2, 27, "the hash of a weight is at least 12 hexadecimal digits"),
    (HEAD + 'weight @w : f32[3] buffer "0123456789a"', 2, 27, "the hash of a weight is at least 12 hexadecimal digits"),
    (call('sym.mul("ab", 999999999999)'), 7, 8, "it takes sizes and numbers, not a str"),
    (call("sym.mul([1, 2], 99)"), 7, 8, "it takes sizes and numbers, not a list"),
    (call("sym.add(%x, %x)"), 7, 8, "it takes sizes and numbers, not a FakeTensor"),
    (call("sym.mul(9223372036854775807, 2)"), 7, 8, "the size that it gives does not fit in 64 bits"),
    (call("getitem([1, 2], 0)"), 7, 8, "it takes a result out of a call that has several"),
    (call("aten.add.Scalar(%x, 18446744073709551616)"), 7, 28, "an integer does not fit in 64 bits"),
    (REGION.replace(" count=4", ""), 8, 55, "gw.sliced needs count"),
    (REGION.replace("count=4", "cuont=4"), 8, 55, "gw.sliced has no attribute cuont"),
    (REGION.replace("aten.linear.default(%0, %1)", "aten.linear.default(%0, @w)"), 11, 34, "takes its weights as operands"),
    (REGION.replace("aten.linear.default(%0, %1)", "aten.linear.default(%x, %1)"), 11, 30, "%x is not defined here"),
    (REGION + "schedule s = [1, }", 18, 18, "expected an integer"),
    (REGION + 'pipeline 3', 18, 10, "expected a string"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "column", "message"), ERRORS, ids=range(len(ERRORS)))
def test_a_mistake_says_its_line_and_column(text: str, line: int, column: int, message: str) -> None:
    with pytest.raises(ParseError, match=message) as caught:
        ir.parse(text)
    assert (caught.value.line, caught.value.column) == (line, column), str(caught.value)
    assert str(caught.value).startswith(f"line {line}, column {column}: ")


OPENING = "  %r{0} = gw.sliced(%x{0}) in_dims=[0] out_dims=[0] count=2 {{\n  input %x{1} : f32[4]\n"


@pytest.mark.parametrize(
    "text",
    [
        function("  input %x : f32[2]", returns="%x", takes="(" * 100 + ")" * 100),
        function("  input %x : f32[2]", returns="%x", gives="[" * 5000),
        function("  input %x : f32[2]", returns="%x", gives='{"a": ' * 5000),
        call(f"aten.cat.default({'[' * 5000})"),
        call("aten.relu.default(%x)", f"f32[{'(' * 5000}1{')' * 5000}]"),
        function("  input %x : f32[2]", returns="%x") + "schedule s = " + "[" * 5000,
        function("  input %x0 : f32[4]\n" + "".join(map(OPENING.format, range(5000), range(1, 5001))), returns="%x0"),
    ],
    ids=["tuple", "list", "dict", "argument", "size", "json", "region"],
)
def test_nesting_is_bounded(text: str) -> None:
    with pytest.raises(ParseError, match="nesting is deeper than 64"):
        ir.parse(text)


def test_complex_numbers_do_not_nest_without_bound() -> None:
    with pytest.raises(ParseError):
        ir.parse(call(f"aten.add.Scalar(%x, {'complex(' * 5000}"))


def test_regions_do_not_nest() -> None:
    inner = "    %2 = gw.sliced(%0) in_dims=[0] out_dims=[0] count=1 {\n" * 5000
    with pytest.raises(ParseError):
        ir.parse(REGION[: REGION.index("    %2")] + inner)


@pytest.mark.parametrize(
    "text",
    [
        call("aten.add.Scalar(%x, complex(%x, 1.0))"),
        call('aten.add.Scalar(%x, complex("a", 1.0))'),
        call("aten.add.Scalar(%x, complex(none, 1.0))"),
        call("gw.sliced(%x)"),
        call("gw.sliced(%x) in_dims=3 out_dims=[0] count=1 {\n input %1 : f32[2, 3, 4, 4]\n return %1\n}"),
        call("gw.sliced(%x) in_dims=[0] out_dims=[0] count=0 {\n input %1 : f32[2, 3, 4, 4]\n %2 = aten.relu.default(%1)\n return %2\n}"),
        call(
            "gw.sliced(%x) in_dims=[0] out_dims=[0] count=none {\n input %1 : f32[2, 3, 4, 4]\n %2 = aten.relu.default(%1)\n return %2\n}"
        ),
        call("gw.sliced(%x) in_dims=[9] out_dims=[0] count=1 {\n input %1 : f32[2, 3, 4, 4]\n %2 = aten.relu.default(%1)\n return %2\n}"),
        call("gw.sliced(%x) in_dims=[0] out_dims=[0] count=1 {\n input %1 : f32[2, 3, 4, 4]\n return 3\n}"),
        call("gw.sliced(%x, 3) in_dims=[0, -1] out_dims=[0] count=1 {\n input %1 : f32[2, 3, 4, 4]\n input %2 = 3\n return %1\n}"),
        call("getitem(%x, 99)"),
        call("sym.pow(9, 100000)"),
        call("aten.relu.default(%x)", "f32[4611686018427387904, 4611686018427387904]"),
        call("aten.relu.default(%x)", "f32[2] strides [4611686018427387904]"),
        call("aten.full.default([1000000000000, 1000000000000], 1.0)"),
        HEAD + "symbol s in [1, 9223372036854775807] hint 9223372036854775807\nsymbol inf in [0, 1] hint 0\nweight @w",
        HEAD + "symbol s in [1, 9223372036854775808] hint 1\n",
        HEAD + 'weight @w : f32[2] on cuda:99999999999 buffer "?"\n',
        function("  input %x : size(3 // -1)\n  %0 = sym.add(%x, 1)"),
        function("  input %x : f32[2]", returns="%x") + "schedule s = 1e999999",
        function("  input %x : f32[2]", returns="3 state a = 4"),
        function("  input %x : f32[2]\n  %0 = sym.floordiv(1, 0)"),
        function("  input %x = [[[1]]]", returns="%x"),
        HEAD + 'weight @"\\ud800" : f32[2] buffer "?"',
        HEAD + "symbol s in [0, 4] hint 0\nfunction main {\n  takes ((*), {})\n  gives (*)\n  input %x : f32[4 // s]\n  return %x\n}",
        HEAD + "symbol s in [0, 4] hint 0\nfunction main {\n  takes ((*), {})\n  gives (*)\n  input %x : f32[4 % s]\n  return %x\n}",
        HEAD + "symbol s in [0, 4] hint 0\nfunction main {\n  takes ((*), {})\n  gives (*)\n  input %x : f32[s - 1]\n  return %x\n}",
        HEAD
        + "symbol s in [0, 4] hint 1\nfunction main {\n  takes ((*), {})\n  gives (*)\n  input %x : f32[s, 9223372036854775807, 3]\n  return %x\n}",
    ],
    ids=range(28),
)
def test_odd_text_is_a_program_or_a_parse_error_and_nothing_else(text: str) -> None:
    try:
        str(ir.parse(text))
    except ParseError as error:
        assert error.line >= 1 and error.column >= 1


@given(st.integers(0, len(REGION) - 1), st.sampled_from(list('[](){}%@"#:=,x0-*/ \n\\') + ["", "\u202e", "9" * 30]), st.integers(0, 6))
@settings(max_examples=300)
def test_damaged_text_is_a_program_or_a_parse_error(at: int, piece: str, cut: int) -> None:
    try:
        str(ir.parse(REGION[:at] + piece + REGION[at + cut :]))
    except ParseError:
        pass


def test_a_mistake_leaves_nothing_in_torchs_log(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(ParseError, match="does not type-check: Dimension out of range"):
        ir.parse(call("aten.sum.dim_IntList(%x, [9])"))
    assert not caplog.records and capfd.readouterr().err == ""


def test_a_size_does_not_grow_without_bound() -> None:
    squares = "\n".join(f"  %{k + 1} = sym.mul(%{k}, %{k})" for k in range(60))
    with pytest.raises(ParseError, match="more than 1024 terms when it is multiplied out"):
        ir.parse(function(f"  input %x : size(n)\n  %0 = sym.add(%x, 1)\n{squares}", before="symbol n in [0, 64] hint 5\n"))


STATEFUL = function(
    """  state %cache : f32[5, 4]
  input %x : f32[n, 4] strides [1, n]
  input %mode = "tanh"
  %0 = aten.add.Tensor(%cache, @w, alpha=2) : f32[5, 4]  # [0] model.py:3 mix
  %1 = aten.sym_size.int(%x, 0) : size(n)
  %2 = sym.mul(%1, 4) : size(4*n)
  %3 = aten.split.Tensor(%x, 2, 1)
  %4 = getitem(%3, 1)
  %5 = aten.reshape.default(%x, [%2]) : f32[4*n]
  %6 = aten.index.Tensor(%4, [none, @i]) : f32[n, 3]
  %7 = aten._to_copy.default(%6, dtype=bf16, device=device("cpu"))""",
    takes='((*), {"mode": *})', gives='{"sum": *, "rest": [*, (*)]}', returns="%5, %7, none state cache = %0",
    before='symbol n in [1, 64] hint 5\nweight @w : f32[4] parameter "?"\nweight @i : i64[3] constant "?"\nweight @cache : f32[5, 4] state "?"\n',
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A program some of whose tokens or lines are gone, moved, doubled or another's."""
    text = draw(st.sampled_from([REGION, STATEFUL]))
    for _ in range(draw(st.integers(1, 3))):
        pieces = text.splitlines(keepends=True) if draw(st.booleans()) else re.findall(r'"[^"\n]*"|[%@]?[\w.]+|\s+|.', text)
        at, other = draw(st.integers(0, len(pieces) - 1)), draw(st.integers(0, len(pieces) - 1))
        odd = [
            "0",
            "-1",
            "7",
            "9223372036854775807",
            "nan",
            "none",
            "true",
            "[]",
            "[0, 0]",
            "%x",
            "@w",
            '"a"',
            "f64",
            "\0",
            "units=0",
            "sym.pow",
        ]
        pieces[at] = draw(st.sampled_from(["", pieces[other], pieces[at] * 2, *odd]))
        text = "".join(pieces)
    return text


@given(damaged())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_damaged_is_a_program_or_an_error_of_one_sentence(text: str) -> None:
    try:
        program = ir.parse(text)
        ir.verify(program)
    except (ParseError, VerifyError) as error:
        assert "\n" not in str(error)
    else:
        assert str(ir.parse(str(program))) == str(program)


def test_limits_name_what_is_too_large() -> None:
    with pytest.raises(ParseError, match="a name is longer than 1024"):
        ir.parse(function(f"  input %{'a' * 2000} : f32[2]"))
    with pytest.raises(ParseError, match="a tensor has 65 sizes"):
        ir.parse(function(f"  input %x : f32[{', '.join(['1'] * 65)}]"))
    digits = getattr(sys, "get_int_max_str_digits", lambda: 4300)()
    with pytest.raises(ParseError, match="an integer does not fit in 64 bits"):
        ir.parse(call(f"aten.add.Scalar(%x, {'9' * (digits + 10)})"))


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "torch.ops.load_library", "aten.__class__", "aten.from_file.default", "aten._print.default", "aten.set_.source_Storage", "aten.relu.__class__",
        "builtins.eval", "prims.__init__", "_c10d_functional.all_reduce.default", "getattr", "aten.save", "gw.sliced.default", "sym.__import__",
    ],
)  # fmt: skip
def test_only_the_closed_vocabulary_can_be_called(name: str) -> None:
    with pytest.raises(ParseError, match="unknown operation"):
        ir.parse(call(f"{name}(%x)"))


MANY = "".join(f"symbol s{n} in [2, 1000] hint {n + 3}\n" for n in range(8))
NESTED = "(" * 60 + "s0" + "".join(f" * s{n % 8} + {n}) {{0}} (s{(n + 1) % 8} + {n + 1})" for n in range(60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (call("aten.split.Tensor(%x, 1)", argument="f32[1000000000000]"), "it gives 1000000000000 tensors, more than the limit of 16384"),
        (call("aten.unbind.int(%x, 0)", argument="f32[100000000]"), "it gives 100000000 tensors"),
        (call("aten.chunk.default(%x, 100000000)", argument="f32[100000000]"), "it gives 100000000 tensors"),
        (call("aten.tensor_split.sections(%x, 1000000000)"), "it gives 1000000000 tensors"),
        (HEAD + "schedule s = [" + "0, " * 600_000, "have more than 524288 items"),
        (HEAD + "".join(f"symbol n{n} in [0, 9] hint 2\n" for n in range(1025)), "more than 1024 symbols"),
        (HEAD + "(" * 10**8, "expected a section"),
        (HEAD + '"' + "a" * 10**8 + '"', "expected a section"),
        (HEAD + "weight @w : f32[" + "9223372036854775807*" * 200_000 + "0]", "a size does not fit in 64 bits"),
        (HEAD + "weight @w : f32[" + "1+" * 200_000 + "0]", "a size has more than 256 terms"),
        (HEAD + "schedule s = 1\nschedule s = 2", "schedule s is given twice"),
        (HEAD + 'schedule s = {"a": 1, "a": 2}', 'the key "a" is given twice'),
        (HEAD + 'weight @"a\\nb\\u202e" : f32[1] buffer "?"\n' * 2, r"weight a\\nb\\u202e is declared twice"),
        (call("aten.add.Scalar(%x, \u0663)"), "unexpected character '\\\\u0663'"),
        (HEAD + MANY + f"weight @w : f32[{NESTED.format('//')}]", "too many products inside quotients"),
        (HEAD + MANY + f"weight @w : f32[{NESTED.format('%')}]", "too many products inside quotients"),
        (call("aten.histogramdd.default(%x, [1000000000, 4])", argument="f32[4, 2]"), "unknown operation aten.histogramdd.default"),
    ],
    ids=range(17),
)
def test_a_short_or_early_refusal_takes_no_time_or_memory(text: str, message: str) -> None:
    """Each of these took minutes or gigabytes, or was read as something else."""
    with pytest.raises(ParseError, match=message) as refused:
        ir.parse(text)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


@pytest.mark.parametrize("hints", [(0, 0), (0, 1), (5, 5)])
@pytest.mark.parametrize(
    "lines",
    [
        ["%s = sym.add(%a, %b)", *(f"%{n} = sym.mul(%{n - 1 if n else 's'}, %{n - 1 if n else 's'})" for n in range(60))],
        ["%s = sym.add(%a, 1)", *(f"%{n} = sym.mul(%{n - 1 if n else 's'}, %a)" for n in range(100)), "%z = sym.mul(%99, %99)"],
        ["%s = sym.add(%a, %b)", "%0 = sym.pow(%s, 64)"],
        ["%s = sym.add(%a, %b)", f"%0 = aten.zeros.default([{', '.join(['%s'] * 20)}])"],
    ],
    ids=["squares", "powers", "a power", "a shape"],
)
def test_a_size_that_is_small_at_capture_does_not_grow_without_bound_either(hints: tuple[int, int], lines: list[str]) -> None:
    body = "".join(f"  {line}\n" for line in lines)
    symbols = "".join(f"symbol {name} in [0, 64] hint {hint}\n" for name, hint in zip("nm", hints, strict=True))
    text = function(f"  input %a : size(n)\n  input %b : size(m)\n{body.rstrip()}", before=symbols, takes="((*, *), {})")
    with pytest.raises(ParseError, match="more than 1024 terms|does not fit in 64 bits"):
        ir.parse(text)


@pytest.mark.parametrize(
    ("count", "size", "operation", "message"),
    [
        (1000, "s{n}", "aten.cat.default([{all}])", "it reads 1000 symbols, more than the limit of 256"),
        (2000, "4, 4", "aten.chain_matmul.default([{all}])", "it multiplies 2000 matrices, more than the limit of 128"),
    ],
)
def test_a_call_reads_a_bounded_number_of_symbols_and_factors(count: int, size: str, operation: str, message: str) -> None:
    """These took eight seconds and ten."""
    symbols = "".join(f"symbol s{n} in [2, 9] hint 3\n" for n in range(count)) if "s{n}" in size else ""
    inputs = "".join(f"  input %x{n} : f32[{size.format(n=n)}]\n" for n in range(count))
    call = operation.format(all=", ".join(f"%x{n}" for n in range(count)))
    with pytest.raises(ParseError, match=message):
        ir.parse(function(f"{inputs}  %0 = {call}", before=symbols, takes=f"(({', '.join('*' * count)}), {{}})"))


def test_sizes_of_deep_stacks_of_strided_convolutions_are_read() -> None:
    """The bound on quotients is none on these: 30 nested ones, of one symbol or with another added at each."""
    for inner in ("s0", "(s0 + s1)"):
        size = "(" * 30 + inner + "".join(f" + {n % 3}) // {2 + n % 2} + s{n % 8}" for n in range(30))
        program = ir.parse(function(f"  input %x : f32[{size}]\n  %0 = aten.relu.default(%x)", before=MANY, takes="((*), {})"))
        assert str(ir.parse(str(program))) == str(program)


@pytest.mark.parametrize("origin", ["9" * 5000, "1," * 10])
def test_a_comment_of_no_provenance_is_a_comment(origin: str) -> None:
    text = call("aten.relu.default(%x)").replace("relu.default(%x)", f"relu.default(%x)  # [{origin}] model.py:{'9' * 5000} mix")
    (node,) = ir.parse(text).main.calls
    assert node.meta["origin"] == () and node.meta["where"].line == 0


# --- weights ---


def test_text_without_weights_prints_verifies_and_compares_but_does_not_run() -> None:
    program = ir.capture(torch.nn.Linear(3, 2), (torch.ones(4, 3),))
    bare = ir.parse(str(program))
    ir.verify(bare)
    assert bare == program and str(bare) == str(program)
    with pytest.raises(InputError, match="weight weight has no values: this program was read from text"):
        run(bare, [torch.ones(4, 3)])


def test_text_with_its_weights_runs_as_the_program_did() -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)).eval(), torch.randn(4, 3)
    program = ir.capture(model, (x,))
    filled = ir.parse(str(program), weights={**model.state_dict()})
    assert torch.equal(run(filled, [x])[0][0], run(program, [x])[0][0])
    assert ir.parse(str(program), weights=program.weights) == program


def test_a_weight_table_must_be_the_one_that_the_text_names() -> None:
    program = ir.capture(torch.nn.Linear(3, 2), (torch.ones(4, 3),))
    good = {name: weight.tensor for name, weight in program.weights.items()}
    for table, message in [
        ({"weight": good["weight"]}, "the weight table has no bias"),
        ({**good, "bias": torch.ones(3)}, "bias is torch.float32\\[3\\] in the weight table"),
        ({**good, "bias": good["bias"].double()}, "bias is torch.float64\\[2\\] in the weight table"),
        ({**good, "bias": good["bias"] + 1}, "bias has other contents in the weight table"),
    ]:
        with pytest.raises(ParseError, match=message):
            ir.parse(str(program), weights=table)


def test_programs_that_differ_in_one_element_of_a_weight_are_not_equal() -> None:
    model = torch.nn.Linear(3, 2)
    before = ir.capture(model, (torch.ones(4, 3),))
    text = str(before)
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert str(ir.capture(model, (torch.ones(4, 3),))) != text


def test_nan_inputs_are_equal_to_themselves() -> None:
    text = function("  input %x : f32[2]\n  input %c = nan", returns="%x", takes="((*, *), {})")
    assert ir.parse(text) == ir.parse(text) and math.isnan(ir.parse(text).main.signature().inputs[1].value)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_strides_of_dims_of_size_1_tell_the_layout_of_later_results(memory_format: torch.memory_format) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 1)).eval()
    program = ir.capture(net, (torch.randn(2, 1, 8, 8).contiguous(memory_format=memory_format),))
    assert str(ir.parse(str(program))) == str(program)


@pytest.mark.parametrize("length", [64, 129])
def test_a_sliced_decoder_at_batch_1_parses_back(length: int) -> None:
    transformers = pytest.importorskip("transformers", reason="install the test extra: pip install graphwright[test]")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160
    )
    net = transformers.LlamaForCausalLM(config).eval()
    program = ir.capture(net, (), {"input_ids": torch.randint(0, 64, (1, length)), "use_cache": False})
    sliced = PassManager("slice-groups{memory_budget=10%}").run(program).program
    assert "gw.sliced" in str(sliced)
    assert str(ir.parse(str(sliced))) == str(sliced)


def test_strides_are_read_as_they_are_written_whatever_dims_of_size_1_have() -> None:
    rng = random.Random(0)
    for _ in range(100):
        shape = [rng.choice([1, 1, 2, 3]) for _ in range(rng.choice([4, 5]))]
        order = rng.sample(range(len(shape)), len(shape))
        tensor = torch.empty([shape[d] + rng.choice([0, 0, 1]) for d in order])[tuple(slice(shape[d]) for d in order)]
        tensor = tensor.permute([order.index(d) for d in range(len(shape))])
        written = type_text(tensor, ir.SymbolTable())
        read = ir.parse(call("aten.relu.default(%x)", argument=written)).main.placeholders[0].meta["val"]
        assert (read.shape, read.stride()) == (tensor.shape, tensor.stride())
