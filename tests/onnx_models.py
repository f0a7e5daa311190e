"""What tests of ONNX models compile, import and compare with."""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import graphwright as gw
from graphwright.ir.run import run


def compiled_of(module, *inputs, passes=(), **options):
    return gw.compile(module, passes, example_inputs=inputs, backend="aten", cache=False, **options)


class Function(nn.Module):
    """A module of one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def model_of(nodes, inputs, outputs, initializers=(), *, opset=18, functions=(), **domains):
    """inputs and outputs: name -> shape of floats, or (element type, shape)."""

    def infos(described):
        typed = {name: shape if isinstance(shape, tuple) else (TensorProto.FLOAT, shape) for name, shape in described.items()}
        return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in typed.items()]

    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(initializers).items()]
    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), constants)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, version) for domain, version in domains.items())]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)


def results(model, *tensors, **options):
    return run(gw.from_onnx(model, **options), list(tensors))[0]


def onnxruntime_results(model, *tensors):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {each.name: tensor.numpy() for each, tensor in zip(session.get_inputs(), tensors, strict=True)})
