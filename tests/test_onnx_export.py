"""Programs as ONNX models: what is written is the program in onnxruntime, or an error, and names, sizes and user lines stay."""

import sys

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import graphwright as gw
from graphwright.ir.onnx.export import opaque, to_onnx
from graphwright.ir.region import sliced as sliced_op
from graphwright.passes.verdict import Verdict
from graphwright.runtime import onnx_check, onnx_file
from graphwright.tests.dynamic_sizes import BUDGETS, CASES, rows
from graphwright.tests.onnx_models import Function, compiled_of, model_of, onnxruntime_results


def session_of(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def results(path, **inputs):
    return session_of(path).run(None, {name: value.numpy() for name, value in inputs.items()})


# --- what torch's exporter gets wrong (specs/trust.md, section 10) ------------------------------------------------------------------


def spelled_rms_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12)


TINY = {
    "x / (sum + 1e-15)": lambda x: x / (x.abs().sum() + 1e-15),
    "x + 1e-8": lambda x: x + 1e-8,
    "x * (1 + 1e-9)": lambda x: x * (1 + 1e-9),
    "rms norm, eps 1e-12": spelled_rms_norm,
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_constants_that_look_like_nothing_stay(name, dtype, tmp_path):
    model = Function(TINY[name])
    compiled_of(model, torch.randn(3, 4, dtype=dtype)).export_onnx(tmp_path / "m.onnx")
    for x in (torch.zeros(3, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))):
        got = torch.from_numpy(results(tmp_path / "m.onnx", x=x)[0])
        # One rounding apart: torch and onnxruntime may take roots and sums in other orders.
        torch.testing.assert_close(got, model(x), rtol=4 * torch.finfo(dtype).eps, atol=0)


# --- names, sizes, provenance ---------------------------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 6)

    def forward(self, tokens, mask):
        hidden = self.proj(tokens)
        return {"logits": hidden * mask, "parts": (hidden.sum(0), tokens)}


def test_inputs_outputs_weights_and_dims_keep_their_names(tmp_path):
    batch = torch.export.Dim("batch", max=64)
    inputs = (torch.randn(3, 4), torch.ones(3, 1))
    compiled = compiled_of(TwoHeads(), *inputs, dynamic_shapes={"tokens": {0: batch}, "mask": {0: batch}})
    compiled.export_onnx(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    assert [each.name for each in model.graph.input] == ["tokens", "mask"]
    assert [each.name for each in model.graph.output] == ["logits", "parts.0", "parts.1"]
    assert {each.name for each in model.graph.initializer} == {"proj.weight", "proj.bias"}
    assert [each.type.tensor_type.shape.dim[0].dim_param for each in model.graph.input] == ["batch", "batch"]
    tokens, mask = torch.randn(7, 4), torch.rand(7, 1)
    wanted = compiled(tokens, mask)
    for got, value in zip(results(tmp_path / "m.onnx", tokens=tokens, mask=mask), (wanted["logits"], *wanted["parts"]), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), value)


def test_nodes_say_which_line_they_came_from_and_the_model_which_passes_made_it(tmp_path):
    compiled_of(TwoHeads(), torch.randn(3, 4), torch.ones(3, 1)).export_onnx(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    said = [{entry.key: entry.value for entry in node.metadata_props} for node in model.graph.node]
    linear = next(each for each in said if each.get("graphwright.op") == "aten.linear.default")
    assert linear["graphwright.module"] == "proj" and "test_onnx_export.py:" in linear["graphwright.line"]
    assert {entry.key: entry.value for entry in model.metadata_props}["graphwright.pipeline"].startswith("remove-")


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x):
        self.count += x
        return x * self.count


