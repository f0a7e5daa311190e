"""ONNX models as programs: operators mean what the standard says, sizes stay symbols, what is not ATen runs in onnxruntime, and no file
leads out of its folder."""

import base64
import os
import zlib
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import graphwright as gw
from graphwright.ir.ops.onnx_node import session
from graphwright.ir.run import run
from graphwright.passes.check import Reference
from graphwright.tests.onnx_cases import Verdict, cases, judge, operators, passes_onnxruntime
from graphwright.tests.onnx_models import model_of, onnxruntime_results, results

F, INT = TensorProto.FLOAT, TensorProto.INT64


# --- operators ---------------------------------------------------------------------------------------------------------------


def first_case_of_each_operator():
    """For each set of operators the first of ONNX's cases; all of them are judged by bench/onnx_nodes.py."""
    found = {}
    for case in cases():
        if "_expanded" not in case.name:
            found.setdefault(operators(case), case)
    return [pytest.param(case, id=case.name) for case in found.values()]


@pytest.mark.parametrize("case", first_case_of_each_operator())
def test_an_operator_is_what_the_standard_says(case):
    if not passes_onnxruntime(case):
        return  # nothing to compare with: what of it is opaque is computed there
    verdict, why = judge(case)
    assert verdict not in (Verdict.WRONG, Verdict.CRASHED), why


def test_nearly_all_operators_are_read_onto_aten():
    # The bar is 90 % of all cases; of one case an operator, which weighs rare ones as much as common ones, it is less.
    judged = [judge(param.values[0])[0] for param in first_case_of_each_operator()[::5] if passes_onnxruntime(param.values[0])]
    assert sum(verdict in (Verdict.RIGHT, Verdict.FIXED) for verdict in judged) >= 0.75 * len(judged)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2])
@pytest.mark.parametrize("source", [F, TensorProto.FLOAT16])
def test_a_cast_to_8_bits_saturates(source, kind):
    nodes = [helper.make_node("Cast", ["x"], ["narrow"], to=kind), helper.make_node("Cast", ["narrow"], ["y"], to=F)]
    model = model_of(nodes, {"x": (source, [2**16])}, {"y": [2**16]}, opset=21)
    every_half = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.float16))
    x = every_half if source == TensorProto.FLOAT16 else every_half.float()
    (found,) = results(model, x)
    np.testing.assert_array_equal(found.numpy(), onnxruntime_results(model, x)[0])


def test_a_linear_layer_is_one_call_on_a_weight_of_its_name():
    model = model_of(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
        {"x": [2, 3]},
        {"y": [2, 4]},
        {"w": np.ones((4, 3), np.float32), "b": np.zeros(4, np.float32)},
    )
    calls = [str(node.target) for node in gw.from_onnx(model).main.calls]
    assert calls == ["aten.linear.default"] and set(gw.from_onnx(model).weights) == {"w", "b"}


@pytest.mark.parametrize(
    ("given", "node", "scopes", "name"),
    [
        ("onnx::MatMul_76", "/layers.0/attn/q_proj/MatMul", None, "layers.0.attn.q_proj.weight"),
        ("onnx::MatMul_76", "/mlp/mlp.2/mlp.2.0/MatMul", None, "mlp.2.0.weight"),  # children of Sequential repeat their parents
        ("val_4", "node_MatMul_4", "['', 'layers.0', 'layers.0.q_proj', 'linear_1']", "layers.0.q_proj.weight"),
        ("val_4", "node_MatMul_4", "['', 'linear_1']", "val_4.T"),  # in the model's own forward
        ("val_4", "/fc/MatMul", "no list", "fc.weight"),
        ("val_4", "/fc/MatMul", "[" * 4000, "fc.weight"),
        ("onnx::MatMul_76", "MatMul_12", None, "onnx::MatMul_76.T"),
        ("head.weight", "/layers.0/q_proj/MatMul", None, "head.weight.T"),  # a name that says something stays
    ],
)
def test_a_weight_of_a_made_up_name_has_that_of_its_module(given, node, scopes, name):
    product = helper.make_node("MatMul", ["x", given], ["y"], name=node)
    if scopes is not None:
        product.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    model = model_of([product], {"x": [4, 3]}, {"y": [4, 2]}, {given: np.ones((3, 2), np.float32)})
    assert list(gw.from_onnx(model).weights) == [name]


