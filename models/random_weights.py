"""Random weights under which every path of a network matters and every activation stays near 1.

The usual initial weights will not do: they zero gates and biases, leave norms at the identity and attention near uniform,
so a compiler could drop any of these without an error to show for it.
"""

import math

import torch
from torch import nn

ATTENTION_GAIN = math.sqrt(2.0)  # of queries and of keys: logits of deviation 2, so that some keys stand out
BRANCH_GAIN = 0.5  # of what is added to a residual stream: 32 branches make a deviation of 3
MODULATION_GAIN = 0.5  # adaLN-Zero's shifts, scales and gates, which training starts at zero

GAINS = {
    "to_q": ATTENTION_GAIN, "to_k": ATTENTION_GAIN, "q_proj": ATTENTION_GAIN, "k_proj": ATTENTION_GAIN,
    "q_norm": ATTENTION_GAIN, "k_norm": ATTENTION_GAIN, "qkv": ATTENTION_GAIN,
    "to_out.0": BRANCH_GAIN, "net.2": BRANCH_GAIN, "proj_out": BRANCH_GAIN, "conv2": BRANCH_GAIN,
    "o_proj": BRANCH_GAIN, "down_proj": BRANCH_GAIN, "attn.proj": BRANCH_GAIN, "mlp.fc2": BRANCH_GAIN,
    "modulation": MODULATION_GAIN,
}  # fmt: skip


@torch.no_grad()
def draw_weights(network: nn.Module) -> None:
    """Fills every parameter of `network` in place from the global generator, in the order of its modules."""
    for name, module in network.named_modules():
        gain = next((gain for ending, gain in GAINS.items() if name.endswith(ending)), 1.0)
        _draw_module(module, gain)


def _draw_module(module: nn.Module, gain: float) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
            parameter.normal_(gain if name == "weight" else 0.0, 0.1)
        elif isinstance(module, nn.Embedding):
            parameter.normal_()  # a tied output head comes later in the network and draws it again, as a linear layer
        elif name == "weight" or parameter.dim() == 3:  # matrices of experts are stacked
            fan_in = parameter[0].numel() if name == "weight" else parameter.shape[-1]
            parameter.normal_(0.0, gain / math.sqrt(fan_in))
        else:  # biases, class tokens, learned positions, blending weights
            parameter.normal_(0.0, 0.1)
