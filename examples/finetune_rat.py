"""Puts a chunked recurrence in the place of the attention of the zoo's language model of Python's documentation, and trains it back.

    python examples/finetune_rat.py [--steps 200] [--chunk 16] [--window 32] [--new-only]

Prints the perplexity of held-out text before the pass, after it, and after training, and the loss on the way.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import graphwright as gw
from graphwright.models import text
from graphwright.models.train import next_token_loss

Tell = Callable[[int, float], None]


@dataclass(frozen=True)
class Tuned:
    """Perplexities of held-out text, and the losses of the training steps in nats."""

    original: float
    converted: float
    tuned: float
    losses: list[float]
    model: gw.CompiledModel


def finetune(
    module: nn.Module,
    recurrence: gw.RatRecurrence,
    train_ids: Sequence[int],
    held_out_ids: Sequence[int],
    *,
    steps: int,
    length: int = text.CONTEXT,
    batch: int = 4,
    rate: float = 3e-4,
    new_only: bool = False,
    tell: Tell | None = None,
) -> Tuned:
    """Converts `module`, a decoder of tokens, and takes `steps` steps of AdamW on windows of `train_ids`; with `new_only` on the weights
    alone that the pass added."""
    size = torch.export.Dim("batch", max=64)
    example = (torch.zeros(2, length, dtype=torch.int64),)
    model = gw.compile(module, [recurrence], example_inputs=example, dynamic_shapes=({0: size},), backend="aten", trainable=True)
    original, converted = (text.perplexity(each, held_out_ids, length).per_token for each in (module, model))
    kinds = {name: weight.kind for name, weight in model.program.weights.items()}
    trained = [each for name, each in model.named_parameters() if not new_only or kinds[name] == "added"]
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.99), weight_decay=0.0)
    ids, generator, losses = torch.as_tensor(train_ids), torch.Generator().manual_seed(0), []
    for step in range(steps):
        start = torch.randint(len(ids) - length, (batch, 1), generator=generator)
        loss = next_token_loss(model, ids[start + torch.arange(length + 1)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.step()
        losses.append(loss.item())
        if tell is not None:
            tell(step + 1, losses[-1])
    return Tuned(original, converted, text.perplexity(model, held_out_ids, length).per_token, losses, model)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--new-only", action="store_true", help="train the weights alone that the pass added")
    options = parser.parse_args(argv)
    recurrence = gw.RatRecurrence(chunk=options.chunk, window=options.window, sinks=options.chunk)
    module, _, _ = gw.models.load("decoder", "text")
    train_ids, held_out = text.encode(text.training()), text.encode(text.held_out())

    def tell(step: int, loss: float) -> None:
        if step % 20 == 0 or step == 1:
            print(f"step {step}: loss {loss:.3f}", flush=True)

    found = finetune(module, recurrence, train_ids, held_out, steps=options.steps, new_only=options.new_only, tell=tell)
    print(f"perplexity of held-out text: {found.original:.2f} as attention, {found.converted:.2f} converted, {found.tuned:.2f} trained")
    return 0


if __name__ == "__main__":
    sys.exit(main())