def test_states_are_inputs_and_their_new_values_outputs(tmp_path):
    compiled_of(Counter(), torch.ones(2)).export_onnx(tmp_path / "m.onnx")
    session = session_of(tmp_path / "m.onnx")
    assert {each.name for each in session.get_inputs()} == {"x", "count"}
    assert [each.name for each in session.get_outputs()] == ["output", "new_count"]
    output, count = results(tmp_path / "m.onnx", x=torch.ones(2), count=torch.tensor([1.0, 2.0]))
    assert count.tolist() == [2.0, 3.0] and output.tolist() == [2.0, 3.0]


# --- operators of the dialect, regions, low bits --------------------------------------------------------------------------------------


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return torch.relu(self.fc(torch.nn.functional.silu(self.norm(x)))) + x


@pytest.fixture(scope="module")
def sliced():
    torch.manual_seed(0)
    compiled = compiled_of(Norms().eval(), torch.randn(7, 8, 6, 6), passes="slice-groups{memory_budget=60%}")
    assert any("sliced" in str(node.target) for node in compiled.program.nodes())
    return compiled


@pytest.mark.parametrize("regions", ["loop", "unroll"])
@pytest.mark.parametrize("dialect", ["function", "inline"])
def test_regions_are_loops_or_written_out(sliced, dialect, regions, tmp_path):
    written = sliced.export_onnx(tmp_path / "m.onnx", dialect=dialect, regions=regions)
    assert written.verdict.kind == "right"
    model = onnx.load(tmp_path / "m.onnx")
    assert ("Loop" in {node.op_type for node in model.graph.node}) == (regions == "loop")
    assert all(function.domain == "graphwright" for function in model.functions)


@pytest.mark.parametrize("name", ["attention, causal", "a view that needs a coarser axis", "a size as a value", "padding", "an upsampling"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_region_over_a_size_that_is_known_at_the_call_is_a_loop_for_every_size(name, budget, tmp_path):
    """A share of memory keeps the number of slices, bytes their length."""
    case = CASES[name]
    compiled = compiled_of(
        case.network().eval(), rows(*case.shape(case.hint)), passes=[gw.SliceGroups(budget)], dynamic_shapes=case.dynamic
    )
    assert any(node.target is sliced_op for node in compiled.program.main.calls)
    assert compiled.export_onnx(tmp_path / "m.onnx").verdict.kind == "right"
    session = session_of(tmp_path / "m.onnx")
    for size in (1, 2, 7, 24, 33):
        x = rows(*case.shape(size))
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), compiled(x), rtol=1e-4, atol=1e-5)  # float32, sums in another order


def test_a_region_of_no_known_number_of_slices_is_not_written_out(tmp_path):
    case = CASES["batch"]
    compiled = compiled_of(case.network(), rows(*case.shape(4)), passes=[gw.SliceGroups("25%")], dynamic_shapes=case.dynamic)
    with pytest.raises(gw.CaptureError, match="a region whose number of slices is known at the call only cannot be written out"):
        compiled.export_onnx(tmp_path / "m.onnx", regions="unroll")


class Causal(nn.Module):
    def forward(self, q):
        return torch.ops.gw.causal_attention(q, q, q, torch.arange(5), 0.3, False) + torch.ops.gw.causal_attention(
            q * 2, q, q, torch.arange(5), 0.3, False
        )


def test_calls_alike_share_one_function_with_their_attributes(tmp_path):
    compiled = compiled_of(Causal(), torch.randn(1, 2, 5, 4))
    compiled.export_onnx(tmp_path / "m.onnx")
    (function,) = onnx.load(tmp_path / "m.onnx").functions
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in function.attribute_proto}
    assert function.name.startswith("causal_attention") and attributes["enable_gqa"] == 0
    assert onnx.numpy_helper.to_array(attributes["scale"]) == 0.3  # a float64, not the float32 nearest to it
    assert compiled.export_onnx(tmp_path / "i.onnx", dialect="inline").verdict.kind == "right"
    assert not onnx.load(tmp_path / "i.onnx").functions


