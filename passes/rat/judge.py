"""The limit points at which a recurrence is the attention that it stands for, as rewrites of the program that has it. Recurrences in
`kept`, by their places among all attentions, were there before, and stay as they are.

closed gates, chunk 1                       any window, sinks and local form
local "raw", a window over the sequence     any gates
local "state", such a window                closed gates
"""

from collections.abc import Collection
from typing import Any

import torch

from ...ir import Node, Program, Rewriter
from ...ir.pattern import named_arguments
from .gates import CLOSED
from .sites import RAT, recurrences_of

aten = torch.ops.aten


def with_chunks_of_one(program: Program, kept: Collection[int] = ()) -> Program:
    """`program` with chunks of one token and closed gates."""
    return _edited(program, kept, lambda arguments: {"chunk": 1, "summary_bias": 0.0}, lambda arguments: True)


def with_window_over_all(program: Program, length: int, kept: Collection[int] = ()) -> Program:
    """`program` with a window over `length` tokens; where local tokens are states, with closed gates."""
    return _edited(program, kept, lambda arguments: {"window": length}, lambda arguments: arguments["local"] == "state")


def _edited(program: Program, kept: Collection[int], attributes: Any, closes: Any) -> Program:
    edited = program.copy()
    rewriter = Rewriter(edited, pass_name="limit-point")
    for node in [node for place, node in recurrences_of(edited.main).items() if place not in kept]:
        arguments = named_arguments(node)
        with rewriter.step("limit-point"):
            if closes(arguments):
                arguments["gate"], arguments["chunk_bias"] = _closed(rewriter, node, arguments["gate"]), None
            new = arguments | attributes(arguments)
            rewriter.set_arguments(node, [new.pop(name) for name in _POSITIONAL], new)
    return edited


def _closed(rewriter: Rewriter, before: Node, gate: Node) -> Node:
    return rewriter.insert(aten.full_like.default, (gate, CLOSED), before=before, origin=before)


_POSITIONAL = tuple(argument.name for argument in RAT._schema.arguments if not argument.kwarg_only)
