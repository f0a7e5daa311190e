"""Which calls draw random numbers. torch's tag marks operators that can; with these arguments they may not."""

import torch

from ..ir import Node
from ..ir.calls import is_pure, is_random
from ..ir.pattern import named_arguments


def draws_random_numbers(node: Node) -> bool:
    """Whether the call draws from a generator. Attention and dropout without dropout do not."""
    if not is_random(node.target):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    arguments = named_arguments(node)
    if "dropout_p" in arguments:
        return arguments["dropout_p"] != 0
    if "train" in arguments:
        return bool(arguments["train"]) and arguments["p"] != 0
    return True


def is_repeatable(node: Node) -> bool:
    """Whether the call may be dropped when unused, and shared when repeated."""
    return is_pure(node.target) or is_random(node.target) and not draws_random_numbers(node)
