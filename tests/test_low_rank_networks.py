"""Linear layers of real architectures: every one is found, and is quantized or left with a reason that a reader expects.

If an upstream model changes so that a pattern no longer matches, this fails.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import graphwright as gw
from graphwright.ir.float64 import to_float64
from graphwright.ir.run import run
from graphwright.passes.low_rank.rewrite import LOWRANK

sys.path.insert(0, str(Path(__file__).parent))
from real_networks import NETWORKS

pytest.importorskip("transformers", reason="install the test extra: pip install graphwright[test]")
pytest.importorskip("diffusers", reason="install the test extra: pip install graphwright[test]")

aten = torch.ops.aten

# linear layers in all; quantized; left: by name, for their width of 32 in weight-only layers of int4-g64, for a shared weight
EXPECTED = {
    "llama": (15, 14, {"name": 1}),
    "qwen3": (15, 14, {"name": 1}),
    "gemma": (15, 14, {"shared": 1}),
    "gpt2": (9, 8, {"shared": 1}),
    "bert": (13, 12, {"name": 1}),
    "t5": (33, 32, {"shared": 1}),
    "whisper": (17, 16, {"shared": 1}),
    "clip": (26, 26, {}),
    "unet_2d": (50, 40, {"name": 10}),
    "dit": (20, 14, {"name": 4, "width": 2}),
    "flux": (28, 18, {"name": 7, "width": 4}),
}
_REASONS = {"its name is among those to skip": "name", "is no multiple of": "width", "is used": "shared"}


def captured(name):
    torch.manual_seed(0)
    module, args, kwargs, _ = NETWORKS[name]()
    options = {"example_inputs": args, "example_kwargs": kwargs, "backend": "aten", "cache": False}
    return gw.compile(module, **options).program, (args, kwargs)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_linear_layer_is_quantized_or_left_with_a_reason(name):
    program, _ = captured(name)
    every_pass = gw.AbsorbOutliers(weight="int4-g16", rank=2, refine=0, min_numel=0, budget=1.0)
    result = gw.PassManager([every_pass]).run(program)
    layers = sum(node.target in (aten.linear.default, aten.addmm.default, aten.mm.default) for node in program.main.calls)
    quantized = sum(node.target is LOWRANK for node in result.program.main.calls)
    reasons = Counter(kind for left in result.reports[-1].left for text, kind in _REASONS.items() if text in left.reason)
    joined = sum("split-concatenation" == record.rule for record in result.reports[-1].records)
    assert (layers, quantized, dict(reasons)) == EXPECTED[name]
    assert quantized - joined + sum(reasons.values()) == layers


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "t5", "flux", "unet_2d"])
def test_smoothing_of_a_real_network_is_exact(name):
    program, example = captured(name)
    after = gw.PassManager([gw.Smooth(calibration=[example], min_numel=0)]).run(program).program
    inputs = [each.double() if each.is_floating_point() else each for each in torch.utils._pytree.tree_leaves(example) if _is_tensor(each)]
    leaves = iter(inputs)
    flat = [next(leaves) if _is_tensor(each) else each for each in torch.utils._pytree.tree_leaves(example)]
    expected, got = (run(to_float64(each), flat)[0] for each in (program, after))
    for y, z in zip(expected, got, strict=True):
        if _is_tensor(y) and y.is_floating_point():
            assert (z - y).abs().max() <= 1e-10 * y.abs().max()


def _is_tensor(value):
    return isinstance(value, torch.Tensor)