@pytest.mark.parametrize("turned", [True, False])
def test_two_products_of_one_module_have_weights_of_their_own_names(turned):
    weights = {f"onnx::Gemm_{number}": np.full((3, 3), number, np.float32) for number in range(2)}
    nodes = [
        helper.make_node("Gemm", [a, f"onnx::Gemm_{number}"], [b], name=f"/fc/Gemm_{number}", transB=int(turned))
        for number, (a, b) in enumerate(["xh", "hy"])
    ]
    assert list(gw.from_onnx(model_of(nodes, {"x": [4, 3]}, {"y": [4, 3]}, weights)).weights) == ["fc.weight", "fc_2.weight"]


def test_constants_are_folded_as_they_are_read():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["rows"]),
        helper.make_node("Concat", ["rows", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    initializers = {"zero": np.array([0]), "rest": np.array([-1])}
    program = gw.from_onnx(model_of(nodes, {"x": ["batch", 3, 4]}, {"y": ["batch", 12]}, initializers))
    assert not program.weights
    assert [str(node.target) for node in program.main.calls] == ["aten.sym_size.int", "aten.view.default"]


@pytest.mark.parametrize("opset", [7, 12, 13, 18])
@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
def test_softmax_goes_over_all_dims_behind_its_axis_before_opset_13(op, opset):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for axis in ({}, {"axis": 0}, {"axis": 1}, {"axis": 2}):
        model = model_of([helper.make_node(op, ["x"], ["y"], **axis)], {"x": [2, 3, 4]}, {"y": [2, 3, 4]}, opset=opset)
        torch.testing.assert_close(results(model, x)[0], torch.from_numpy(onnxruntime_results(model, x)[0]))


def test_top_k_has_k_as_an_attribute_before_opset_10():
    outputs = {"y": [2, 2, 4], "i": (INT, [2, 2, 4])}
    model = model_of([helper.make_node("TopK", ["x"], ["y", "i"], k=2, axis=1)], {"x": [2, 3, 4]}, outputs, opset=9)
    x = torch.randn(2, 3, 4)
    for got, wanted in zip(results(model, x), onnxruntime_results(model, x), strict=True):
        assert np.array_equal(got.numpy(), wanted)


# --- sizes -------------------------------------------------------------------------------------------------------------------


def test_dynamic_dims_are_symbols_and_serve_every_size():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Softmax", ["h"], ["y"], axis=-1)]
    weight = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    model = model_of(nodes, {"x": ["batch", "time", 4]}, {"y": ["batch", "time", 5]}, {"w": weight})
    program = gw.from_onnx(model)
    assert [symbol.name for symbol in program.used_symbols()] == ["batch", "time"]
    for batch, time in ((1, 1), (3, 7), (2, 400)):
        x = torch.randn(batch, time, 4)
        torch.testing.assert_close(run(program, [x])[0][0], torch.from_numpy(onnxruntime_results(model, x)[0]))


@pytest.mark.parametrize("columns", [7, "w"])
def test_quotients_of_sizes_are_cut_off_towards_zero(columns):
    """-(-w / 2), which a ceiling would be with floors, and (w - 9) / 2 + 3."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["w"]),
        helper.make_node("Neg", ["w"], ["n"]),
        helper.make_node("Div", ["n", "two"], ["q"]),
        helper.make_node("Neg", ["q"], ["a"]),
        helper.make_node("Sub", ["w", "nine"], ["m"]),
        helper.make_node("Div", ["m", "two"], ["r"]),
        helper.make_node("Add", ["r", "three"], ["b"]),
        helper.make_node("Concat", ["a", "b"], ["t"], axis=0),
        helper.make_node("Expand", ["unit", "t"], ["y"]),
    ]
    constants = {name: np.array([number]) for name, number in (("one", 1), ("two", 2), ("three", 3), ("nine", 9))}
    model = model_of(nodes, {"x": [2, columns]}, {"y": ["a", "b"]}, constants | {"unit": np.ones(1, np.float32)})
    program = gw.from_onnx(model)
    for w in (7,) if columns == 7 else (4, 5, 7, 8, 9, 20):
        x = torch.randn(2, w)
        assert run(program, [x])[0][0].shape == onnxruntime_results(model, x)[0].shape


@pytest.mark.parametrize(
    ("stride", "shape", "advice"),
    [
        (1, [0, 3], r"the shape at y fits only where h is 1: give that a value, sizes=\{'h': 1\}"),
        (16, [0, 3], r"the shape at y fits only where h is 16 to 31: give that a value, sizes=\{'h': \.\.\}"),
    ],
)
def test_a_reshape_that_not_all_sizes_have_says_which_do(stride, shape, advice):
    nodes = [
        helper.make_node("MaxPool", ["x"], ["pooled"], kernel_shape=[stride], strides=[stride]),
        helper.make_node("Reshape", ["pooled", "shape"], ["y"]),
    ]
    model = model_of(nodes, {"x": ["n", 3, "h"]}, {"y": None}, {"shape": np.array(shape)})
    with pytest.raises(gw.CaptureError, match=f"^{advice}$"):
        gw.from_onnx(model)


def test_a_dim_that_may_be_more_than_one_is_not_squeezed():
    model = model_of([helper.make_node("Squeeze", ["x"], ["y"])], {"x": [2, "w"]}, {"y": None})
    with pytest.raises(gw.CaptureError, match=r"dim 1, which goes where it is 1, depends on the size w: give that a value, sizes=\{'w'"):
        gw.from_onnx(model)
    assert results(model, torch.randn(2, 1), sizes={"w": 1})[0].shape == (2,)
    along = model_of([helper.make_node("Squeeze", ["x", "axes"], ["y"])], {"x": [2, "w"]}, {"y": [2]}, {"axes": np.array([1])})
    assert results(along, torch.ones(2, 1))[0].tolist() == [1, 1]  # by onnxruntime, which says what does not fit
    with pytest.raises(gw.TargetError, match="onnxruntime fails in ai.onnx.Squeeze"):
        results(along, torch.ones(2, 3))


def test_sizes_may_be_given():
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": ["batch", None]}, {"y": ["batch", None]})
    program = gw.from_onnx(model, sizes={"batch": 2, "s0": 3})
    assert list(program.main.placeholders[0].meta["val"].shape) == [2, 3]


def test_a_name_of_a_dim_that_is_no_identifier_is_none_of_ours():
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": ["9**9**9", "u0"]}, {"y": None})
    assert [symbol.name for symbol in gw.from_onnx(model).used_symbols()] == ["s0", "s1"]


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_padding_from_itself_serves_every_size(mode):
    node = helper.make_node("Pad", ["x", "pads"], ["y"], mode=mode)
    model = model_of([node], {"x": [2, "n"]}, {"y": [2, None]}, {"pads": np.array([0, 2, 0, 3])}, opset=19)
    program = gw.from_onnx(model)
    for n in (4, 9):
        x = torch.randn(2, n)
        torch.testing.assert_close(run(program, [x])[0][0], torch.from_numpy(onnxruntime_results(model, x)[0]))


def test_dims_that_depend_on_an_input_ask_for_its_value():
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)
    model = model_of([node], {"x": [2, 6], "axes": (INT, ["n"])}, {"y": None})
    with pytest.raises(gw.CaptureError, match=r"axes depends on data of input axes: give that a value, constants=\{'axes': \.\.\}"):
        gw.from_onnx(model)
    x = torch.randn(2, 6)
    torch.testing.assert_close(results(model, x, constants={"axes": torch.tensor([1])})[0], x.sum(1))


def test_a_shape_that_an_input_tells_is_left_to_onnxruntime_unless_it_is_given():
    model = model_of([helper.make_node("Reshape", ["x", "shape"], ["y"])], {"x": [2, 6], "shape": (INT, [2])}, {"y": None})
    x, shape = torch.randn(2, 6), torch.tensor([3, 4])
    torch.testing.assert_close(results(model, x, shape)[0], x.reshape(3, 4))
    calls = gw.from_onnx(model, constants={"shape": shape}).main.calls
    assert [str(node.target) for node in calls] == ["aten.view.default"]


def test_constants_must_be_inputs_of_their_dtype():
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": [2]}, {"y": [2]})
    with pytest.raises(gw.InputError, match="has no input 'z': it takes 'x'"):
        gw.from_onnx(model, constants={"z": torch.ones(2)})
    with pytest.raises(gw.InputError, match="float32, and its constant of torch.int64"):
        gw.from_onnx(model, constants={"x": torch.ones(2, dtype=torch.int64)})


# --- functions and control flow ------------------------------------------------------------------------------------------------


def test_functions_of_the_model_are_read_with_their_attributes():
    scaled = helper.make_function(
        "mine", "Scaled", ["x"], ["y"],
        [helper.make_node("Constant", [], ["c"]), helper.make_node("Mul", ["x", "c"], ["y"])],
        [helper.make_opsetid("", 18)], attributes=["factor"],
    )  # fmt: skip
    reference = scaled.node[0].attribute.add()
    reference.name, reference.ref_attr_name, reference.type = "value_float", "factor", onnx.AttributeProto.FLOAT
    model = model_of(
        [helper.make_node("Scaled", ["x"], ["y"], domain="mine", factor=3.0)], {"x": [2]}, {"y": [2]}, functions=[scaled], mine=1
    )
    x = torch.randn(2)
    torch.testing.assert_close(results(model, x)[0], 3 * x)


def test_functions_of_one_name_are_told_apart_by_their_overload():
    nodes = {"": helper.make_node("Neg", ["x"], ["y"]), "up": helper.make_node("Exp", ["x"], ["y"])}
    functions = []
    for overload, node in nodes.items():
        functions.append(helper.make_function("mine", "F", ["x"], ["y"], [node], [helper.make_opsetid("", 18)], overload=overload))
    calls = [helper.make_node("F", ["x"], ["h"], domain="mine", overload="up"), helper.make_node("F", ["h"], ["y"], domain="mine")]
    model = model_of(calls, {"x": [3]}, {"y": [3]}, functions=functions, mine=1)
    x = torch.randn(3)
    torch.testing.assert_close(results(model, x)[0], -x.exp())


def test_a_function_that_calls_itself_is_refused():
    endless = helper.make_function(
        "mine", "Endless", ["x"], ["y"], [helper.make_node("Endless", ["x"], ["y"], domain="mine")], [helper.make_opsetid("mine", 1)]
    )
    model = model_of([helper.make_node("Endless", ["x"], ["y"], domain="mine")], {"x": [2]}, {"y": [2]}, functions=[endless], mine=1)
    with pytest.raises(gw.ArtifactError, match="more than 64 deep"):
        gw.from_onnx(model)


def branches():
    """relu(x) where the condition holds, else -x."""
    then = helper.make_graph([helper.make_node("Relu", ["x"], ["a"])], "then", [], [helper.make_tensor_value_info("a", F, [3])])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "else", [], [helper.make_tensor_value_info("b", F, [3])])
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    return model_of([node], {"x": [3], "c": (TensorProto.BOOL, [])}, {"y": [3]})


def test_a_branch_that_data_decide_runs_in_onnxruntime():
    x = torch.tensor([-1.0, 0.5, 2.0])
    program = gw.from_onnx(branches())
    assert [node.kwargs["op"] for node in program.main.calls if "onnx_node" in str(node.target)] == ["ai.onnx.If"]
    for condition, wanted in ((True, x.relu()), (False, -x)):
        torch.testing.assert_close(run(program, [x, torch.tensor(condition)])[0][0], wanted)


def test_a_branch_that_is_known_is_taken():
    program = gw.from_onnx(branches(), constants={"c": torch.tensor(False)})
    assert [str(node.target) for node in program.main.calls] == ["aten.neg.default"]


# --- opaque operators ----------------------------------------------------------------------------------------------------------


def unknown():
    node = helper.make_node("BiasGelu", ["x", "b"], ["h"], domain="com.microsoft")
    last = helper.make_node("Add", ["h", "x"], ["y"])
    domains = {"com.microsoft": 1}
    model = model_of([node, last], {"x": ["n", 4]}, {"y": ["n", 4]}, {"b": np.ones(4, np.float32)}, **domains)
    return model


def nms():
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", "most"], ["y"])
    model = model_of([node], {"boxes": [1, 6, 4], "scores": [1, 1, 6]}, {"y": (INT, ["n", 3])}, {"most": np.array([3])})
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(1, 6, 2, generator=generator)
    return model, torch.cat([corners, corners + 0.5], -1), torch.rand(1, 1, 6, generator=generator)


def test_an_operator_without_a_form_in_aten_runs_in_onnxruntime():
    model, boxes, scores = nms()
    program = gw.from_onnx(model)
    assert np.array_equal(run(program, [boxes, scores])[0][0].numpy(), onnxruntime_results(model, boxes, scores)[0])


def test_types_of_operators_of_onnxruntimes_own_are_asked_of_it():
    nodes = [helper.make_node("FusedMatMul", ["x", "w"], ["h"], domain="com.microsoft", alpha=0.5), helper.make_node("Neg", ["h"], ["y"])]
    weight = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    model = model_of(nodes, {"x": ["n", 4]}, {"y": ["n", 5]}, {"w": weight}, **{"com.microsoft": 1})
    program = gw.from_onnx(model)
    assert program.main.outputs[0].meta["val"].shape[1] == 5
    for rows in (1, 6):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(run(program, [x])[0][0], torch.from_numpy(onnxruntime_results(model, x)[0]))


def in_a_row(*operators, alpha=0.5):
    """The program of operators of one operand each; FusedMatMul is onnxruntime's own, and Add adds half of float32's rounding of 1."""
    seconds = {"Add": ["half"], "FusedMatMul": ["w"]}
    domains = {"FusedMatMul": {"domain": "com.microsoft", "alpha": alpha}}
    names = ["x", *(f"h{place}" for place in range(len(operators) - 1)), "y"]
    nodes = [
        helper.make_node(op, [names[place], *seconds.get(op, [])], [names[place + 1]], **domains.get(op, {}))
        for place, op in enumerate(operators)
    ]
    weight = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    constants = {"w": weight, "half": np.float32(2**-24)}
    return gw.from_onnx(model_of(nodes, {"x": [3, 4]}, {"y": [3, 5]}, constants, **{"com.microsoft": 1}))


def test_rewrites_around_operators_of_onnxruntimes_own_are_judged():
    reference = Reference(in_a_row("Neg", "FusedMatMul"), [torch.randn(3, 4, generator=torch.Generator().manual_seed(0))])
    assert reference.judge_exact(in_a_row("FusedMatMul", "Neg")).kind == "right"
    assert reference.judge_exact(in_a_row("Abs", "FusedMatMul")).kind == "wrong"
    assert reference.judge_exact(in_a_row("Neg", "FusedMatMul", alpha=0.50001)).kind == "wrong"


def test_what_an_operator_of_onnxruntimes_own_rounds_one_way_or_the_other_settles_nothing():
    """Sums that lie between two floats, of which exp(log(sum)), off by float64's rounding, becomes the other one."""
    ties = 1 + torch.arange(12.0).reshape(3, 4) * 2**-23
    reference = Reference(in_a_row("Add", "FusedMatMul"), [ties])
    verdict = reference.judge_exact(in_a_row("Add", "Log", "Exp", "FusedMatMul"))
    assert verdict.kind == "inconclusive" and "too ill-conditioned to judge" in verdict.reason


def doubling(collects, sizes):
    """Doubles x until its sum is 100 or more; `collects` all that were on the way."""
    nodes = [
        helper.make_node("Add", ["v", "v"], ["v2"]),
        helper.make_node("ReduceSum", ["v2"], ["s"], keepdims=0),
        helper.make_node("Less", ["s", "limit"], ["more"]),
        *([helper.make_node("Identity", ["v2"], ["each"])] if collects else []),
    ]
    infos = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in (("i", INT, []), ("c", TensorProto.BOOL, []))]
    carried = [helper.make_tensor_value_info(name, F, [2, 4]) for name in ("v", "v2", "each")]
    more = helper.make_tensor_value_info("more", TensorProto.BOOL, [])
    body = helper.make_graph(nodes, "body", [*infos, carried[0]], [more, *carried[1 : 3 if collects else 2]])
    loop = helper.make_node("Loop", ["", "true", "x"], ["h", *(["all"] if collects else [])], body=body)
    last = [helper.make_node("Neg", ["h"], ["y"]), *([helper.make_node("ReduceMax", ["all"], ["z"], keepdims=0)] if collects else [])]
    outputs = {"y": sizes, **({"z": []} if collects else {})}
    return model_of([loop, *last], {"x": [2, 4]}, outputs, {"true": np.array(True), "limit": np.float32(100)})


@pytest.mark.parametrize("collects", [False, True])
def test_a_loop_that_data_end_runs_in_onnxruntime_and_has_the_types_that_it_carries(collects, tmp_path):
    model, x = doubling(collects, [2, 4]), torch.rand(2, 4)
    program = gw.from_onnx(model)
    for got, wanted in zip(run(program, [x])[0], onnxruntime_results(model, x), strict=True):
        torch.testing.assert_close(got, torch.from_numpy(wanted))
    if not collects:
        gw.compile(program, backend="aten").export_onnx(tmp_path / "again.onnx")
        again = onnx.load(tmp_path / "again.onnx")
        torch.testing.assert_close(torch.from_numpy(onnxruntime_results(again, x)[0]), run(program, [x])[0][0])


def test_a_result_that_is_not_of_the_size_that_the_file_says_is_an_error():
    node = helper.make_node("Unique", ["x"], ["h"], sorted=1)
    program = gw.from_onnx(model_of([node], {"x": [4]}, {"h": [None]}))
    (call,) = [each for each in program.main.calls if "onnx_node" in str(each.target)]
    arguments = dict(call.kwargs)
    with pytest.raises(gw.TargetError, match=r"a result of sizes \[2\] in ai.onnx.Unique, which the model says has \[3\]"):
        torch.ops.gw.onnx_node([torch.tensor([1.0, 2.0, 1.0, 2.0])], [3], **arguments)


def test_programs_with_opaque_operators_are_printed_parsed_saved_and_compiled(tmp_path):
    model, boxes, scores = nms()
    program = gw.from_onnx(model)
    assert gw.parse(str(program), weights=program.weights) == program
    compiled = gw.compile(program, backend="aten")
    compiled.save(tmp_path / "nms.gw")
    again = gw.load(tmp_path / "nms.gw", backend="aten")
    assert torch.equal(again(boxes, scores), compiled(boxes, scores))


def test_an_operator_whose_types_nobody_knows_is_refused_by_name():
    node = helper.make_node("Mystery", ["x"], ["y"], domain="theirs", name="here")
    with pytest.raises(gw.CaptureError, match="theirs.Mystery at here .* the type of its result is not known"):
        gw.from_onnx(model_of([node], {"x": [2]}, {"y": None}, theirs=1))


# --- compile and the command line ---------------------------------------------------------------------------------------------


def test_compile_reads_onnx_files_and_takes_inputs_by_name(tmp_path):
    nodes = [helper.make_node("Sub", ["left", "right"], ["y"])]
    path = tmp_path / "model.onnx"
    onnx.save(model_of(nodes, {"left": [2], "right": [2]}, {"y": [2]}), path)
    compiled = gw.compile(path, backend="aten")
    a, b = torch.randn(2), torch.randn(2)
    torch.testing.assert_close(compiled(a, b), a - b)
    torch.testing.assert_close(compiled(right=b, left=a), a - b)


@pytest.mark.parametrize("name", ['n"); import os; os.system("id', "x\nimport os", "lambda", "../../x", "a\u202eb"])
def test_names_are_data(name, tmp_path):
    model = model_of([helper.make_node("Relu", [name], ["y"], name=name)], {name: [2]}, {"y": [2]})
    program = gw.from_onnx(model)
    assert gw.parse(str(program)) == program
    assert str(program.main.placeholders[0].target).isidentifier()
    gw.compile(program, backend="aten").save(tmp_path / "m.gw")


def test_inputs_whose_names_differ_in_signs_alone_stay_two():
    model = model_of([helper.make_node("Sub", ["a.b", "a/b"], ["y"])], {"a.b": [2], "a/b": [2]}, {"y": [2]})
    a, b = torch.randn(2), torch.randn(2)
    compiled = gw.compile(gw.from_onnx(model), backend="aten")
    torch.testing.assert_close(compiled(a, b), a - b)
    assert len({str(node.target) for node in compiled.program.main.placeholders}) == 2


# --- hostile files -------------------------------------------------------------------------------------------------------------


def with_external(tmp_path, data=b"\0" * 16, name="w.bin", **entries):
    """A model whose weight of four floats lies in a file beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(data)
    model = model_of([helper.make_node("Add", ["x", "w"], ["y"])], {"x": [4]}, {"y": [4]})
    weight = TensorProto(name="w", data_type=F, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": name} | entries).items():
        entry = weight.external_data.add()
        entry.key, entry.value = key, str(value)
    model.graph.initializer.append(weight)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_mapped(tmp_path):
    data = np.arange(4, dtype=np.float32).tobytes()
    path = with_external(tmp_path, b"\0" * 8 + data, offset=8, length=16)
    torch.testing.assert_close(run(gw.from_onnx(path), [torch.zeros(4)])[0][0], torch.arange(4.0))


@pytest.mark.parametrize("inside", ["initializer", "constant", "function"])
def test_external_data_of_what_onnxruntime_runs_lies_beside_the_model_and_not_in_the_current_folder(tmp_path, monkeypatch, inside):
    """A branch that data choose, with a weight of its own, of a name that the current folder has a file of, too."""
    weight = onnx.load(with_external(tmp_path, np.arange(4, dtype=np.float32).tobytes()), load_external_data=False).graph.initializer[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.bin").write_bytes(np.full(4, 9, np.float32).tobytes())
    made = [] if inside == "initializer" else [helper.make_node("Constant", [], ["w"], value=weight)]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    shift = helper.make_function("mine", "Shift", ["x"], ["a"], [*made, helper.make_node("Add", ["x", "w"], ["a"])], imports[:1])
    body = (
        [helper.make_node("Shift", ["x"], ["a"], domain="mine")]
        if inside == "function"
        else [*made, helper.make_node("Add", ["x", "w"], ["a"])]
    )
    infos = {name: helper.make_tensor_value_info(name, F, [4]) for name in "abxy"}
    then = helper.make_graph(body, "then", [], [infos["a"]], [weight] if inside == "initializer" else [])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "else", [], [infos["b"]])
    branch = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph([branch], "g", [infos["x"], condition], [infos["y"]])
    functions = [shift] if inside == "function" else []
    path = tmp_path / "model" / "m.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10).SerializeToString())
    program = gw.from_onnx(path)
    path.with_name("w.bin").unlink()  # what was read is held
    torch.testing.assert_close(run(program, [torch.zeros(4), torch.tensor(True)])[0][0], torch.arange(4.0))


def test_an_operator_that_onnxruntime_runs_opens_no_file_and_is_of_bounded_size(tmp_path, monkeypatch):
    """As a program's text may have it."""
    model = onnx.load(with_external(tmp_path), load_external_data=False)
    monkeypatch.chdir(tmp_path / "model")
    zeros = zlib.compressobj(9)
    bomb = b"".join([*(zeros.compress(bytes(2**24)) for _ in range(65)), zeros.flush()])
    for content, reason in ((zlib.compress(model.SerializeToString()), "refuses"), (bomb, "has more than")):
        with pytest.raises(gw.TargetError, match=reason):
            session(base64.b85encode(content).decode())


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "", ".", "a//b", "a\\b", "missing", "x\0y"])
def test_external_data_stays_in_the_folder_of_the_model(tmp_path, location):
    (tmp_path / "secret").write_bytes(b"\0" * 16)
    path = with_external(tmp_path, location=location)
    with pytest.raises(gw.ArtifactError, match="tensor w"):
        gw.from_onnx(path)


