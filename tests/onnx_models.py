"""What tests of ONNX models compile."""

from torch import nn

import graphwright as gw


def compiled_of(module, *inputs, passes=(), **options):
    return gw.compile(module, passes, example_inputs=inputs, backend="aten", cache=False, **options)


class Function(nn.Module):
    """A module of one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
