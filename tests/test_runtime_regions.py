"""The region executor equals the reference body of `gw.sliced` for any count, and donates storage only where nobody can tell."""

import pytest
import torch
from graphwright import ir
from graphwright.ir.rewriter import RegionBuilder
from graphwright.ir.run import run as reference_run
from graphwright.runtime.executor import Executor
from torch import nn

ATEN = torch.ops.aten


class FeedForward(nn.Module):
    """x + down(gelu(gate) * up): the shape of a GEGLU block."""

    def __init__(self, width=6, hidden=10):
        super().__init__()
        self.proj, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, up = self.proj(x).chunk(2, -1)
        return x + self.down(nn.functional.gelu(gate) * up)


def sliced(program, dim, count, units=None):
    """`program` with every call from the first one marked in it to the last in one region along `dim` of its tensors."""
    rewriter = ir.Rewriter(program, pass_name="by-hand")
    calls = list(rewriter.nodes())
    return slice_calls(rewriter, calls, dim, count, units)


def slice_calls(rewriter, calls, dim, count, units=None):
    """Outlines `calls` into a region in which every activation is sliced along `dim`; returns the region call."""
    size = calls[0].all_input_nodes[0].meta["val"].size(dim)
    total = units or size
    body = RegionBuilder(rewriter.symbols, total, -(-total // count))
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