@pytest.mark.parametrize("kind", ["symlink", "hard link", "folder", "fifo"])
def test_external_data_is_a_plain_file_of_its_own(tmp_path, kind):
    path = with_external(tmp_path)
    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 16)
    place = path.parent / "w.bin"
    place.unlink()
    make = {
        "symlink": lambda: place.symlink_to(secret),
        "hard link": lambda: os.link(secret, place),
        "folder": place.mkdir,
        "fifo": lambda: os.mkfifo(place),
    }
    make[kind]()
    with pytest.raises(gw.ArtifactError, match="tensor w"):
        gw.from_onnx(path)


def test_a_folder_on_the_way_that_is_a_link_is_not_followed(tmp_path):
    path = with_external(tmp_path, location="below/w.bin")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.bin").write_bytes(b"\0" * 16)
    (path.parent / "below").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(gw.ArtifactError, match="cannot be opened"):
        gw.from_onnx(path)


@pytest.mark.parametrize(
    "entries", [{"offset": 4}, {"length": 12}, {"offset": -4}, {"length": "9" * 30}, {"offset": "1e3"}, {"__class__": "x"}, {"offset": 2**62}]
)  # fmt: skip
def test_external_data_has_the_bytes_that_dims_need(tmp_path, entries):
    with pytest.raises(gw.ArtifactError, match="tensor w"):
        gw.from_onnx(with_external(tmp_path, **entries))


