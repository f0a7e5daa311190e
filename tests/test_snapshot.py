"""A snapshot holds a program exactly: what is rebuilt from it is the program, and what it cannot hold it refuses."""

import json

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright import models
from graphwright.ir import capture, verify
from graphwright.ir.infer import storage_key, tensors_of
from graphwright.ir.snapshot import NoSnapshot, rebuild, take

aten = torch.ops.aten


def captured(function, *inputs, **options):
    class Net(nn.Module):
        def forward(self, *args):
            return function(*args)

    return capture(Net(), inputs, **options)


def again(program):
    """`program` by way of the text of its snapshot."""
    return rebuild(json.loads(json.dumps(take(program))), program.weights, program.symbols)


def aliases(program):
    """Which values share storages, over all nodes."""
    keys = [[storage_key(tensor) for tensor in tensors_of(node.meta.get("val"))] for node in program.nodes()]
    number = {}
    return [[number.setdefault(key, len(number)) for key in each] for each in keys]


def assert_rebuilt(program):
    rebuilt = again(program)
    assert str(rebuilt) == str(program)
    assert take(rebuilt) == take(program)
    assert aliases(rebuilt) == aliases(program)
    verify(rebuilt)


@pytest.mark.parametrize("name", models.names())
def test_each_network_of_the_zoo_is_rebuilt_as_captured_and_sliced(name):
    module, args, kwargs = models.load(name, "tiny")
    program = capture(module, args, kwargs)
    assert_rebuilt(program)
    assert_rebuilt(gw.compile(program, [gw.SliceGroups("25%")], backend="aten", cache=False).program)


X = torch.randn(4, 6)
LITERALS = {
    "infinity and nan": lambda x: x.masked_fill(x > 0, float("-inf")) + float("nan"),
    "signed zero": lambda x: x * -0.0,
    "complex": lambda x: torch.view_as_real(torch.full((2,), 1 - 2j) * 3j) + x.sum(),
    "a dtype": lambda x: x.to(torch.bfloat16),
    "a memory format": lambda x: x.view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "a device and a layout": lambda x: torch.zeros(3, device="cpu", layout=torch.strided) + x.sum(),
    "text": lambda x: x.div(3, rounding_mode="floor"),
    "lists of values": lambda x: torch.cat([x, x.sin()]),
    "several results": lambda x: (x.max(1), x.split(2)),
    "views of views": lambda x: x.t()[1:].unsqueeze(0).expand(3, -1, -1),
    "no tensor": lambda x: (x, None, 3, 2.5, "text", True),
    "no elements": lambda x: x[:0] @ x.t(),
    "a size of one": lambda x: x.view(1, 24).t(),
}


@pytest.mark.parametrize("function", LITERALS.values(), ids=LITERALS)
def test_arguments_of_every_kind_and_views_are_rebuilt(function):
    try:
        program = captured(function, X)
        data = take(program)
    except NoSnapshot as reason:
        assert "sees elements in another way" in str(reason)
        return
    assert take(rebuild(data, program.weights, program.symbols)) == data
    assert_rebuilt(program)


def test_a_rebuilt_program_computes_the_same():
    module, args, kwargs = models.load("dit", "tiny")
    program = capture(module, args, kwargs)
    leaves = [gw.compile(p, backend="aten", cache=False)(*args, **kwargs) for p in (program, again(program))]
    assert torch.equal(*leaves)


def test_states_constants_provenance_and_history_are_rebuilt():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.layer = nn.Linear(6, 6)

        def forward(self, x, scale):
            self.count.add_(1)
            return self.layer(x) * scale + self.count

    program = capture(Counting(), (X, 3))
    program = gw.compile(program, [gw.FoldConstants()], backend="aten", cache=False).program
    rebuilt = again(program)
    assert_rebuilt(program)
    assert rebuilt.pipeline == program.pipeline
    signatures = [(s.inputs[1].value, [a.name for a in s.states], s.new_states) for s in (p.main.signature() for p in (rebuilt, program))]
    assert signatures[0] == signatures[1]
    wheres = [[(n.meta.get("where"), n.meta.get("origin")) for n in p.nodes() if n.op == "call_function"] for p in (rebuilt, program)]
    assert wheres[0] == wheres[1]


def test_snapshots_tell_apart_what_text_does_not():
    a, b = torch.empty_strided((2, 3, 1, 1), (3, 1, 1, 1)), torch.empty_strided((2, 3, 1, 1), (3, 1, 3, 3))
    assert take(captured(torch.sin, a)) != take(captured(torch.sin, b))


def test_programs_with_symbols_have_no_snapshot():
    with pytest.raises(NoSnapshot, match="it has symbols"):
        take(captured(torch.sin, X, dynamic_shapes={"args": ({0: torch.export.Dim("n", min=2, max=9)},)}))


def test_programs_with_sizes_that_only_the_data_tell_have_no_snapshot():
    with pytest.raises(NoSnapshot):
        take(captured(lambda x: x.nonzero().float().sum(0), X))


def test_programs_that_see_a_storage_in_two_dtypes_have_no_snapshot():
    with pytest.raises(NoSnapshot, match="it sees elements in another way than they are stored"):
        take(captured(lambda x: torch.view_as_complex(x.view(4, 3, 2)) * 2, X))
