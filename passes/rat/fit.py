"""`init="fit"`: gates of one layer, without reading its input, under which its output on calibration tokens differs least in squares.

The layer is given the activations of the original model, in which no layer before it is a recurrence: what errors of these do to its
input is not made good by it, and the layers can be fitted one by one, each on the same runs.

Adam goes from mean gates over the biases of channels and places, at the bias of summaries that is best there. Of mean, fitted and closed
gates the best is kept, the first of equals: closed ones do not learn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .emit import Form
from .gates import Gates, initial
from .measure import Seen

STEPS = 60
RATE = 0.1


@dataclass(frozen=True)
class Fitted:
    """The gates to take, and the relative errors of mean, fitted and closed ones."""

    gates: Gates
    errors: dict[str, float]


def fit(batches: Sequence[Seen], form: Form, scale: float, channels: int, summary_bias: float) -> Fitted:
    """The best gates of one attention that was seen on `batches`."""
    whole = sum(float(seen.gave.float().square().sum()) for seen in batches) or 1.0

    def error(gates: Gates) -> float:
        with torch.no_grad():
            return sum(float(seen.squared_error(form, gates, scale)) for seen in batches) / whole

    biases = sorted({summary_bias, 0.0, math.log(form.chunk) / 2, math.log(form.chunk)})
    mean = min((initial("mean", channels, form.chunk, form.reset, each) for each in biases), key=error)
    found = {
        "mean": initial("mean", channels, form.chunk, form.reset, summary_bias),
        "fitted": _descended(batches, form, scale, mean, whole),
        "closed": initial("closed", channels, form.chunk, form.reset, summary_bias),
    }
    errors = {name: error(gates) for name, gates in found.items()}
    return Fitted(found[kept(errors)], errors)


def kept(errors: Mapping[str, float]) -> str:
    """Which gates are the best."""
    return min(errors, key=lambda name: errors[name])


def _descended(batches: Sequence[Seen], form: Form, scale: float, start: Gates, whole: float) -> Gates:
    assert start.chunk_bias is not None
    bias, places = (each.clone().requires_grad_() for each in (start.bias, start.chunk_bias))
    optimizer = torch.optim.Adam([bias, places], RATE)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            for seen in batches:
                (seen.squared_error(form, Gates(bias, places, start.summary_bias), scale) / whole).backward()
            optimizer.step()
    return Gates(bias.detach(), places.detach(), start.summary_bias)
