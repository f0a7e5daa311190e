"""Capture: any module becomes a program with its user's names, trees and lines, or an error that lists every blocker."""

import inspect
import random
import sys
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import Dim

from graphwright import compile, ir
from graphwright.ir.errors import CaptureError, GraphwrightError, InputError
from graphwright.ir.run import run
from graphwright.ir.tree import unflatten


def capture(model, *args, **options) -> ir.Program:
    program = ir.capture(model, args, **options)
    ir.verify(program)
    assert ir.parse(str(program)) == program
    return program


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.weight


# --- dynamic sizes ---


def test_symbols_have_the_users_names_and_ranges() -> None:
    dims = {"x": {0: Dim("batch", min=2, max=64), 1: Dim("length", max=512)}}
    model = nn.Linear(4, 3)
    program = ir.capture(Wrapped(model), (torch.ones(5, 7, 4),), dynamic_shapes=dims)
    assert [(s.name, s.low, s.high, s.hint) for s in program.symbols] == [("batch", 2, 64, 5), ("length", pytest.approx(1, abs=2), 512, 7)]
    assert "input %x : f32[batch, length, 4]" in str(program)
    x = torch.randn(3, 9, 4)
    assert torch.equal(run(program, [x])[0][0], model(x))


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def test_a_dim_shared_by_two_inputs_is_one_symbol() -> None:
    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    rows = Dim("rows", max=32)
    program = capture(Add(), torch.ones(5, 2), torch.ones(5, 2), dynamic_shapes={"x": {0: rows}, "y": {0: rows}})
    assert [s.name for s in program.symbols] == ["rows"]
    assert "input %x : f32[rows, 2]" in str(program) and "input %y : f32[rows, 2]" in str(program)


def test_unnamed_dims_are_numbered() -> None:
    program = capture(Scale(), torch.ones(5, 7, 4), dynamic_shapes={"x": {0: Dim.AUTO, 1: Dim.DYNAMIC}})
    assert [s.name for s in program.symbols] == ["s0", "s1"]


def test_a_padded_dynamic_dim_stays_dynamic() -> None:
    """torch pads fake tensors in C++ code that takes a symbol for its value at capture."""

    class Pad(nn.Module):
        def forward(self, x):
            return nn.functional.pad(x, (0, 0, 1, 1))

    program = capture(Pad(), torch.ones(5, 4), dynamic_shapes={"x": {0: Dim("rows", max=32)}})
    assert ": f32[rows + 2, 4]" in str(program)


@pytest.mark.parametrize(
    "example", [torch.ones(10, 12)[:, ::2], torch.ones(12, 10).t()[:, ::2], torch.ones(10, 1).expand(10, 6)], ids=range(3)
)
def test_an_example_with_gaps_between_its_elements_may_have_dynamic_dims(example: torch.Tensor) -> None:
    class Flat(nn.Module):
        def forward(self, x):
            return x.reshape(-1) * 2

    rows = {"x": {1: Dim("n", min=2, max=64)}}
    model = compile(Flat(), backend="aten", example_inputs=(example,), dynamic_shapes=rows)
    for x in (example, torch.randn(10, 24)[:, ::2], torch.randn(10, 9), torch.randn(9, 10).t(), torch.randn(10, 40)[:, :30]):
        assert torch.equal(model(x), Flat()(x))
    exported = torch.export.export(Flat(), (example,), dynamic_shapes=rows)
    with pytest.raises(CaptureError, match=r"input x has dynamic sizes, and its example has gaps .* export with x.contiguous\(\)"):
        ir.from_exported(exported)


def test_a_question_about_a_size_does_not_fix_it() -> None:
    symbols = ir.SymbolTable()
    n = symbols.declare(ir.Symbol("n", 0, 64, 6))
    assert n == 6 and symbols.text(n) == "n" and not n == 7


def test_dims_inside_a_list_get_their_names() -> None:
    class Sum(nn.Module):
        def forward(self, xs):
            return xs[0].sum() + xs[1].sum()

    dims = {"xs": [{0: Dim("first", max=9)}, {0: Dim("second", max=9)}]}
    program = capture(Sum(), [torch.ones(5), torch.ones(7)], dynamic_shapes=dims)
    assert [s.name for s in program.symbols] == ["first", "second"]


def test_a_dim_that_the_code_fixes_is_a_blocker_with_its_line() -> None:
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(5, -1) if x.size(0) == 5 else x * 2

    line = inspect.getsourcelines(Fixed.forward)[1] + 1
    with pytest.raises(CaptureError, match=rf"test_ir_capture.py:{line}"):
        ir.capture(Fixed(), (torch.ones(5, 4),), dynamic_shapes={"x": {0: Dim("rows", max=32)}})


