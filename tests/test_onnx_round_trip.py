"""A network through a pass, out to ONNX and in again: the same numbers, within what the program's own rounding explains; and what a file
says of its functions, which is looked into."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import graphwright as gw
from graphwright.ir.run import run
from graphwright.tests.onnx_round_trips import SLICED, Trip, trips, verdicts

# Of the table that bench/onnx_files.py goes through, what is unlike the rest: a network of each family, and each kind of pass once.
SAMPLE = [
    Trip("vit", SLICED),
    Trip("vit", "smooth"),
    Trip("dit", SLICED, {"regions": "unroll"}),
    Trip("decoder", "absorb-outliers{weight=nvfp4,rank=4,min_numel=0,budget=1.0}", depth=1),
    Trip("vit", "quantize{weight=int8-channel,min_numel=0,budget=1.0},append-lora"),
    Trip("moe_dlm", "regroup-experts"),
    Trip("moe_dlm", "regroup-experts,expert-choice{schedule=[1, 4, linear_reverse, row]}"),
    Trip("decoder", "layer-skip{n_max=2,n_min=1,horizon=8}", is_decoder=True, functions=("decode_1",)),
    Trip("rat", is_decoder=True, depth=1, functions=("prefill", "decode")),  # its caches are rings
]


def operators(program):
    return {str(node.target) for node in program.nodes() if node.op == "call_function"}


def test_the_sample_is_of_the_table():
    table = list(map(str, trips()))
    assert {str(trip) for trip in SAMPLE} <= set(table) and len(set(table)) == len(table)
    assert {trip.network for trip in trips()} == set(gw.models.names())


@pytest.mark.parametrize("trip", SAMPLE, ids=str)
def test_a_program_comes_back(trip, tmp_path):
    compiled = trip.compiled()
    found = verdicts(compiled, tmp_path, trip.functions, **trip.options)
    assert {name: each.kind for name, each in found.items()} == dict.fromkeys(trip.functions or compiled.program.functions, "right"), found


@pytest.mark.parametrize("dialect", ["function", "custom"])
def test_operators_of_the_dialect_are_read_as_what_they_were(dialect, exported_decoder, tmp_path):
    compiled, file = exported_decoder.compiled, exported_decoder.files[1]
    if dialect == "custom":
        (file, *_) = compiled.export_onnx(tmp_path / "m.onnx", functions=["decode"], dialect=dialect).files
    again = gw.from_onnx(file)
    cached = {name for name in operators(again) if name.startswith("gw.")}
    assert cached == {"gw.kv_append.default", "gw.cached_attention.default"}
    scales = {node.kwargs["scale"] for node in again.nodes() if "cached_attention" in str(node.target)}
    wanted = {node.kwargs["scale"] for node in compiled.program.functions["decode"].calls if "cached_attention" in str(node.target)}
    assert scales == wanted  # to the last bit of a float64


# --- decoders -----------------------------------------------------------------------------------------------------------------------------


class Step:
    """A function of a decoder as it came back from a file, called by the names of its inputs; outputs by name, logits first."""

    def __init__(self, path):
        self.program, self.outputs = gw.from_onnx(path), [each.name for each in onnx.load(path, load_external_data=False).graph.output]
        self.types = {str(node.target): node.meta["val"] for node in self.program.main.placeholders}

    def empty_caches(self, rows, positions):
        """Slots that were never written hold NaN, and are never read."""
        shapes = {name: list(value.shape) for name, value in self.types.items() if name.startswith("cache")}
        return {name: torch.full((rows, shape[1], positions, shape[3]), float("nan")) for name, shape in shapes.items()}

    def __call__(self, caches, **values):
        given = {**caches, **values}
        results = dict(zip(self.outputs, run(self.program, [given[name] for name in self.types])[0], strict=True))
        return next(iter(results.values())), {name: results[f"new_{name}"] for name in caches}


def greedy(prefill, decode, prompts, count):
    rows, lengths = torch.arange(len(prompts)), torch.tensor(list(map(len, prompts)))
    padded = torch.tensor([[*prompt, *[0] * (int(lengths.max()) - len(prompt))] for prompt in prompts])
    caches = prefill.empty_caches(len(prompts), int(lengths.max()) + count)
    logits, caches = prefill(caches, tokens=padded, position=torch.zeros_like(rows), rows=rows, lengths=lengths)
    made = [logits.argmax(-1)]
    while len(made) < count:
        position = lengths + len(made) - 1
        logits, caches = decode(caches, tokens=made[-1].unsqueeze(1), position=position, rows=rows)
        made.append(logits.argmax(-1))
    return torch.stack(made, 1).tolist()


def greedy_of_module(module, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(module(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_functions_of_a_decoder_come_back_and_give_the_tokens_of_the_module(exported_decoder):
    prefill, decode, _ = exported_decoder.files
    prompts = [[3, 141, 59], [26, 5, 35, 8, 97]]
    tokens = greedy(Step(prefill), Step(decode), prompts, 8)
    assert tokens == [greedy_of_module(exported_decoder.module, prompt, 8) for prompt in prompts]


# --- what functions say they are --------------------------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """Causal attention of one sequence to itself."""

    def forward(self, q):
        return torch.ops.gw.causal_attention(q, q, q, torch.arange(5), 0.3, False)


def exported(module, x, passes, folder):
    compiled = gw.compile(module, passes, example_inputs=(x,), backend="aten", cache=False)
    compiled.export_onnx(folder / "m.onnx")
    return onnx.load(folder / "m.onnx")


def in_onnxruntime(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def says_another_operator(function):
    (said,) = [entry for entry in function.metadata_props if entry.key == "graphwright.op"]
    said.value = "gw.no_such_operator"


def says_another_attribute(function):
    (scale,) = [each for each in function.attribute_proto if each.name == "scale"]
    scale.t.CopyFrom(onnx.numpy_helper.from_array(np.array(0.3001)))


def computes_something_else(function):
    result, hidden = function.output[0], "hidden"
    function.node[-1].output[0] = hidden
    two = onnx.numpy_helper.from_array(np.array(2, np.float32))
    function.node.add().CopyFrom(onnx.helper.make_node("Constant", [], ["two"], value=two))
    function.node.add().CopyFrom(onnx.helper.make_node("Mul", [hidden, "two"], [result]))


def sees_the_future(function):
    """A comparison of positions that is always true."""
    for node in function.node:
        if node.op_type in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
            node.op_type, node.input[1] = "Equal", node.input[0]


@pytest.mark.parametrize("change", [says_another_operator, says_another_attribute, computes_something_else, sees_the_future])
def test_a_function_that_is_not_what_it_says_is_read_by_its_body(change, tmp_path):
    x = torch.randn(1, 2, 5, 4)
    model = exported(Attention(), x, (), tmp_path)
    assert operators(gw.from_onnx(model)) == {"gw.causal_attention.default"}
    (function,) = model.functions
    change(function)
    program = gw.from_onnx(model)
    assert not any(name.startswith("gw.") for name in operators(program))
    torch.testing.assert_close(run(program, [x])[0][0], in_onnxruntime(model, x))


def test_a_constant_that_tells_on_small_numbers_alone_is_part_of_what_a_function_is(tmp_path):
    x = torch.randn(2, 8, 4, 4)
    model = exported(GroupNorm(), x, (), tmp_path)
    assert {"gw.norm_apply.default"} <= operators(gw.from_onnx(model))
    (eps,) = [each for function in model.functions for each in function.attribute_proto if each.name == "eps"]
    eps.t.CopyFrom(onnx.numpy_helper.from_array(np.array(1e-6)))
    assert "gw.norm_apply.default" not in operators(gw.from_onnx(model))


class GroupNorm(torch.nn.Module):
    """A group norm with an eps of 1e-5."""

    def forward(self, x):
        return torch.ops.gw.norm_apply(x, torch.ops.gw.norm_stats(x, 2), None, None, 2, 1e-5)


def test_functions_that_call_one_another_without_end_are_an_error(tmp_path):
    model = exported(Attention(), torch.randn(1, 2, 5, 4), (), tmp_path)
    (function,) = model.functions
    function.node[0].CopyFrom(onnx.helper.make_node(function.name, function.input, function.node[0].output, domain="graphwright"))
    with pytest.raises(gw.ArtifactError, match="one may call itself"):
        gw.from_onnx(model)
