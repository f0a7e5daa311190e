"""What tests of ONNX models compile, import and compare with."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import graphwright as gw
from graphwright.ir.run import run
from graphwright.models.decoder import SIZES, Decoder


def compiled_of(module, *inputs, passes=(), **options):
    return gw.compile(module, passes, example_inputs=inputs, backend="aten", cache=False, **options)


@dataclass(frozen=True)
class ExportedDecoder:
    """A decoder, compiled, and what was written of it."""

    module: nn.Module
    compiled: gw.CompiledModel
    written: Any

    @staticmethod
    def made(folder):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = Decoder(replace(SIZES["tiny"], depth=1)).eval()
        compiled = gw.compile_decoder(module, backend="aten", cache=False)
        return ExportedDecoder(module, compiled, compiled.export_onnx(folder / "m.onnx", functions=["prefill", "decode"]))

    @property
    def files(self):
        """Those of prefill, of decode, and of weights."""
        return self.written.files


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
