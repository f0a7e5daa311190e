"""The executor computes what the reference run does, holds values no longer than needed, and lets no context of the caller in."""

import gc
import runpy
import weakref

import pytest
import torch
from torch import nn

from graphwright import ir
from graphwright.ir.errors import InputError
from graphwright.ir.float64 import to_float64
from graphwright.ir.run import run as reference_run
from graphwright.runtime.bindings import BINDINGS
from graphwright.runtime.executor import Executor
from graphwright.runtime.memory import measure_peak

ATEN = torch.ops.aten


def captured(forward, *args, **options):
    module = nn.Module()
    module.forward = forward
    return ir.capture(module, args, **options)


@pytest.mark.filterwarnings("ignore:'graphwright.runtime.bindings' found in sys.modules")
def test_a_function_that_torch_lacks_is_called_by_its_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_VariableFunctions", object())
    bindings = runpy.run_module("graphwright.runtime.bindings")
    assert ATEN.relu.default not in bindings["BINDINGS"] and ATEN.relu.default in BINDINGS
    assert bindings["binding"](ATEN.relu.default)(-torch.ones(1)) == 0


def test_nested_operands_and_keywords_reach_the_operation():
    def forward(x, y, i):
        joined = torch.cat([x, y, torch.full_like(x, 2.0)], 0)
        return joined[:, i], torch.stack([x, y]).sum(0, dtype=torch.float64), x.new_zeros(2)

    args = (torch.randn(3, 4), torch.randn(3, 4), torch.tensor([2, 0]))
    program = captured(forward, *args)
    for output, expected in zip(Executor(program)(list(args))[0], forward(*args), strict=True):
        assert torch.equal(output, expected) and output.dtype == expected.dtype


def test_sizes_are_computed_with_each_call():
    def forward(x):
        return x.new_ones(x.shape[0] * 2, 3) + x.shape[0], x.shape[0] + 1

    program = captured(forward, torch.randn(4), dynamic_shapes=({0: torch.export.Dim("n", max=50)},))
    for n in (2, 7, 50):
        tensor, size = Executor(program)([torch.randn(n)])[0]
        assert torch.equal(tensor, forward(torch.randn(n))[0]) and size == n + 1


def test_a_chain_holds_two_values_at_a_time():
    def forward(x):
        for _ in range(20):
            x = (x + x).relu()
        return x

    x = torch.randn(1000)
    executor = Executor(captured(forward, x))
    assert measure_peak(lambda: executor([x])).peak_bytes == 2 * 4000


def test_inputs_stay_with_the_caller_and_die_with_it():
    executor = Executor(captured(lambda x: (x + 1).relu() * 2, torch.randn(4)))
    x = torch.randn(4)
    kept, reference = x.clone(), weakref.ref(x)
    executor([x])
    assert torch.equal(x, kept)
    del x
    gc.collect()
    assert reference() is None


def test_outputs_may_be_used_in_autograd():
    output = Executor(captured(lambda x: x * 2, torch.randn(4)))([torch.randn(4)])[0][0]
    assert not output.requires_grad and not output.is_inference()
    weight = torch.randn(4, requires_grad=True)
    (output * weight).sum().backward()
    assert torch.equal(weight.grad, output)