def test_custom_operators_have_no_body_and_are_not_run(tmp_path):
    written = compiled_of(Causal(), torch.randn(1, 2, 5, 4)).export_onnx(tmp_path / "m.onnx", dialect="custom")
    model = onnx.load(tmp_path / "m.onnx")
    assert written.verdict is None and not model.functions
    assert ("graphwright", "causal_attention") in {(node.domain, node.op_type) for node in model.graph.node}


def onnx_model(node, inputs, outputs, initializers=()):
    """inputs and outputs: name -> element type and shape."""
    infos = [[helper.make_tensor_value_info(name, *type_) for name, type_ in each.items()] for each in (inputs, outputs)]
    graph = helper.make_graph([node], "g", *infos, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_an_operator_that_stayed_onnx_is_put_back(tmp_path):
    branches = [
        helper.make_graph([helper.make_node(op, ["x"], [op])], op, [], [helper.make_tensor_value_info(op, TensorProto.FLOAT, [3])])
        for op in ("Relu", "Neg")
    ]
    node = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    floats = (TensorProto.FLOAT, [3])
    program = gw.from_onnx(onnx_model(node, {"x": floats, "c": (TensorProto.BOOL, [])}, {"y": floats}))
    gw.compile(program, backend="aten", cache=False).export_onnx(tmp_path / "m.onnx")
    assert [each.op_type for each in onnx.load(tmp_path / "m.onnx").graph.node] == ["If"]
    x = torch.tensor([-1.0, 0.5, 2.0])
    for condition, wanted in ((True, x.relu()), (False, -x)):
        assert results(tmp_path / "m.onnx", x=x, c=torch.tensor(condition))[0].tolist() == wanted.tolist()


def detections(*nodes, outputs, **initializers):
    """Of boxes [1, 6, 4] the rows `picked` [n, 4] that NonMaxSuppression keeps, and what `nodes` make of them."""
    pick = [
        helper.make_node("NonMaxSuppression", ["boxes", "scores", "most"], ["kept"]),
        helper.make_node("Gather", ["kept", "two"], ["places"], axis=1),
        helper.make_node("Squeeze", ["boxes", "zero"], ["flat"]),
        helper.make_node("Gather", ["flat", "places"], ["picked"], axis=0),
    ]
    constants = {"most": np.array([3]), "two": np.array(2), "zero": np.array([0]), **initializers}
    return model_of([*pick, *nodes], {"boxes": [1, 6, 4], "scores": [1, 1, 6]}, outputs, constants)


BEHIND = {
    "gather": ([], {"picked": [None, 4]}, {}),
    "softmax": ([helper.make_node("Softmax", ["picked"], ["y"])], {"y": [None, 4]}, {}),
    "sizes": (
        [
            helper.make_node("Shape", ["picked"], ["shape"]),
            helper.make_node("Expand", ["one", "shape"], ["ones"]),
            helper.make_node("Add", ["picked", "ones"], ["y"]),
        ],
        {"y": [None, 4]},
        {"one": np.float32([1])},
    ),
    "another opaque operator": (
        [helper.make_node("Unique", ["places"], ["u"]), helper.make_node("Gather", ["flat", "u"], ["y"])],
        {"y": [None, 4]},
        {},
    ),
}


@pytest.mark.parametrize("behind", BEHIND)
def test_sizes_that_only_data_tell_go_through_an_export(behind, tmp_path):
    nodes, outputs, constants = BEHIND[behind]
    model = detections(*nodes, outputs=outputs, **constants)
    written = gw.compile(gw.from_onnx(model), backend="aten", cache=False).export_onnx(tmp_path / "m.onnx")
    random = torch.Generator().manual_seed(0)
    corners, scores = torch.rand(1, 6, 2, generator=random), torch.rand(1, 1, 6, generator=random)
    boxes = torch.cat([corners, corners + 1], -1)
    (wanted,) = onnxruntime_results(model, boxes, scores)
    assert written.verdict.kind == "right" and 0 < wanted.shape[0] < 6
    np.testing.assert_allclose(results(tmp_path / "m.onnx", boxes=boxes, scores=scores)[0], wanted, rtol=1e-5)  # a few roundings of float32


def test_a_dialect_operator_takes_rows_that_only_data_tell(tmp_path):
    class Kept(nn.Module):
        def forward(self, x):
            rows = x[x.sum(1) > 0]
            return torch.ops.gw.norm_apply(rows, torch.ops.gw.norm_stats(rows, 2), None, None, 2, 1e-5)

    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    compiled = compiled_of(Kept(), x)
    assert compiled.export_onnx(tmp_path / "m.onnx").verdict.kind == "right"
    torch.testing.assert_close(torch.from_numpy(results(tmp_path / "m.onnx", x=x)[0]), compiled(x))


def test_an_operator_that_stayed_onnx_is_compared_as_any_other(tmp_path, monkeypatch):
    """One that gives floats has a float64 form: what it takes and gives is rounded, and all around it is not."""
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", alpha=0.5)
    weight = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    model = model_of([node], {"x": [3, 4]}, {"y": [3, 5]}, {"w": weight}, **{"com.microsoft": 1})
    compiled = gw.compile(gw.from_onnx(model), backend="aten", cache=False)
    assert compiled.export_onnx(tmp_path / "m.onnx").verdict.kind == "right"
    as_it_is = opaque.put_back

    def off(*args):
        made, outputs = as_it_is(*args)
        made[-1].attributes["alpha"] = onnx_ir.AttrFloat32("alpha", 0.5001)
        return made, outputs

    monkeypatch.setattr(opaque, "put_back", off)
    with pytest.raises(gw.ContractError, match="the ONNX model of main is not the program"):
        compiled.export_onnx(tmp_path / "m.onnx")


def test_functions_are_a_model_each_and_share_one_file_of_weights(exported_decoder):
    *models, data = exported_decoder.files
    assert [path.name for path in models] == ["m.prefill.onnx", "m.decode.onnx"] and exported_decoder.written.verdict.kind == "right"
    weights = sum(weight.nbytes for weight in exported_decoder.compiled.program.weights.values())
    assert data.stat().st_size < 1.2 * weights
    names = {each.name for each in session_of(models[1]).get_inputs()}
    assert {"tokens", "position", "rows", "cache_k_0"} <= names


@pytest.mark.parametrize(
    ("function", "dtype", "operator"), [(torch.erf, torch.float64, "Erf"), (lambda x: x @ x.T, torch.bfloat16, "MatMul")]
)
def test_a_kernel_that_the_runtime_lacks_is_named(function, dtype, operator, tmp_path):
    compiled = compiled_of(Function(function), torch.randn(2, 3, dtype=dtype))
    with pytest.raises(gw.TargetError, match=rf"has no {operator} on a CPU for a type of this program, .*: export the model in float32$"):
        compiled.export_onnx(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


# --- files and errors -------------------------------------------------------------------------------------------------------------------


def test_weights_may_lie_beside_the_model_and_go_with_it(tmp_path):
    path = tmp_path / "m.onnx"
    first = compiled_of(nn.Linear(64, 64), torch.randn(2, 64)).export_onnx(path, external_data=True)
    assert len(first.files) == 2 and path.stat().st_size < 64 * 64
    second = compiled_of(nn.Linear(64, 64), torch.randn(2, 64)).export_onnx(path, external_data=True)
    assert set(tmp_path.iterdir()) == set(second.files)
    x = torch.randn(2, 64)
    program = gw.from_onnx(path)
    torch.testing.assert_close(gw.compile(program, backend="aten", cache=False)(x), torch.from_numpy(results(path, input=x)[0]))


def test_a_model_that_is_not_the_program_is_not_written(tmp_path, monkeypatch):
    compiled = compiled_of(nn.Linear(4, 4), torch.randn(2, 4))
    compiled.export_onnx(tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes()

    def with_other_weights(*args, **options):
        model = to_onnx(*args, **options)
        weight = model.graph.initializers["weight"]
        weight.const_value = onnx_ir_tensor(weight.const_value.numpy() * 1.001)
        return model

    def onnx_ir_tensor(array):
        import onnx_ir

        return onnx_ir.tensor(array, name="weight")

    monkeypatch.setattr("graphwright.ir.onnx.export.to_onnx", with_other_weights)
    with pytest.raises(gw.ContractError, match="the ONNX model of main is not the program on random inputs"):
        compiled.export_onnx(tmp_path / "m.onnx", external_data=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"] and (tmp_path / "m.onnx").read_bytes() == before


def test_a_failing_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    compiled = compiled_of(nn.Linear(64, 64), torch.randn(2, 64))
    compiled.export_onnx(path, external_data=True)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}

    def full(target, mode=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_file, "atomic_write", full)
    with pytest.raises(gw.ArtifactError, match="No space left on device"):
        compiled_of(nn.Linear(64, 64), torch.randn(2, 64)).export_onnx(path, external_data=True)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_an_operator_without_an_onnx_form_is_named_with_the_users_line(tmp_path):
    with pytest.raises(gw.CaptureError, match=r"aten.polygamma.default at .*onnx_models.py:\d+.* has no ONNX form"):
        compiled_of(Function(lambda x: torch.polygamma(1, x)), torch.rand(3) + 1).export_onnx(tmp_path / "m.onnx")


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(gw.TargetError, match=r"onnx_ir: pip install 'graphwright\[onnx\]'"):
        compiled_of(nn.Linear(2, 2), torch.randn(1, 2)).export_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dialect": "html"}, "dialect is one of function, inline, custom, not 'html'"),
        ({"regions": "while"}, "regions is one of loop, unroll, not 'while'"),
        ({"opset": 9}, "opset is one of 21, 22, 23, 24, not 9"),
        ({"functions": ["decode"]}, "has no function decode: it has main"),
    ],
)
def test_options_are_checked_first(options, said, tmp_path):
    with pytest.raises(gw.InputError, match=said):
        compiled_of(nn.Linear(2, 2), torch.randn(1, 2)).export_onnx(tmp_path / "m.onnx", **options)


def test_the_name_of_the_file_ends_in_onnx(tmp_path):
    with pytest.raises(gw.InputError, match="something.onnx"):
        compiled_of(nn.Linear(2, 2), torch.randn(1, 2)).export_onnx(tmp_path / "m.bin")


def test_names_that_contain_code_are_data(tmp_path):
    name = 'n"); import os; os.system("id'
    node = helper.make_node("Add", ["x", name], ["y"])
    infos = [helper.make_tensor_value_info(each, TensorProto.FLOAT, [2]) for each in ("x", "y")]
    graph = helper.make_graph([node], "g", infos[:1], infos[1:], [onnx.numpy_helper.from_array(np.ones(2, np.float32), name)])
    program = gw.from_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    gw.compile(program, backend="aten", cache=False, cleanups=False).export_onnx(tmp_path / "m.onnx")
    assert [each.name for each in onnx.load(tmp_path / "m.onnx").graph.initializer] == [name]
    assert results(tmp_path / "m.onnx", x=torch.ones(2))[0].tolist() == [2.0, 2.0]


def test_values_are_judged_by_the_programs_own_noise():
    program = compiled_of(nn.Linear(4, 4), torch.randn(2, 4)).program
    reference = onnx_check.Reference(program, [torch.randn(2, 4)])
    own = reference.outputs()
    assert reference.judge_values(own).kind == "right"
    assert reference.judge_values({"output 0": own["output 0"] * 1.0001}).kind == "unstable"
    assert reference.judge_values({"output 0": own["output 0"].double()}) == Verdict(
        "wrong", "output 0 is torch.float64[2, 4], not torch.float32[2, 4]"
    )
