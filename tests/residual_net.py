"""A small network for tests that look for one call among several of a kind."""

import torch
from torch import nn


class ResidualNet(nn.Module):
    """Five residual blocks, each with a call that a clean-up takes away."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(5))

    def forward(self, x):
        for block in self.blocks:
            x = x * 1.0 + block(x)
        return x


def make():
    """The network with inputs, as MODEL on the command line."""
    torch.manual_seed(0)
    return ResidualNet().eval(), (torch.randn(3, 8),)