# --- trees ---


def test_keyword_arguments_nested_inputs_and_outputs() -> None:
    class Nested(nn.Module):
        def forward(self, pair, *, options, scale=2.0):
            a, b = pair
            return {"sum": a + b, "rest": [options["bias"] * scale, (a,)]}

    args, kwargs = ((torch.ones(3), torch.ones(3)),), {"options": {"bias": torch.ones(2)}, "scale": 3.0}
    program = ir.capture(Nested(), args, kwargs)
    ir.verify(program)
    leaves = run(program, pytree.tree_leaves((args, kwargs)))[0]
    result = unflatten(program.main.out_tree.to_spec(), leaves)
    expected = Nested()(*args, **kwargs)
    assert pytree.tree_structure(result) == pytree.tree_structure(expected)
    assert all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(result), pytree.tree_leaves(expected)))
    assert ir.parse(str(program)) == program


@dataclass
class Boxed:
    first: torch.Tensor
    second: torch.Tensor


pytree.register_dataclass(Boxed, serialized_type_name="test_ir_capture.Boxed")


@dataclass
class Unregistered:
    first: torch.Tensor


def test_a_registered_dataclass_is_returned_as_itself() -> None:
    class Boxes(nn.Module):
        def forward(self, x):
            return Boxed(x + 1, x * 2)

    program = capture(Boxes(), torch.ones(3))
    result = unflatten(program.main.out_tree.to_spec(), run(program, [torch.ones(3)])[0])
    assert isinstance(result, Boxed) and torch.equal(result.second, torch.full((3,), 2.0))
    assert 'gives object "test_ir_capture.Boxed"' in str(program)


def test_a_class_that_torch_does_not_know_is_an_error_that_says_what_to_do() -> None:
    class Boxes(nn.Module):
        def forward(self, x):
            return Unregistered(x + 1)

    with pytest.raises(CaptureError, match="Unregistered"):
        ir.capture(Boxes(), (torch.ones(3),))


def test_outputs_of_transformers_keep_their_class() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 16}
    model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    tokens = torch.ones(1, 4, dtype=torch.long)
    program = ir.capture(model, (tokens,))
    result = unflatten(program.main.out_tree.to_spec(), run(program, [tokens])[0])
    expected = model(tokens)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)  # float32, other order of sums


# --- constants and None ---


def test_constant_inputs_are_leaves_with_their_value() -> None:
    class Modes(nn.Module):
        def forward(self, x, mode, mask=None, flag=True, factor=0.5):
            y = x * factor if flag else x
            return (y.relu() if mode == "relu" else y), mask

    program = capture(Modes(), torch.ones(3), "relu", None, True, 0.25)
    assert [(a.is_constant, None if not a.is_constant else a.value) for a in program.main.signature().inputs] == [
        (False, None), (True, "relu"), (True, None), (True, True), (True, 0.25),
    ]  # fmt: skip
    outputs = run(program, [torch.ones(3), "relu", None, True, 0.25])[0]
    assert torch.equal(outputs[0], torch.full((3,), 0.25)) and outputs[1] is None


def test_a_model_without_inputs_or_calls() -> None:
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.ones(2))

        def forward(self):
            return self.value

    program = capture(Constant())
    assert torch.equal(run(program, [])[0][0], torch.ones(2))


# --- state ---


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("fixed", torch.ones(3))

    def forward(self, x):
        self.count.add_(x)
        return self.count * 2 + self.fixed


def test_a_mutated_buffer_is_a_state_and_others_are_not() -> None:
    model = Counter()
    program = capture(model, torch.ones(3))
    signature = program.main.signature()
    assert [s.name for s in signature.states] == ["count"] and signature.new_states == ("count",)
    assert (program.weights["count"].kind, program.weights["fixed"].kind) == ("state", "buffer")
    outputs, states = run(program, [torch.ones(3)], states={"count": torch.full((3,), 5.0)})
    assert torch.equal(outputs[0], torch.full((3,), 13.0)) and torch.equal(states["count"], torch.full((3,), 6.0))
    assert torch.equal(model.count, torch.zeros(3))


