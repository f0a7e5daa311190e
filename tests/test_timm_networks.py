"""Networks of timm are made and compiled without torchvision, and what stands in for it leaves no trace."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import graphwright as gw

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from timm_networks import timm_network, torchvision_stand_in  # noqa: E402

without_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None,
    reason="torchvision is installed, and nothing stands in for it: pip uninstall torchvision",
)


def modules_of_torchvision() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "torchvision"]


@without_torchvision
def test_the_stand_in_has_every_module_and_name_and_is_gone_afterwards():
    with torchvision_stand_in():
        from torchvision import transforms
        from torchvision.ops.misc import FrozenBatchNorm2d
        from torchvision.transforms.functional import InterpolationMode

        class Resize(transforms.Resize):
            pass

        assert not isinstance(torch.nn.BatchNorm2d(1), FrozenBatchNorm2d) and Resize()
        assert len({InterpolationMode.NEAREST, InterpolationMode.BILINEAR}) == 2
    assert importlib.util.find_spec("torchvision") is None and modules_of_torchvision() == []


@without_torchvision
def test_the_stand_in_is_gone_after_an_error_too():
    with pytest.raises(ZeroDivisionError), torchvision_stand_in():
        import torchvision  # noqa: F401

        1 / 0  # noqa: B018
    assert importlib.util.find_spec("torchvision") is None and modules_of_torchvision() == []


@pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed: make test installs it, without what it depends on"
)
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "efficientnet_b0"])
def test_a_network_of_timm_computes_what_it_does_in_eager(name):
    module, image = timm_network(name), torch.randn(1, 3, 224, 224)
    compiled = gw.compile(module, backend="aten", example_inputs=(image,))
    with torch.no_grad():
        actual, eager, exact = compiled(image), module(image), module.double()(image.double())
    # Both round in float32, sums in other orders: neither is to be much worse than the other.
    assert (actual - exact).norm() <= 4 * (eager - exact).norm()
