"""Which calls draw random numbers. torch's tag marks operators that can; with these arguments they may not."""

from typing import Any

from ..ir import Node
from ..ir.calls import is_pure, is_random
from ..ir.pattern import named_arguments


def draws_random_numbers(node: Node) -> bool:
    """Whether the call draws from a generator. Attention and dropout without dropout do not."""
    target: Any = node.target
    if not is_random(target):
        return False
    arguments = named_arguments(node)
    if "dropout_p" in arguments:
        return arguments["dropout_p"] != 0
    if "train" in arguments:
        return bool(arguments["train"]) and arguments["p"] != 0
    return True


def is_repeatable(node: Node) -> bool:
    """Whether the call may be dropped when unused, and shared when repeated."""
    target: Any = node.target
    return is_pure(target) or (is_random(target) and not draws_random_numbers(node))
