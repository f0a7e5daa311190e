"""What a mask lets a query see, found by computing it: its part of the graph reads sizes and positions alone.

The part is run at several lengths, or the only one of a program of fixed sizes, with positions 0, 1, .. in each row. Causal is a mask in
which query i sees key j exactly when j <= i;
with a window, when also j > i - window. A window that is longer than these lengths shows when its number is taken for a small one: each
large number n of the part is replaced by two small ones, m, and where a window of m + c appears for both, the window is n + c.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node, Program
from ...ir.derive import Derivation, ancestors
from ...ir.pattern import NoMatch
from ...ir.run import run

ROWS = 2
LENGTHS = (1, 2, 3, 7, 20)
SMALL = (5, 9)  # what large numbers are taken for
LARGE = 64  # numbers up to this are seen as they are
HIDDEN = -3e4  # what is added to scores to hide a key: the lowest number of some dtype, of which float16's is the highest, -65504
_SIZE_OF = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Visible:
    """Key j is visible to query i where j <= i and, with a window (not 0), j > i - window."""

    window: int

    def mask(self, length: int) -> torch.Tensor:
        last = torch.arange(length).unsqueeze(1)
        keys = torch.arange(length)
        return (keys <= last) & (keys > last - self.window) if self.window else keys <= last


def visible(program: Program, mask: Node | None, tokens: Node, positions: Node | None) -> Visible | NoMatch:
    """What `mask` lets queries see (None: is_causal); a reason where it is not causal, or is not known before the tokens are."""
    if mask is None:
        return Visible(0)
    needed = ancestors([mask])
    nodes = [node for node in mask.graph.nodes if node in needed]
    problem = unknown(mask, tokens, positions)
    if problem is not None:
        return problem
    if isinstance(tokens.meta["val"].size(1), int):
        return _causal(_part(program, nodes, mask, tokens, positions, {}), [tokens.meta["val"].size(1)], mask)
    numbers = {abs(n) for node in nodes for n in _numbers((node.args, node.kwargs)) if abs(n) < 2**31}
    longest = max(LENGTHS[-1], *(n for n in numbers if n <= LARGE), 0) + 3
    found = _causal(_part(program, nodes, mask, tokens, positions, {}), [*LENGTHS, longest], mask)
    for number in sorted(n for n in numbers if n > LARGE):
        if isinstance(found, NoMatch):
            return found
        found = _with_number(program, nodes, mask, tokens, positions, number, found)
    return found


def unknown(mask: Node | None, tokens: Node, positions: Node | None) -> NoMatch | None:
    """Why what `mask` lets queries see is not known before the tokens are, or another input; None where it is."""
    if mask is None:
        return None
    needed = ancestors([mask])
    for node in (each for each in mask.graph.nodes if each in needed):
        if node.op == "placeholder" and node not in (tokens, positions) and isinstance(node.meta["val"], torch.Tensor):
            return NoMatch(f"its mask depends on input {node.target}: capture the model without it", node)
        if tokens in node.all_input_nodes and node.target is not _SIZE_OF:
            return NoMatch("its mask depends on the tokens", node)
    return None


def _causal(part: Program, lengths: Sequence[int], mask: Node) -> Visible | NoMatch:
    """What `part` lets queries see at all these lengths."""
    found, longest = Visible(0), max(lengths)
    for length in sorted(set(lengths), reverse=True):
        seen = _seen(part, length)
        if seen is None:
            return NoMatch("its mask holds numbers beside those that hide: positions have a bias", mask)
        if length == longest:
            count = int(seen[-1].sum())
            found = Visible(count if count < length else 0)
        if not torch.equal(seen, found.mask(length)):
            return NoMatch("its mask is not causal, with or without a window", mask)
    return found


def _with_number(
    program: Program, nodes: Sequence[Node], mask: Node, tokens: Node, positions: Node | None, number: int, known: Visible
) -> Visible | NoMatch:
    """`known`, or the window that `number` stands for."""
    windows = []
    for small in SMALL:
        part = _part(program, nodes, mask, tokens, positions, {number: small, -number: -small})
        seen = _causal(part, [*LENGTHS, LENGTHS[-1] + 3], mask)
        if isinstance(seen, NoMatch):
            return seen
        windows.append(seen.window)
    if windows == [known.window] * len(SMALL):
        return known
    if 0 in windows or windows[1] - windows[0] != SMALL[1] - SMALL[0]:
        return NoMatch(f"its mask depends on the number {number} in another way than a window does", mask)
    window = number + windows[0] - SMALL[0]
    return Visible(min(window, known.window) if known.window else window)


def _numbers(args: Any) -> list[int]:
    if isinstance(args, dict):
        return _numbers(list(args.values()))
    if isinstance(args, list | tuple):
        return [number for item in args for number in _numbers(item)]
    return [args] if type(args) is int else []


def _seen(part: Program, length: int) -> torch.Tensor | None:
    """bool[T, T], the same for both rows and all heads; None for a mask that is more than seen or not."""
    given = part.main.placeholders[0].meta["val"]
    rows, device = given.size(0) if isinstance(given.size(0), int) else ROWS, given.device
    tokens, positions = torch.zeros(rows, length, dtype=torch.int64), torch.arange(length).repeat(rows, 1)
    value = run(part, [tokens.to(device), positions.to(device)])[0][0]
    value = value.reshape((1,) * (4 - value.dim()) + tuple(value.shape)).expand(rows, -1, length, length)
    seen = value if value.dtype == torch.bool else value == 0
    if value.dtype != torch.bool and not (seen | (value <= HIDDEN)).all():
        return None
    first = seen[0, 0]
    return first.cpu() if bool((seen == first).all()) else None


def _part(program: Program, nodes: Sequence[Node], mask: Node, tokens: Node, positions: Node | None, numbers: Mapping[int, int]) -> Program:
    """The program (tokens, positions) -> mask; of its literals those in `numbers` stand for others."""
    part = Derivation(program)
    for name, source in (("tokens", tokens), ("positions", positions)):
        value = tokens.meta["val"]
        made = part.input(name, torch.int64, value.shape, value.device)
        if source is not None:
            part.values[source] = made
    for node in nodes:
        if node.op == "placeholder":
            part.values.setdefault(node, node.meta["val"])
        part.copy(node, numbers)
    return Program([part.finish("main", [part.values[mask]], {})], program.weights, program.symbols)