def test_a_mutated_input_gets_a_new_value() -> None:
    class Mutates(nn.Module):
        def forward(self, x, y):
            y.mul_(2)
            return x + y

    y = torch.ones(3)
    program = capture(Mutates(), torch.ones(3), y)
    assert program.main.signature().new_states == ("input:y",)
    outputs, states = run(program, [torch.ones(3), torch.ones(3)])
    assert torch.equal(outputs[0], torch.full((3,), 3.0)) and torch.equal(states["input:y"], torch.full((3,), 2.0))
    assert torch.equal(y, torch.ones(3))


def test_train_and_eval_are_captured_as_they_are() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(4)), torch.randn(8, 4)
    trained = capture(model.train(), x)
    assert {"0.running_mean", "0.running_var"} <= set(trained.main.signature().new_states)
    assert capture(model.eval(), x).main.signature().new_states == () and not model.training


class Statistics(nn.Module):
    """Norms twice, so that the second call starts from what the first one made of the statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, momentum=0.3, track_running_stats=True)

    def forward(self, x):
        return self.norm(self.norm(x) * 2 + 1) + self.norm.running_mean[0]


@pytest.mark.parametrize("dims", [None, {"x": {0: Dim("batch"), 2: Dim("length", min=2)}}], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instance_norm_in_training_gives_new_statistics_and_writes_none(dims, dtype) -> None:
    model, x = Statistics().train(), torch.randn(3, 4, 9, dtype=dtype)
    program = capture(model, x, dynamic_shapes=dims)
    assert program.main.signature().new_states == ("norm.running_mean", "norm.running_var")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs, states = run(program, [x], states=before)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    # Sums are taken in another order, and torch rounds the statistics of each instance to the dtype of x.
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(outputs[0], model(x), rtol=rounding, atol=rounding)
    for name, new in states.items():
        torch.testing.assert_close(new, model.get_buffer(name), rtol=rounding, atol=rounding)


def test_running_statistics_that_are_inputs_get_new_values_and_constants_are_refused() -> None:
    class Norm(nn.Module):
        def forward(self, x, mean, var):
            return nn.functional.instance_norm(x, mean, var, use_input_stats=True)

    class Fixed(Norm):
        def forward(self, x, mean, var):
            return super().forward(x, torch.zeros(4), self.var)

    fixed, inputs = Fixed(), (torch.randn(3, 4, 9), torch.zeros(4), torch.ones(4))
    fixed.var = torch.ones(4)
    assert capture(Norm(), *inputs).main.signature().new_states == ("input:mean", "input:var")
    with pytest.raises(CaptureError, match="instance_norm.default writes to var: register it as a buffer"):
        capture(fixed, *inputs)


def test_other_writers_of_statistics_are_a_blocker_with_their_line() -> None:
    class Update(nn.Module):
        def forward(self, x, mean, var):
            return torch.ops.aten.batch_norm_update_stats(x, mean, var, 0.1)[0]

    line = inspect.getsourcelines(Update.forward)[1] + 1
    with pytest.raises(CaptureError, match=rf"test_ir_capture.py:{line}: aten.batch_norm_update_stats.default writes its running stat"):
        capture(Update(), torch.randn(3, 4), torch.zeros(4), torch.ones(4))


# --- what the export leaves undecided ---


class Undecided(nn.Module):
    """What may copy or not, and writes that nothing reads by another name."""

    def __init__(self):
        super().__init__()
        self.proj, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x):
        first, second = self.norm(self.proj(x).float()).contiguous().chunk(2, -1)
        y = first * 2
        y += second
        y = nn.functional.relu(y, inplace=True)
        joined = self.drop(torch.cat([second, first], -1)).t()
        return joined.reshape(-1), joined.contiguous(), y.to(torch.float64), joined.masked_fill(joined > 1, 0).flatten()


def test_a_plain_model_is_traced_once_and_gives_what_torch_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Undecided().eval(), torch.randn(3, 4)
    exported = torch.export.export(model, (x,))
    expected = ir.from_exported(exported.run_decompositions({}))
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    program = capture(model, x)
    assert program == expected == ir.from_exported(exported)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(program, [x])[0], model(x), strict=True))


def writes_a_view(x):
    y = x * 2
    y[0].add_(1)
    return y


def writes_what_a_view_shows(x):
    y = x * 2
    row = y[0]
    y.mul_(3)
    return row


def writes_a_view_and_returns_both(x):
    y = x * 2
    flat = y.view(-1)
    flat.mul_(3)
    return y, flat


def writes_what_reshape_may_not_have_copied(x):
    y = x * 2
    y.reshape(-1).add_(1)
    return y


def writes_one_of_two_chunks(x):
    first, second = (x * 2).chunk(2, -1)
    first.add_(second)
    return first, second


def writes_through_a_noop(x):
    y = x * 2
    y.to(torch.float32).add_(1)
    return y


def writes_after_the_last_read(x):
    y = x * 2
    total = y[0].sum()
    return y.add_(1) * total


def writes_another_dtype(x):
    y = torch.empty(3, 4, dtype=torch.float64)
    y.copy_(x)
    return y


def writes_a_list(x):
    first, second = x * 2, x * 3
    torch._foreach_add_([first, second], 1.0)
    return first, second


def writes_twice(x):
    y = x * 2
    y.t().add_(1)
    return y.mul_(y.sum())


@pytest.mark.parametrize(
    "function",
    [
        writes_a_view, writes_what_a_view_shows, writes_a_view_and_returns_both, writes_what_reshape_may_not_have_copied,
        writes_one_of_two_chunks, writes_through_a_noop, writes_after_the_last_read, writes_another_dtype, writes_a_list,
        writes_twice,
    ],
)  # fmt: skip
def test_a_write_is_seen_by_every_name_of_its_memory(function) -> None:
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    x = torch.randn(3, 4)
    outputs = run(capture(Model(), x), [x])[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, pytree.tree_leaves(function(x)), strict=True))


def test_a_write_that_torch_leaves_too_is_a_blocker_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def forward(self, x):
            y = x * 2
            y[0].add_(1)
            return y

    exported = torch.export.export(Model(), (torch.ones(3, 4),))
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", lambda self, table: self)
    line = inspect.getsourcelines(Model.forward)[1] + 2
    with pytest.raises(CaptureError, match=rf"test_ir_capture.py:{line}: aten.add_.Tensor writes to what is read elsewhere"):
        ir.from_exported(exported)


def test_an_unused_draw_stays_so_that_later_ones_are_the_same() -> None:
    class Model(nn.Module):
        def forward(self, x):
            torch.rand(3)
            return x + torch.randn(3)

    program = capture(Model(), torch.ones(3))
    torch.manual_seed(0)
    expected = Model()(torch.ones(3))
    torch.manual_seed(0)
    assert torch.equal(run(program, [torch.ones(3)])[0][0], expected)


# --- weights and provenance ---


def test_weights_are_shared_by_name_and_not_copied() -> None:
    model = Wrapped(nn.Linear(4, 3))
    program = capture(model, torch.ones(2, 4))
    assert set(program.weights) == {"model.weight", "model.bias"}
    assert program.weights["model.weight"].tensor.data_ptr() == model.model.weight.data_ptr()
    assert all(weight.kind == "parameter" for weight in program.weights.values())


def test_every_call_knows_the_users_line_and_module() -> None:
    program = capture(Wrapped(Wrapped(Scale())), torch.ones(2, 4))
    (node,) = program.main.calls
    line = inspect.getsourcelines(Scale.forward)[1] + 1
    assert node.meta["origin"] == (0,) and str(node.meta["where"]) == f"test_ir_capture.py:{line} model.model"


def test_two_captures_are_one_text() -> None:
    model = Counter()
    assert str(ir.capture(model, (torch.ones(3),))) == str(ir.capture(model, (torch.ones(3),)))


def test_an_exported_program_is_captured_too() -> None:
    model, x = Wrapped(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    program = ir.from_exported(torch.export.export(model, (x,)))
    assert program == ir.capture(model, (x,)) and torch.equal(run(program, [x])[0][0], model(x))


def test_composites_stay_whole() -> None:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.group, self.proj, self.conv = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Linear(4, 4), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            y = nn.functional.scaled_dot_product_attention(self.proj(self.norm(x)), x, x)
            return self.conv(self.group(y))

    names = {str(node.target) for node in capture(Block().eval(), torch.randn(1, 4, 5, 4)).main.calls}
    assert {
        "aten.layer_norm.default", "aten.linear.default", "aten.scaled_dot_product_attention.default", "aten.group_norm.default", "aten.conv2d.default",
    } <= names  # fmt: skip


# --- errors ---


class TwoBranches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            x = x + 1
        y = x * 2
        if y.max() > 3:
            y = y - 1
        return y


def test_all_blockers_are_listed_at_once_each_with_its_line() -> None:
    first = inspect.getsourcelines(TwoBranches.forward)[1]
    with pytest.raises(CaptureError) as caught:
        ir.capture(TwoBranches(), (torch.ones(3),))
    message = str(caught.value)
    assert "cannot be captured for 2 reasons" in message
    for line in (first + 1, first + 4):
        assert f"test_ir_capture.py:{line}: control flow depends on tensor values: use torch.where, or make the value an input" in message


class Doubled(nn.Module):
    def forward(self, x):
        return torch.ops.capture_test.double(x) + 1


def test_an_operation_outside_the_vocabulary_is_a_blocker_with_its_line() -> None:
    line = inspect.getsourcelines(Doubled.forward)[1] + 1
    with torch.library._scoped_library("capture_test", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
        with pytest.raises(
            CaptureError, match=f"at test_ir_capture.py:{line}: capture_test.double.default has no place in the IR: replace"
        ):
            ir.capture(Doubled(), (torch.ones(3),))


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def is_written_or_refused(model: nn.Module, *args: torch.Tensor) -> bool:
    """Whether the program's text reads back; a CaptureError is the only other end."""
    try:
        program = ir.capture(model, args)
    except CaptureError:
        return False
    assert ir.parse(str(program)) == program
    return True