def test_external_data_needs_a_folder(tmp_path):
    model = onnx.load(with_external(tmp_path), load_external_data=False)
    with pytest.raises(gw.ArtifactError, match="load it by its path"):
        gw.from_onnx(model)
    assert gw.from_onnx(model, folder=tmp_path / "model").weights


def truncated():
    return model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": [2]}, {"y": [2]}).SerializeToString()[:-7]


@pytest.mark.parametrize("content", [b"", b"no protobuf", truncated(), b"\x0a" * 50])
def test_files_that_are_no_models(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(gw.ArtifactError, match="no ONNX model"):
        gw.from_onnx(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(gw.ArtifactError, match="cannot be read"):
        gw.from_onnx(tmp_path / "none.onnx")


def tensor(dims, data, kind=F):
    return TensorProto(name="w", data_type=kind, dims=dims, raw_data=data)


@pytest.mark.parametrize(
    "weight", [tensor([3], b"\0" * 8), tensor([-1], b""), tensor([2**40, 2**40], b""), tensor([4], b"\0" * 3, TensorProto.INT4)]
)
def test_dims_and_data_that_disagree(weight):
    model = model_of([helper.make_node("Relu", ["w"], ["y"])], {}, {"y": None})
    model.graph.initializer.append(weight)
    with pytest.raises(gw.ArtifactError, match="tensor w"):
        gw.from_onnx(model)


def relu(x, y):
    return helper.make_node("Relu", [x], [y])


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([relu("a", "b"), relu("b", "a"), relu("a", "y")], "before it is made"),
        ([relu("missing", "y")], "before it is made"),
        ([relu("x", "y"), relu("x", "y")], "made twice"),
        ([helper.make_node("Relu", ["x", "x", "x"], ["y"])], "it has 3 inputs"),
        ([helper.make_node("Gemm", ["x", "x"], ["y"], transA="no")], "attribute 'transA' is of another kind"),
    ],
)
def test_graphs_that_are_none(nodes, message):
    with pytest.raises(gw.ArtifactError, match=message):
        gw.from_onnx(model_of(nodes, {"x": [2]}, {"y": [2]}))


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Transpose", ["x"], ["y"], perm=[7, 0]),
        helper.make_node("Conv", ["x", "x"], ["y"], strides=[0, 0]),
        helper.make_node("Split", ["x"], ["y"], num_outputs=0),
        helper.make_node("GridSample", ["x", "x"], ["y"], mode="theirs"),
    ],
    ids=lambda node: node.op_type,
)
def test_attributes_that_an_operator_has_not_are_refused(node):
    with pytest.raises(gw.CaptureError, match=f"{node.op_type} at y has no form in a program"):
        gw.from_onnx(model_of([node], {"x": [2, 2]}, {"y": None}))


