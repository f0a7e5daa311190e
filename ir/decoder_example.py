"""How a decoder is called so that it can be captured for decoding: tokens and positions of symbolic sizes, and neither caches nor masks.

input_ids [batch, length], position_ids [batch, length], use_cache=False
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import CaptureError

BATCH, LENGTH = 2, 9  # of the example: any sizes that no size of a model is likely to be
_TOKENS = ("input_ids", "tokens", "token_ids", "ids", "idx")


@dataclass(frozen=True)
class DecoderExample:
    """What `capture` takes: `capture(model, (), kwargs, dynamic_shapes=dynamic_shapes)`."""

    kwargs: dict[str, Any]
    dynamic_shapes: dict[str, Any]


def decoder_example(model: nn.Module) -> DecoderExample:
    """How to call `model`, whose `forward` takes tokens first and `position_ids` by name.

    Raises:
        CaptureError: it has an encoder, or takes no positions; the message says what to write.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise CaptureError(
            f"{type(model).__name__} is an encoder-decoder: its cross-attention has no cache here; compile its decoder alone"
        )
    parameters = inspect.signature(model.forward).parameters
    tokens = next((name for name in (*_TOKENS, *parameters) if name in parameters), None)
    if tokens is None or "position_ids" not in parameters:
        raise CaptureError(
            f"{type(model).__name__}.forward takes no position_ids, so a step cannot tell it where its token stands: write "
            "forward(self, input_ids, position_ids); models whose scores have a bias of positions, or that have recurrent states, have no "
            "cache here"
        )
    longest = _longest(model)
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1, max=longest)}
    places = torch.arange(LENGTH if longest is None else max(min(LENGTH, longest - 1), 2)).repeat(BATCH, 1)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kwargs: dict[str, Any] = {tokens: torch.zeros_like(places).to(device), "position_ids": places.to(device)}
    shapes: dict[str, Any] = {name: sizes for name in kwargs}
    if "use_cache" in parameters:
        kwargs["use_cache"], shapes["use_cache"] = False, None
    return DecoderExample(kwargs, shapes)


def _longest(model: nn.Module) -> int | None:
    """The most positions that the model has, where it says so and holds a table of them."""
    known = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 1 else None
