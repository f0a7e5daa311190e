"""Lets experts of the zoo's masked-diffusion language model choose their tokens, and trains its routers for it, everything else as it was.

    python examples/retrofit_experts.py [--steps 200] [--k K]

Prints the loss on held-out text of the model as it comes, whose tokens choose, after the pass, and after training.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import graphwright as gw
from graphwright.models import text
from graphwright.models.denoising import LENGTH, denoising_loss, held_out_loss, masked

Tell = Callable[[int, float], None]


@dataclass(frozen=True)
class Retrofitted:
    """Losses on held-out text in nats a token: tokens choose, experts choose, and after training; losses of the training steps."""

    token_choice: float
    swapped: float
    trained: float
    losses: list[float]
    model: gw.CompiledModel


def retrofit(
    module: nn.Module,
    choice: gw.ExpertChoice,
    train_ids: Sequence[int],
    held_out_ids: Sequence[int],
    *,
    steps: int,
    length: int = LENGTH,
    batch: int = 16,
    rate: float = 1e-3,
    tell: Tell | None = None,
) -> Retrofitted:
    """Takes `steps` steps of AdamW on the routers of `module` alone; of each row of `train_ids` 1 to `length` tokens are masked, evenly."""
    size = torch.export.Dim("batch", max=256)
    example = (torch.zeros(2, length, dtype=torch.int64),)
    passes = ["regroup-experts", choice]
    model = gw.compile(module, passes, example_inputs=example, dynamic_shapes=({0: size},), backend="aten", trainable=True)
    mask_id: int = module.mask_id  # type: ignore[assignment]
    token_choice, swapped = (held_out_loss(each, held_out_ids, mask_id, length) for each in (module, model))
    optimizer = torch.optim.AdamW([each for name, each in model.named_parameters() if is_router(name)], rate, weight_decay=0.0)
    ids, draw, losses = torch.as_tensor(train_ids), torch.Generator().manual_seed(0), []
    for step in range(steps):
        tokens = ids[torch.randint(len(ids) - length, (batch, 1), generator=draw) + torch.arange(length)]
        noisy = masked(tokens, torch.randint(1, length + 1, (batch,), generator=draw), mask_id, draw)
        loss = denoising_loss(model(noisy), tokens, noisy, mask_id)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if tell is not None:
            tell(step + 1, losses[-1])
    return Retrofitted(token_choice, swapped, held_out_loss(model, held_out_ids, mask_id, length), losses, model)


def is_router(name: str) -> bool:
    """Whether a parameter of the zoo's network scores experts."""
    return name.endswith("mlp.gate.weight")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of training of the routers (default: 200)")
    parser.add_argument("--k", type=int, help="experts a token in the mean (default: as many as tokens chose)")
    options = parser.parse_args(argv)
    module, _, _ = gw.models.load("moe_dlm", "text")
    ids = [text.encode(part) for part in (text.training(), text.held_out())]
    result = retrofit(module, gw.ExpertChoice(k=options.k), *ids, steps=options.steps, tell=_tell)
    print(f"tokens choose: {result.token_choice:.3f} nats a token")
    print(f"experts choose: {result.swapped:.3f}; with routers trained for it: {result.trained:.3f}")
    return 0


def _tell(step: int, loss: float) -> None:
    if step % 20 == 0:
        print(f"step {step}: loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
