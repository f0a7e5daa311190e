"""Samples of a diffusion network: the noise schedule that it was trained with, and DDIM's way back from noise to an image.

At step t an image x0 has become x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e, with e from N(0, I); the network predicts e.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..ir.errors import InputError

TRAIN_STEPS = 1000  # t is 0 .. 999


def signal_levels() -> Tensor:
    """a_t of the cosine schedule, falling from nearly 1 to nearly 0: [TRAIN_STEPS], float64.

    a_t = prod over s <= t of (1 - b_s), b_s = min(1 - f(s + 1) / f(s), 0.999), f(s) = cos^2(pi/2 (s / TRAIN_STEPS + 0.008) / 1.008).

    Source: Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", equation 17.
    """
    times = torch.arange(TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
    levels = torch.cos(math.pi / 2 * (times + 0.008) / 1.008).square()
    return (levels[1:] / levels[:-1]).clamp(min=0.001).cumprod(0)


def noised(images: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """x_t of each image: sqrt(a_t) x0 + sqrt(1 - a_t) e; images and noise: [B, ...], timestep: [B], integer."""
    levels = signal_levels().to(timestep.device)[timestep].view(-1, *[1] * (images.dim() - 1))
    return levels.sqrt().to(images.dtype) * images + (1 - levels).sqrt().to(images.dtype) * noise


@torch.no_grad()
def ddim(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    class_labels: Tensor,
    steps: int = 50,
    guidance: float = 1.0,
    no_class: int | None = None,
) -> Tensor:
    """Images of the given classes, a function of `noise`, `class_labels` and the model alone: [B, C, H, W] in [-1, 1].

    At each of `steps` times, evenly spaced down from the last: x0 = (x_t - sqrt(1 - a_t) e) / sqrt(a_t), clipped to [-1, 1], where
    images of the data lie; then x_s = sqrt(a_s) x0 + sqrt(1 - a_s) e' at the next time s, with e' the noise that x_t and the clipped
    x0 imply. The last x0 is the image. Without clipping, an error of e would grow by 1 / sqrt(a_t), which is 20000 at the first step.

    Args:
        model: called as model(x, timestep, class_labels), returns noise in its first C channels, as `dit.DiT` does. Sizes are the
            same in every call.
        noise: [B, C, H, W], from N(0, I).
        class_labels: [B], integer.
        steps: number of calls of the model, 1 .. TRAIN_STEPS.
        guidance: how far to go from the prediction without a class to that with one: e = e_none + guidance (e_class - e_none).
            1 is the class's own, and the model is not asked for the other; else each call has 2B rows, the classless last.
        no_class: the label that stands for no class; needed when guidance is not 1.

    Raises: InputError for steps out of range, and for guidance that is not finite or lacks `no_class`.

    Sources: Song et al. 2021, "Denoising Diffusion Implicit Models", equation 12 with sigma = 0; Ho & Salimans 2022,
    "Classifier-Free Diffusion Guidance", equation 6 (whose w is guidance - 1); Lin et al. 2024, "Common Diffusion Noise Schedules
    and Sample Steps are Flawed", table 2, for times that include the last.
    """
    if type(steps) is not int or not 1 <= steps <= TRAIN_STEPS:
        raise InputError(f"ddim takes 1 to {TRAIN_STEPS} steps, not {steps!r}")
    if not math.isfinite(guidance):
        raise InputError(f"ddim wants a finite guidance, not {guidance!r}")
    if guidance != 1.0 and no_class is None:
        raise InputError(f"ddim with guidance {guidance} needs no_class, the label that stands for no class")
    levels = [*signal_levels().tolist(), 1.0]  # the 1.0 is found at index -1, the image's own time
    times = [*(round(TRAIN_STEPS * (steps - i) / steps) - 1 for i in range(steps)), -1]
    x = noise
    for time, following in zip(times, times[1:]):
        level, next_level = levels[time], levels[following]
        predicted = _predict(model, x, time, class_labels, guidance, no_class)
        image = ((x - math.sqrt(1 - level) * predicted) / math.sqrt(level)).clamp(-1.0, 1.0)
        implied = (x - math.sqrt(level) * image) / math.sqrt(1 - level)
        x = math.sqrt(next_level) * image + math.sqrt(1 - next_level) * implied
    return x


def _predict(model: Callable, x: Tensor, time: int, class_labels: Tensor, guidance: float, no_class: int | None) -> Tensor:
    """The noise in x, guided: [B, C, H, W]."""
    if guidance == 1.0:
        return model(x, torch.full_like(class_labels, time), class_labels)[:, : x.shape[1]]
    labels = torch.cat([class_labels, torch.full_like(class_labels, no_class)])
    both = model(torch.cat([x, x]), torch.full_like(labels, time), labels)[:, : x.shape[1]]
    with_class, without = both.chunk(2)
    return without + guidance * (with_class - without)