def test_autocast_around_a_call_changes_nothing():
    x = torch.randn(4, 4)
    executor = Executor(captured(lambda x: x @ x, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = executor([x])[0][0]
    assert torch.equal(output, x @ x)


def test_new_states_are_returned_and_the_old_ones_are_left():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    program = ir.capture(Counter(), (torch.zeros(2),))
    executor, state = Executor(program), torch.tensor(5.0)
    outputs, states = executor([torch.zeros(2)], {"count": state})
    assert outputs[0].tolist() == [6, 6] and states["count"] == 6 and state == 5


def test_a_failing_operation_names_itself_and_the_users_line():
    class Pick(nn.Module):
        def forward(self, x):
            return x[torch.tensor([0, 5])]

    executor = Executor(ir.capture(Pick(), (torch.randn(8),)))
    with pytest.raises(Exception) as failure:
        executor([torch.randn(3)])
    assert any("aten.index.Tensor" in note and "test_runtime_executor.py" in note for note in failure.value.__notes__)


def test_a_program_without_weight_values_does_not_run():
    program = ir.parse(str(ir.capture(nn.Linear(2, 2), (torch.randn(1, 2),))))
    with pytest.raises(InputError, match="weight weight has no values"):
        Executor(program)


def test_a_wrong_number_of_inputs_is_refused():
    with pytest.raises(InputError, match="takes 1 inputs, not 2"):
        Executor(captured(lambda x: x + 1, torch.randn(2)))([torch.randn(2), 3])


# Each binding beside the operator that it stands for; the arguments are what captured graphs hold.
X, Y, M, B = torch.rand(2, 4, 6) + 0.5, torch.rand(2, 4, 6) + 0.5, torch.rand(4, 4), torch.rand(2, 4, 6) > 0.5
IMAGE = torch.rand(2, 4, 6, 6)
ARGUMENTS = {
    "unary": (X,),
    "binary": (X, Y),
    "scalar": (X, 0.75),
    "logical": (B, ~B),
    "where.self": (B, X, Y),
    "masked_fill.Scalar": (X, B, 2.5),
    "clamp.default": (X, 0.6, None),
    "bitwise_not.default": (B,),
    "matmul.default": (X, X.transpose(1, 2)),
    "mm.default": (M, M),
    "bmm.default": (X, X.transpose(1, 2)),
    "addmm.default": (M, M, M),
    "baddbmm.default": (X @ X.transpose(1, 2), X, X.transpose(1, 2)),
    "einsum.default": ("bij,bkj->bik", [X, Y]),
    "cat.default": ([X, Y], 1),
    "stack.default": ([X, Y], -1),
    "transpose.int": (X, 1, 2),
    "t.default": (M,),
    "permute.default": (X, [2, 0, 1]),
    "unsqueeze.default": (X, 1),
    "squeeze.dim": (X[:, :1], 1),
    "select.int": (X, 1, 2),
    "mean.dim": (X, [1], True),
    "sum.dim_IntList": (X, [0, 2]),
    "amax.default": (X, [1], False),
    "softmax.int": (X, -1),
    "layer_norm.default": (X, [6], X[0, 0], Y[0, 0], 1e-5),
    "group_norm.default": (X, 2, M[0], M[1], 1e-5),
    "rms_norm.default": (X, [6], X[0, 0]),
    "conv1d.default": (X, torch.rand(3, 4, 3), None, [1], [1]),
    "conv2d.default": (IMAGE, torch.rand(3, 4, 3, 3), torch.rand(3), [2, 2], [1, 1]),
    "conv3d.default": (IMAGE.unsqueeze(2), torch.rand(3, 4, 1, 3, 3), None),
    "embedding.default": (M, torch.tensor([[0, 3], [2, 2]])),
    "index_select.default": (X, 1, torch.tensor([3, 0])),
    "linear.default": (X, torch.rand(3, 6), torch.rand(3)),
    "gelu.default": (X,),
    "scaled_dot_product_attention.default": (IMAGE, IMAGE, IMAGE, None, 0.0, True),
    "view.default": (X, [8, 6]),
    "reshape.default": (X, [2, -1]),
    "expand.default": (X[:1], [2, -1, 6]),
    "flatten.using_ints": (X, 1, 2),
    "unflatten.int": (X, 2, [2, 3]),
}


def arguments_of(name):
    for kind, names in {
        "logical": "logical_and.default logical_or.default bitwise_and.Tensor bitwise_or.Tensor",
        "binary": "add.Tensor sub.Tensor mul.Tensor div.Tensor eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor",
        "scalar": "pow.Tensor_Scalar eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar",
    }.items():
        if name in names.split():
            return ARGUMENTS[kind]
    return ARGUMENTS.get(name, ARGUMENTS["unary"])


@pytest.mark.parametrize("target", BINDINGS, ids=lambda target: str(target).removeprefix("aten."))
def test_a_binding_computes_what_its_operator_does(target):
    arguments = arguments_of(str(target).removeprefix("aten."))
    ours, expected = BINDINGS[target](*arguments), target(*arguments)
    assert torch.equal(ours, expected) and ours.dtype == expected.dtype and ours.stride() == expected.stride()
    sources = [a for a in arguments if isinstance(a, torch.Tensor)]
    assert [shares(ours, a) for a in sources] == [shares(expected, a) for a in sources]


def shares(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["video_unet", "decoder"])
def test_the_zoo_runs_as_exactly_as_the_reference_does(name):
    """Not bit for bit: convolutions and linear layers of ours add in the order of a product of matrices, as that CPU's library does it."""
    from graphwright import models

    module, args, kwargs = models.load(name, "tiny")
    program = ir.capture(module, args, kwargs)
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    wide = [leaf.double() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf for leaf in leaves]
    exact = reference_run(to_float64(program), wide)[0]
    ours, reference = (distance(outputs, exact) for outputs in (Executor(program)(leaves)[0], reference_run(program, leaves)[0]))
    assert ours <= 4 * reference  # the exact contract's own factor


def distance(outputs, exact):
    """The greatest relative error (2-norm) of an output."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(outputs, exact, strict=True))