DTYPES = {x for x in vars(torch).values() if isinstance(x, torch.dtype)}
WRITTEN = {x for x in DTYPES if x.is_floating_point and x != torch.float4_e2m1fn_x2 or x.is_complex} | {
    torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_every_dtype_has_a_text_or_is_refused(dtype: torch.dtype) -> None:
    try:
        given = torch.empty(4, dtype=dtype)
    except (RuntimeError, NotImplementedError):
        given = None  # torch itself makes no such tensor
    if given is not None:
        assert is_written_or_refused(Returns(lambda x: (x, x.detach())), given) == (dtype in WRITTEN)
    assert is_written_or_refused(Returns(lambda x: x.view(dtype)), torch.zeros(64, dtype=torch.uint8)) <= (dtype in WRITTEN)


@pytest.mark.parametrize("key", ["a", 'a "b"', 7, -7, True, 2.5, None, ("a", 1), torch.float32], ids=str)
def test_every_key_has_a_text_or_is_refused(key: object) -> None:
    is_plain = isinstance(key, str | int) and key is not True
    assert is_written_or_refused(Returns(lambda x: {key: x + 1}), torch.ones(2)) == is_plain
    assert is_written_or_refused(Returns(lambda x: OrderedDict({key: x + 1})), torch.ones(2)) >= is_plain


def test_a_lazy_conjugate_is_no_weight() -> None:
    model = Scale()
    model.weight = nn.Parameter(torch.ones(4, dtype=torch.complex64).conj())
    with pytest.raises(CaptureError, match=r"weight weight is a lazy conjugate: hold its .resolve_conj\(\)"):
        ir.capture(model, (torch.ones(4),))


def test_what_needs_a_blocked_result_is_no_reason_of_its_own() -> None:
    class Cond(nn.Module):
        def forward(self, x):
            y = torch.cond(x.sum() > 0, lambda x: (x + 1, x * 2), lambda x: (x - 1, x * 3), (x,))
            return (y[0] + y[1]).relu()

    line = inspect.getsourcelines(Cond.forward)[1] + 1
    with pytest.raises(CaptureError, match=f"the model cannot be captured, at test_ir_capture.py:{line}: cond has no place in the IR"):
        ir.capture(Cond(), (torch.ones(3),))


def test_a_torch_without_the_private_report_still_gives_a_capture_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._logging.structured, "INTERN_TABLE")
    with pytest.raises(CaptureError, match="cannot be captured"):
        ir.capture(TwoBranches(), (torch.ones(3),))
    monkeypatch.setattr(torch.export, "draft_export", lambda *args, **options: None)
    with pytest.raises(CaptureError, match="cannot be captured"):
        ir.capture(TwoBranches(), (torch.ones(3),))


