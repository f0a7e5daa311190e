"""Trained weights in files: safetensors with every parameter by its name, in float16. Buffers are computed, so no file holds them.

float16 halves the file, and its relative rounding of 2^-11 is far below what training leaves undecided; no weight of a trained
network comes near its largest number, 65504.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..ir.errors import ArtifactError


@torch.no_grad()
def read_weights(module: nn.Module, path: Path) -> None:
    """Fills every parameter of `module` in place, in its own dtype; on the meta device only names and shapes are compared.

    Raises:
        ArtifactError: there is no such file, it is damaged, or it holds the parameters of another network.
    """
    stored = _tensors(path)
    parameters = dict(module.named_parameters())
    expected, found = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (parameters, stored))
    if expected != found:
        differing = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ArtifactError(
            f"{path} holds weights of another network: {differing} is {found.get(differing, 'missing')} there "
            f"and {expected.get(differing, 'missing')} here; train it again (python -m graphwright.models.train)"
        )
    for name, parameter in parameters.items():
        parameter.copy_(stored[name])


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise ArtifactError(f"there are no weights at {path}: install graphwright again, or train them") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read as weights ({error}): install graphwright again, or train them") from error


def write_weights(module: nn.Module, path: Path) -> None:
    """Writes every parameter of `module`, rounded to float16, to `path`: the whole file or none.

    Raises:
        ArtifactError: a weight is not finite in float16.
        OSError: the file cannot be written.
    """
    rounded = {name: parameter.detach().to("cpu", torch.float16) for name, parameter in module.named_parameters()}
    overflowing = [name for name, tensor in rounded.items() if not tensor.isfinite().all()]
    if overflowing:
        raise ArtifactError(f"{overflowing[0]} holds numbers that are not finite in float16, so {path} was not written")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(save(rounded))
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
