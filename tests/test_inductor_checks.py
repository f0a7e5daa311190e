"""What Inductor's code must not do to the process: end it because of the values in a tensor."""

from collections.abc import Callable

import pytest
import torch

import graphwright as gw
from graphwright.runtime.backend import has_cpp_compiler

pytestmark = pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")

ROWS = 4096  # Inductor uses threads from 2,048 elements on, and an exception does not leave a thread of OpenMP.


class Applied(torch.nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.function(*tensors)


TABLE = torch.randn(8, 16)
OUT_OF_RANGE = {
    "embedding": lambda table, index: torch.nn.functional.embedding(index, table).sin(),
    "gather": lambda table, index: table.gather(0, index[:8, None]).sin(),
    "index": lambda table, index: table[index].sin(),
    "index_add": lambda table, index: table.index_add(0, index[:8], table).sin(),
    "index_fill": lambda table, index: table.index_fill(0, index, 1.0).sin(),
    "index_put": lambda table, index: torch.index_put(table, (index,), table[:1]).sin(),
    "index_select": lambda table, index: table.index_select(0, index).sin(),
    "nll_loss": lambda table, index: torch.nn.functional.cross_entropy(table, index[:8]).sin(),
    "take": lambda table, index: table.take(index).sin(),
}
BY_ZERO = {
    "floor_divide": lambda a, b: (a // b).float().sin(),
    "fmod": lambda a, b: torch.fmod(a, b).float().sin(),
    "remainder": lambda a, b: (a % b).float().sin(),
    "truncated": lambda a, b: torch.div(a, b, rounding_mode="trunc").float().sin(),
}


@pytest.mark.parametrize("function", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_an_index_out_of_range_raises(function):
    index = torch.ones(ROWS, dtype=torch.int64)
    model = gw.compile(Applied(function), example_inputs=(TABLE, index), backend="inductor")
    torch.testing.assert_close(model(TABLE, index), function(TABLE, index))
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        model(TABLE, index + 1000)


@pytest.mark.parametrize("function", BY_ZERO.values(), ids=BY_ZERO)
def test_an_integer_divided_by_zero_raises(function):
    a, b = torch.arange(ROWS), torch.full((ROWS,), 3)
    model = gw.compile(Applied(function), example_inputs=(a, b), backend="inductor")
    torch.testing.assert_close(model(a, b), function(a, b))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        model(a, b * 0)


def test_the_checks_hold_inside_a_sliced_region():
    index = torch.ones(64, ROWS, dtype=torch.int64)
    table = torch.randn(8, 64)

    def function(table, index):
        return table[index].sin().exp().sum(-1)

    model = gw.compile(Applied(function), [gw.SliceGroups()], example_inputs=(table, index), backend="inductor")
    assert "gw.sliced" in str(model.program)
    torch.testing.assert_close(model(table, index), function(table, index))
    with pytest.raises(IndexError, match="out of bounds"):
        model(table, index + 1000)
