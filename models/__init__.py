"""The model zoo: a reference network of each family that graphwright compiles, as plain `nn.Module`s.

`module, args, kwargs = load("video_unet", "small", frames=24)`, then `module(*args, **kwargs)`. Weights are random, but for the
sizes that `trained` lists.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..ir.errors import InputError
from . import decoder, dit, moe_dlm, rat_lm, video_unet, video_unet_svd, vit
from .random_weights import draw_weights
from .trained_weights import read_weights


@dataclass(frozen=True)
class Network:
    """How to make one network: its class, by size what to give the class and `example_inputs`, and the sizes that are trained."""

    build: type[nn.Module]
    sizes: dict
    example_inputs: Callable
    trained: tuple[str, ...] = ()


_NETWORKS = {
    "video_unet": Network(video_unet.VideoUNet, video_unet.SIZES, video_unet.example_inputs),
    "video_unet_svd": Network(video_unet_svd.VideoUNetSVD, video_unet_svd.SIZES, video_unet_svd.example_inputs),
    "dit": Network(dit.DiT, dit.SIZES, dit.example_inputs, trained=("digits",)),
    "decoder": Network(decoder.Decoder, decoder.SIZES, decoder.example_inputs, trained=("text",)),
    "rat": Network(rat_lm.RatLM, rat_lm.SIZES, rat_lm.example_inputs, trained=("text",)),
    "vit": Network(vit.ViT, vit.SIZES, vit.example_inputs),
    "moe_dlm": Network(moe_dlm.MoEDLM, moe_dlm.SIZES, moe_dlm.example_inputs, trained=("text",)),
}


def names() -> list[str]:
    """The names that `load` knows."""
    return list(_NETWORKS)


def sizes(name: str) -> list[str]:
    """The sizes of one network, smallest first. Raises InputError for a name that is not known."""
    return list(_network(name).sizes)


def trained(name: str) -> list[str]:
    """The sizes of one network whose weights are trained. Raises InputError for a name that is not known."""
    return list(_network(name).trained)


def weights_path(name: str, size: str) -> Path:
    """Where the weights of a trained size are: a file that comes with the package."""
    return Path(__file__).parent / f"{name}_{size}.safetensors"


def load(name: str, size: str = "small", *, seed: int = 0, **sizes: int) -> tuple[nn.Module, tuple, dict]:
    """A network in eval mode and inputs to call it with: `module(*args, **kwargs)`.

    Weights and inputs are a function of the arguments alone, drawn on the CPU; the global random state is left as it
    was. Under `torch.device("meta")` the module and its inputs have shapes but no storage.

    Args:
        name: one of `names()`.
        size: "tiny" (under a million parameters, for tests), "small" (tens of millions) or "base" (as published; the
            U-Nets are 5 GB, so a look at one is best taken on the meta device). "digits" of dit is trained: a diffusion
            model of scikit-learn's digits (`digits`, `sampling`), made by `python -m graphwright.models.train dit`. So is "text"
            of decoder, rat and moe_dlm, by `python -m graphwright.models.train decoder` and so on: language models of Python's
            documentation (`text`). "plus" of rat is RAT+, in the size of "tiny".
        seed: of the weights and the inputs; of the inputs alone where the weights are trained.
        sizes: of the inputs, in place of those of `size`: batch, frames, height, width (in latent pixels) for the U-Nets;
            batch, height, width for vit; batch, length (in tokens) for dit, decoder, rat and moe_dlm.

    Raises: InputError for a name, size or input size that is not known or does not fit the network; ArtifactError for a file of
    trained weights that is missing or damaged.
    """
    network = _network(name)
    if size not in network.sizes:
        raise InputError(f"{name} has no size {size!r}; there are {', '.join(network.sizes)}")
    config = _resized(name, network.sizes[size], sizes)
    device = "meta" if torch.get_default_device().type == "meta" else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        module = network.build(config).eval()
        if size in network.trained:
            read_weights(module, weights_path(name, size))
        else:
            draw_weights(module)
        args, kwargs = network.example_inputs(config)
    return module, args, kwargs


def _resized(name: str, config, sizes: dict[str, int]):
    for key, value in sizes.items():
        if key not in config.INPUT_SIZES:
            raise InputError(f"{name} has no input size {key!r}; there are {', '.join(config.INPUT_SIZES)}")
        if type(value) is not int or value < 1:
            raise InputError(f"{name} wants a positive integer {key}, not {value!r}")
    try:
        return dataclasses.replace(config, **sizes)
    except ValueError as error:
        raise InputError(f"{name} cannot be made so: {error}") from error


def _network(name: str) -> Network:
    if name not in _NETWORKS:
        raise InputError(f"no network {name!r} in the zoo; there are {', '.join(_NETWORKS)}")
    return _NETWORKS[name]
