"""Trains networks of the zoo: `python -m graphwright.models.train dit` makes the weights that `load("dit", "digits")` reads,
`decoder`, `rat` and `moe_dlm` those of `load("decoder", "text")`, `load("rat", "text")` and `load("moe_dlm", "text")`.

One seed gives one network on one machine with one number of threads; sums are taken in other orders with another.
"""

import argparse
import copy
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ir.errors import GraphwrightError
from . import decoder, digits, dit, moe_dlm, rat_lm, text
from .denoising import LENGTH, denoising_loss, masked
from .sampling import TRAIN_STEPS, noised
from .trained_weights import write_weights

Tell = Callable[[int, float], None]  # told the steps done and the loss

WARMUP_STEPS = 100
AVERAGING = 0.995  # weights of the last 200 steps or so


def train_dit(steps: int, seed: int = 0, tell: Tell | None = None) -> nn.Module:
    """The network `dit` of size "digits", trained to predict the noise in one half of scikit-learn's digits.

    Its loss is the mean square of (e - predicted), over steps t drawn evenly. The variance that a DiT predicts beside the noise is
    not trained and stays zero: DDIM has no use for it.

    Raises: TargetError where scikit-learn is not installed.
    """
    train, _ = digits.halves()
    batch_size, dropped = 64, 0.1  # labels are dropped for classifier-free guidance

    def loss(network: nn.Module) -> Tensor:
        chosen = torch.randint(len(train.labels), (batch_size,))
        images, labels = train.images[chosen], train.labels[chosen]
        labels = labels.masked_fill(torch.rand(batch_size) < dropped, digits.NO_CLASS)
        timestep, noise = torch.randint(TRAIN_STEPS, (batch_size,)), torch.randn_like(images)
        predicted = network(noised(images, noise, timestep), timestep, labels)
        return (predicted[:, : images.shape[1]] - noise).square().mean()

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = dit.DiT(dit.SIZES["digits"])
        _start_at_identity(network)
        return fit(network, loss, steps, tell)


def _start_at_identity(network: dit.DiT) -> None:
    """adaLN-Zero (Peebles & Xie 2023, section 3.2): every block starts as the identity, and the output as zero."""
    for module in (network.head, network.modulation, *(block.modulation for block in network.blocks)):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


def train_decoder(steps: int, seed: int = 0, tell: Tell | None = None) -> nn.Module:
    """The network `decoder` of size "text", trained to predict each next token of `text.training()`; its loss is in nats.

    Each step drops whole layers, the deeper the likelier (`_drawn_layers`), so that the network does without them later too.
    """
    draw = _windows_of_text()

    def loss(network: nn.Module) -> Tensor:
        return next_token_loss(decoder.with_layers(network, _drawn_layers(len(network.layers))), draw())

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = decoder.Decoder(decoder.SIZES["text"])
        _start_near_identity(network)
        return fit(network, loss, steps, tell, peak_rate=2e-3)


def train_rat(steps: int, seed: int = 0, tell: Tell | None = None) -> nn.Module:
    """The network `rat` of size "text", trained as `train_decoder` says, all layers at every step."""
    draw = _windows_of_text()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = rat_lm.RatLM(rat_lm.SIZES["text"])
        _start_near_identity(network)
        return fit(network, lambda network: next_token_loss(network, draw()), steps, tell, peak_rate=2e-3)


def _windows_of_text(batch_size: int = 4) -> Callable[[], Tensor]:
    """Draws ids [batch_size, CONTEXT + 1] from `text.training()`, each row from a place of its own."""
    ids = torch.tensor(text.encode(text.training()))
    window = torch.arange(text.CONTEXT + 1)
    return lambda: ids[torch.randint(len(ids) - text.CONTEXT, (batch_size, 1)) + window]