def test_one_blocker_is_one_sentence() -> None:
    class Branch(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x + 1
            return x

    with pytest.raises(
        CaptureError, match=r"the model cannot be captured, at test_ir_capture.py:\d+: control flow depends on tensor values"
    ):
        ir.capture(Branch(), (torch.ones(3),))


def test_a_value_that_leaves_for_python_is_a_blocker_with_its_line() -> None:
    class Leaves(nn.Module):
        def forward(self, x):
            return x * float(np.asarray(x.detach().numpy()).sum())

    line = inspect.getsourcelines(Leaves.forward)[1] + 1
    with pytest.raises(CaptureError, match=f"test_ir_capture.py:{line}"):
        ir.capture(Leaves(), (torch.ones(3),))


@pytest.mark.parametrize(
    "model",
    [None, 3, "resnet", lambda x: x, torch.relu, nn.Linear, torch.ones(3)],
    ids=["none", "number", "text", "lambda", "function", "class", "tensor"],
)
def test_what_is_no_module_is_refused_by_one_of_our_errors(model: object) -> None:
    with pytest.raises(CaptureError, match="only an nn.Module is captured"):
        ir.capture(model, (torch.ones(3),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "args",
    [(), (torch.ones(3), torch.ones(3)), (torch.ones(3, 5),), ("text",), (None,)],
    ids=["none", "two", "shape", "text", "None"],
)
def test_example_inputs_that_the_model_refuses_are_an_input_error(args: tuple) -> None:
    with pytest.raises(InputError, match="the model itself fails on the example inputs"):
        ir.capture(nn.Linear(4, 3), args)


@pytest.mark.parametrize(
    "args", [torch.ones(2, 4), [torch.ones(2, 4)], {"x": torch.ones(2, 4)}, None], ids=["tensor", "list", "dict", "None"]
)
def test_example_inputs_are_a_tuple(args: object) -> None:
    with pytest.raises(InputError, match=r"example inputs are a tuple of positional arguments, not a \w+: write \(x,\)"):
        ir.capture(nn.Linear(4, 3), args)  # type: ignore[arg-type]


def test_unknown_keyword_arguments_are_an_input_error() -> None:
    with pytest.raises(InputError, match="the model itself fails on the example inputs"):
        ir.capture(nn.Linear(4, 3), (torch.ones(2, 4),), {"nothing": 1})


@pytest.mark.parametrize("dims", [{"y": {0: Dim("rows")}}, {"x": {9: Dim("rows")}}, 3], ids=["name", "dim", "kind"])
def test_wrong_dynamic_shapes_are_one_of_our_errors(dims: object) -> None:
    with pytest.raises(GraphwrightError):
        ir.capture(Scale(), (torch.ones(2, 4),), dynamic_shapes=dims)


# --- what capture leaves alone ---


@pytest.mark.parametrize("outcome", ["success", "failure"])
def test_the_model_the_generators_and_the_global_flags_are_as_they_were(outcome: str) -> None:
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen.add_(1)
            x = self.net(x) + torch.rand_like(x)
            if outcome == "failure" and x.sum() > 0:
                x = x + 1
            return x

    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    model, x = Everything().train(), torch.randn(8, 4, requires_grad=True)
    parameters = {name: (p, p.clone(), p.requires_grad, p.grad) for name, p in [*model.named_parameters(), *model.named_buffers()]}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    flags = lambda: (  # noqa: E731
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.enabled,
    )  # fmt: skip
    before = flags(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), x.clone()
    try:
        ir.capture(model, (x,))
        assert outcome == "success"
    except CaptureError:
        assert outcome == "failure"
    assert flags() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert random.getstate() == before[2] and np.random.get_state()[1].tolist() == before[3]
    assert torch.equal(x, before[4]) and x.requires_grad and x.grad is None
    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert now.keys() == parameters.keys()
    for name, (tensor, value, requires_grad, grad) in parameters.items():
        assert now[name] is tensor, name
        assert torch.equal(tensor, value), name
        assert tensor.requires_grad == requires_grad and tensor.grad is grad
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


def test_a_wrong_example_leaves_the_model_as_it_was() -> None:
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.proj = nn.Linear(4, 3)

        def forward(self, x):
            self.seen.add_(1)
            return self.proj(x)

    model = Counts()
    with pytest.raises(InputError):
        ir.capture(model, (torch.ones(2, 5),))
    assert model.seen == 0


def test_random_models_draw_the_same_numbers_when_run() -> None:
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    program = capture(Noise(), torch.zeros(4))
    torch.manual_seed(3)
    expected = Noise()(torch.zeros(4))
    torch.manual_seed(3)
    assert torch.equal(run(program, [torch.zeros(4)])[0][0], expected)


def test_a_tensor_given_twice_is_two_inputs() -> None:
    class Difference(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - b

    x = torch.randn(3)
    (call,) = ir.capture(Difference(), (x, x)).main.calls
    assert [operand.target for operand in call.all_input_nodes] == ["a", "b"]


class Speaking(nn.Module):
    def forward(self, x):
        print("hello", file=sys.stderr)
        return x + 1


def test_what_a_model_writes_to_stderr_comes_out(capsys):
    ir.capture(Speaking(), (torch.randn(2),))
    assert "hello" in capsys.readouterr().err