def test_two_inputs_of_one_name():
    model = model_of([relu("x", "y")], {"x": [2]}, {"y": [2]})
    model.graph.input.append(model.graph.input[0])
    with pytest.raises(gw.ArtifactError, match="names two inputs"):
        gw.from_onnx(model)


@pytest.mark.parametrize(
    ("kind", "shape", "message"), [(TensorProto.STRING, [2], "strings"), (F, None, "unknown rank"), (TensorProto.COMPLEX64, [2], "complex64")]
)  # fmt: skip
def test_inputs_that_no_program_takes(kind, shape, message):
    with pytest.raises(gw.CaptureError, match=message):
        gw.from_onnx(model_of([helper.make_node("Identity", ["x"], ["y"])], {"x": (kind, shape)}, {"y": None}))


def test_an_opset_that_nobody_knows():
    with pytest.raises(gw.CaptureError, match="opset 9999"):
        gw.from_onnx(model_of([relu("x", "y")], {"x": [2]}, {"y": [2]}, opset=9999))


# --- trained networks that packages ship -----------------------------------------------------------------------------------------

SR = {"sr": torch.tensor(16000)}
AUDIO = {"input": (1, 576), "state": (2, 1, 128)}
TRAINED = {
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": ({"p2o.DynamicDimension.0": 1}, {}, {"x": (1, 3, 64, 96)}),
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": (
        {"p2o.DynamicDimension.0": 1, "?": 48, "p2o.DynamicDimension.1": 160},
        {},
        {"x": (1, 3, 48, 160)},
    ),
    "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": ({"s0": 2, "?": 48}, {}, {"x": (2, 3, 48, 48)}),
    "silero_vad/data/silero_vad_16k_sequence.onnx": ({}, {}, {"input": (5, 576), "h": (1, 1, 128), "c": (1, 1, 128)}),
    "silero_vad/data/silero_vad.onnx": ({"s0": 1, "s1": 576, "s2": 1}, SR, AUDIO),
    "silero_vad/data/silero_vad_op18_ifless.onnx": ({"batch": 1}, SR, AUDIO),
    "silero_vad/data/silero_vad_half.onnx": ({"batch": 1, "sequence": 576}, {}, AUDIO),
}


def shipped(name: str) -> Path:
    package = {"rapidocr_onnxruntime": "rapidocr-onnxruntime", "silero_vad": "silero-vad"}[name.split("/")[0]]
    try:
        return Path(str(metadata.distribution(package).locate_file(name)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"pip install --no-deps {package}")


@pytest.mark.parametrize("name", TRAINED, ids=[Path(name).stem for name in TRAINED])
def test_trained_networks_of_packages_give_what_onnxruntime_gives(name):
    path, (sizes, constants, shapes) = shipped(name), TRAINED[name]
    generator = torch.Generator().manual_seed(0)
    inputs = {key: torch.randn(*shape, generator=generator) for key, shape in shapes.items()}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = session.run(None, {key: value.numpy() for key, value in (inputs | constants).items()})
    compiled = gw.compile(gw.from_onnx(path, sizes=sizes, constants=constants), backend="aten")
    got = compiled(**inputs)
    for ours, theirs in zip(got if isinstance(got, tuple) else (got,), wanted, strict=True):
        # Probabilities and states of size 1: onnxruntime itself is off by 2e-6 of float64 here, ours by less.
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5, rtol=1e-4)
