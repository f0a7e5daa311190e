"""The region executor equals the reference body of `gw.sliced` for any count, and donates storage only where nobody can tell."""

import pytest
import torch
from torch import nn

from graphwright import ir
from graphwright.ir.donation import plan_donations
from graphwright.ir.rewriter import RegionBuilder
from graphwright.ir.run import run as reference_run
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.executor import Executor
from graphwright.runtime.flat import FlatGraph
from graphwright.runtime.memory import measure_peak
from graphwright.runtime.sliced import SlicedRun


class FeedForward(nn.Module):
    """x + down(gelu(gate) * up): the shape of a GEGLU block."""

    def __init__(self, width=6, hidden=10):
        super().__init__()
        self.proj, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, up = self.proj(x).chunk(2, -1)
        return x + self.down(nn.functional.gelu(gate) * up)


def sliced(program, dim, count):
    """Outlines all of `program` into one region in which every activation is sliced along `dim`; returns the region call."""
    rewriter = ir.Rewriter(program, pass_name="by-hand")
    calls = list(rewriter.nodes())
    size = calls[0].all_input_nodes[0].meta["val"].size(dim)
    body = RegionBuilder(rewriter.symbols, size, -(-size // count))
    inner = {}

    def operand(node):
        if node in inner:
            return inner[node]
        value = node.meta["val"]
        is_activation = node.op != "get_attr" and isinstance(value, torch.Tensor) and value.dim() > dim and value.size(dim) == size
        return body.operand(node, dim if is_activation else -1)

    with rewriter.step("slice by hand"):
        for node in calls:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), operand)
            inner[node] = body.call(node.target, args, kwargs, like=node)
        escaping = [node for node in calls if any(user not in inner for user in node.users)]
        body.units = None  # the common size of the sliced dims, which may be dynamic
        region = rewriter.outline(calls, body, [(node, inner[node], dim) for node in escaping], count)
    ir.verify(rewriter.program)
    return region


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_region_equals_its_reference_for_any_count(count, dim):
    model, x = FeedForward(), torch.randn(7, 7, 6)
    program = ir.capture(model, (x,))
    sliced(program, dim, count)
    outputs, _ = Executor(program)([x])
    expected, _ = reference_run(program, [x])
    assert outputs[0].stride() == expected[0].stride()
    # Slices may take other kernels than the whole, which reassociates sums of 20 float32 terms.
    torch.testing.assert_close(outputs[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs[0], model(x), rtol=1e-5, atol=1e-6)


needs_compiler = pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")


@needs_compiler
def test_a_compiled_region_equals_its_reference_when_slices_have_two_lengths():
    model, x = FeedForward(), torch.randn(7, 3, 6)
    program = ir.capture(model, (x,))
    sliced(program, 0, 3)
    outputs, _ = Executor(program, backend="inductor")([x])
    # Fused code reassociates sums of 20 float32 terms.
    torch.testing.assert_close(outputs[0], reference_run(program, [x])[0][0], rtol=1e-5, atol=1e-6)


PARTIALS = """graphwright 1
function main {
  takes ((*), {})
  gives *
  input %x : f32[2, 4, 7, 5]
  %0 = gw.sliced(%x) in_dims=[2] out_dims=[0] count=COUNT {
    input %1 : f32[2, 4, LENGTH, 5] strides [140, 35, 5, 1]
    %2 = gw.norm_stats.default(%1, 2)
    return %2
  }
  %3 = getitem(%0, 0)
  %4 = gw.norm_apply.default(%x, %3, none, none, 2, 1e-05)
  return %4
}
"""


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_each_slice_leaves_one_partial_result(count):
    program = ir.parse(PARTIALS.replace("COUNT", str(count)).replace("LENGTH", str(-(-7 // count))))
    x = torch.randn(2, 4, 7, 5)
    outputs, _ = Executor(program)([x])
    # The CPU kernel of norm_apply multiplies once where the body divides first: a few roundings of float32.
    torch.testing.assert_close(outputs[0], reference_run(program, [x])[0][0], rtol=1e-5, atol=1e-5)
    # Statistics merged in another order: a few roundings of float32.
    torch.testing.assert_close(outputs[0], nn.functional.group_norm(x, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 10])
def test_a_region_over_a_dynamic_size_equals_its_reference(rows):
    model = FeedForward()
    program = ir.capture(model, (torch.randn(8, 3, 6),), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=1, max=64)}})
    sliced(program, 0, 3)
    x = torch.randn(rows, 3, 6)
    outputs, _ = Executor(program)([x])
    torch.testing.assert_close(outputs[0], model(x), rtol=1e-5, atol=1e-6)


# --- donation --------------------------------------------------------------------------------------------------------------

DONATION = """graphwright 1
function main {{
  takes ((*), {{}})
  gives {gives}
  input %x : f32[8, 4, 4]
  %h = aten.mul.Scalar(%x, 2.0)
  {before}
  %r = gw.sliced({operands}) in_dims={in_dims} out_dims={out_dims} count=3 {{
    input %a : f32[{slice}] strides [16, 4, 1]
    {inputs}
    {body}
  }}
  {after}
}}
"""
CASE = dict(
    gives="*",
    before="",
    operands="%h",
    in_dims="[0]",
    out_dims="[0]",
    slice="3, 4, 4",
    inputs="",
    body="%b = aten.exp.default(%a)\n    %c = aten.add.Tensor(%b, %a)\n    return %c",
    after="%o = getitem(%r, 0)\n  return %o",
)


def donation_program(**changes):
    program = ir.parse(DONATION.format(**(CASE | changes)))
    ir.verify(program)
    return program


def donations(program):
    return list(plan_donations(program.main.graph).values())


DONATES = {
    "the operand is read by the operation that writes": {},
    "the operand is read after the output is computed": {
        "body": "%b = aten.mul.Scalar(%a, 3.0)\n    %c = aten.exp.default(%a)\n    %d = aten.add.Tensor(%b, %c)\n    return %b, %d",
        "out_dims": "[0, 0]",
        "gives": "(*, *)",
        "after": "%o = getitem(%r, 0)\n  %q = getitem(%r, 1)\n  return %o, %q",
    },
    "the output is a product that mixes elements of the slice": {"body": "%b = aten.matmul.default(%a, %a)\n    return %b"},
    "the output reads a transposed view of the slice": {
        "body": "%b = aten.transpose.int(%a, 1, 2)\n    %c = aten.add.Tensor(%a, %b)\n    return %c"
    },
    "slices lie along an inner dim": {"in_dims": "[1]", "out_dims": "[1]", "slice": "8, 2, 4"},
}
KEEPS = {
    "a graph input": {"operands": "%x"},
    "a value used after the region": {"after": "%o = getitem(%r, 0)\n  %q = aten.add.Tensor(%o, %h)\n  return %q"},
    "a value returned": {"after": "%o = getitem(%r, 0)\n  return %o, %h", "gives": "(*, *)"},
    "a value whose view is used after the region": {
        "before": "%w = aten.view.default(%h, [128])",
        "after": "%o = getitem(%r, 0)\n  %q = aten.sum.default(%w)\n  return %o, %q",
        "gives": "(*, *)",
    },
    "a value passed whole as well": {
        "operands": "%h, %h",
        "in_dims": "[0, -1]",
        "inputs": "input %z : f32[8, 4, 4]",
        "body": "%b = aten.sum.dim_IntList(%z, [0])\n    %c = aten.add.Tensor(%a, %b)\n    return %c",
    },
    "an output of another dtype": {"body": "%b = aten._to_copy.default(%a, dtype=f64)\n    return %b"},
    "an output laid along another dim": {
        "in_dims": "[1]",
        "slice": "8, 2, 4",
        "out_dims": "[1]",
        "body": "%b = aten.sum.dim_IntList(%a, [0])\n    %c = aten.unsqueeze.default(%b, 0)\n    return %c",
    },
    "a body that returns its operand": {"body": "%b = aten.transpose.int(%a, 1, 2)\n    return %b"},
    "a part of a larger storage": {
        "before": "%w = aten.cat.default([%h, %h], 0)\n  %v = aten.slice.Tensor(%w, 0, 8, 16)",
        "operands": "%v",
    },
}


@pytest.mark.parametrize("name", DONATES)
def test_an_output_takes_the_storage_of_a_dying_operand_when(name):
    program = donation_program(**DONATES[name])
    assert donations(program) == [{0: 0}]
    x = torch.randn(8, 4, 4)
    kept = x.clone()
    outputs, _ = Executor(program)([x])
    for output, expected in zip(outputs, reference_run(program, [x])[0], strict=True):
        assert torch.equal(output, expected)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("name", KEEPS)
def test_no_output_takes_the_storage_of(name):
    program = donation_program(**KEEPS[name])
    assert donations(program) == []
    x = torch.randn(8, 4, 4)
    kept = x.clone()
    outputs, _ = Executor(program)([x])
    for output, expected in zip(outputs, reference_run(program, [x])[0], strict=True):
        assert torch.equal(output, expected)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("compile", [None, lambda graph, examples: FlatGraph(graph)], ids=["aten", "storing body"])
def test_a_donor_that_turns_out_to_be_shared_is_left_alone(compile):
    call = next(node for node in donation_program().main.calls if node.target is ir.sliced)
    run, x = SlicedRun(call, {0: 0}, compile), torch.randn(8, 4, 4)
    kept, other = x.clone(), x.view(-1)
    outputs = run(3, None, x)
    assert torch.equal(other, kept.view(-1))
    assert torch.equal(outputs[0], kept.exp() + kept)


@pytest.mark.parametrize(("backend", "inside"), [("aten", 3 * 64 * 64 * 4), pytest.param("inductor", 0, marks=needs_compiler)])
def test_donation_saves_one_tensor_of_peak_memory(backend, inside):
    size = 8 * 64 * 64 * 4
    program = donation_program()
    text = str(program).replace("4, 4]", "64, 64]").replace("[16, 4, 1]", "[4096, 64, 1]")
    x = torch.randn(8, 64, 64)
    donating = Executor(ir.parse(text), backend=backend)
    donating([x])
    # h and one slice's exp, which compiled code has in registers; the sum goes straight into h. Without donation the output would
    # be a second tensor.
    assert measure_peak(lambda: donating([x])).peak_bytes == size + inside