def next_token_loss(network: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """The mean of -log p of each next token of ids [B, L + 1], in nats."""
    return F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


DROPPED_AT_MOST = 0.5  # how often a step goes without the last layer


def _drawn_layers(depth: int) -> list[int]:
    """Layer l is dropped with probability DROPPED_AT_MOST * l / (depth - 1): the first never, a quarter of all in the mean.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", section 3, for a whole batch at a time and without their
    rescaling of what is kept, as in Fan et al. 2020, "Reducing Transformer Depth on Demand with Structured Dropout".
    """
    dropped = torch.rand(depth) < DROPPED_AT_MOST * torch.linspace(0, 1, depth)
    return [layer for layer in range(depth) if not dropped[layer]]


def _start_near_identity(network: decoder.Decoder | rat_lm.RatLM | moe_dlm.MoEDLM) -> None:
    """Every product keeps the size of what it reads, but for what the layers add, which together is as large as the embedding's."""
    for module in network.modules():
        for each in module.parameters(recurse=False):
            if each.dim() > 1:  # a tied head is the embedding, whose rows it reads; matrices of experts are stacked
                nn.init.normal_(each, std=each.shape[-1] ** -0.5)
    for name, parameter in network.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            with torch.no_grad():
                parameter.mul_((2 * len(network.layers)) ** -0.5)


RISING = 0.4  # the share of the steps in which the most tokens that are masked rises
BALANCE = 0.01  # the weight of `_imbalance` beside the loss, as in its source


def train_moe_dlm(steps: int, seed: int = 0, tell: Tell | None = None) -> nn.Module:
    """The network `moe_dlm` of size "text", trained to find masked tokens of `text.training()`; its loss is in nats.

    Of each row an eighth to all of the tokens are masked, evenly: fewer would be a loss of few tokens at the weight of many. Over the
    first steps the most rises from an eighth: behind many masks neighbours say little, and a network that begins there stays for long at
    how often each token is.
    """
    ids = torch.tensor(text.encode(text.training()))
    config = moe_dlm.SIZES["text"]
    batch_size, window, fewest = 16, torch.arange(LENGTH), LENGTH // 8
    spans = iter([*torch.linspace(0, LENGTH - fewest, int(steps * RISING)).tolist(), *itertools.repeat(LENGTH - fewest, steps)])

    def loss(network: nn.Module) -> Tensor:
        tokens = ids[torch.randint(len(ids) - LENGTH, (batch_size, 1)) + window]
        shares = (torch.arange(batch_size) + torch.rand(batch_size)) / batch_size
        noisy = masked(tokens, fewest + (shares * (next(spans) + 1)).long(), config.mask_id)
        with router_scores(network) as scores:
            found = denoising_loss(network(noisy), tokens, noisy, config.mask_id)
        return found + BALANCE * sum(_imbalance(each, config.chosen) for each in scores)

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = moe_dlm.MoEDLM(config)
        _start_near_identity(network)
        return fit(network, loss, steps, tell, peak_rate=2e-3)


@contextmanager
def router_scores(network: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, the scores [T, E] of each mixture of experts that `network` calls are added to the list."""
    scores: list[Tensor] = []
    routers = [module for module in network.modules() if isinstance(module, moe_dlm.Router)]
    handles = [router.register_forward_hook(lambda _module, _arguments, result: scores.append(result)) for router in routers]
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def _imbalance(scores: Tensor, chosen: int) -> Tensor:
    """E sum_e f_e P_e, 1 where experts are chosen evenly: f_e the share of choices, P_e the mean probability.

    Source: Fedus et al. 2022, "Switch Transformers", equations 4 to 6, for `chosen` experts a token.
    """
    probabilities = scores.softmax(-1)
    index = probabilities.topk(chosen, -1).indices
    share = torch.zeros_like(probabilities).scatter(1, index, 1.0 / chosen).mean(0)
    return scores.shape[1] * (share * probabilities.mean(0)).sum()


def fit(
    network: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int, tell: Tell | None = None, peak_rate: float = 1e-3
) -> nn.Module:
    """Takes `steps` steps of AdamW down `loss(network)`; returns a network in eval mode with the moving average of the weights.

    The learning rate rises linearly to its peak over the first steps, then falls to zero along half a cosine.
    """
    optimizer = torch.optim.AdamW(network.parameters(), peak_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    averaged = copy.deepcopy(network).eval().requires_grad_(False)
    for step in range(steps):
        value = loss(network.train())
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _average(averaged, network)
        if tell is not None:
            tell(step + 1, value.item())
    return averaged


def _rate(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step, 0 .. steps - 1."""
    return min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module) -> None:
    for mean, parameter in zip(averaged.parameters(), network.parameters()):
        mean.lerp_(parameter, 1 - AVERAGING)


# --- the command -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What to train of a network: the size, how, and for how many steps unless told."""

    size: str
    train: Callable[[int, int, Tell | None], nn.Module]
    steps: int


RECIPES = {
    "dit": Recipe("digits", train_dit, steps=3000),
    "decoder": Recipe("text", train_decoder, steps=4000),
    "moe_dlm": Recipe("text", train_moe_dlm, steps=5000),
    "rat": Recipe("text", train_rat, steps=2400),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains one network and writes its weights; returns the exit code: 0, or 130 when interrupted."""
    parser = _parser()
    options = parser.parse_args(argv)
    recipe = RECIPES[options.network]
    path = options.out or Path(f"{options.network}_{recipe.size}.safetensors")
    steps = options.steps or recipe.steps
    start = time.perf_counter()
    try:
        _check_writable(path)
        with _bar(steps) as tell:
            network = recipe.train(steps, options.seed, tell)
        write_weights(network, path)
    except (GraphwrightError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB: {steps} steps in {time.perf_counter() - start:.0f} s")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m graphwright.models.train", description="Trains a network of the zoo and writes its weights.")
    parser.add_argument("network", choices=RECIPES, help="what to train")
    parser.add_argument("--steps", type=_whole_number(1), help="optimizer steps (default: as the zoo's own weights were made)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: NETWORK_SIZE.safetensors, in this folder)")
    parser.add_argument("--seed", type=_whole_number(0), default=0, help="of the first weights and of all that is drawn (default: 0)")
    return parser


def _whole_number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"wants a whole number from {least}, not {text!r}")
        return int(text)

    return read


def _check_writable(path: Path) -> None:
    """Raises OSError now for what would otherwise fail after minutes."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; --out wants a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the folder {path.parent} may not be written to")


@contextmanager
def _bar(steps: int) -> Iterator[Tell | None]:
    """A callback that moves a bar, with the loss and the time left, on a terminal's stderr; None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("reading", total=steps)
        yield lambda done, loss: bar.update(task, completed=done, description=f"loss {loss:.3f}")


if __name__ == "__main__":
    sys.exit(main())
