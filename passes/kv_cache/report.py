"""What the compile report says of caches."""

from ...ir import Program
from ...ir.caches import cache_types
from .decoder import Decoder
from .recurrence import Recurrence

POSITIONS = 4096  # at which caches that do not grow by the token are told, or as many as the model has


def described(program: Program, decoder: Decoder) -> tuple[str, ...]:
    """Lines for the report."""
    types = cache_types(program.functions["decode"]).values()
    recurring = {n for n, each in enumerate(decoder.attentions) if isinstance(each, Recurrence)}
    windows = sorted({seen.window for seen in decoder.visible} - {0})
    shown = f"; rings of caches for windows of {', '.join(map(str, windows))}" if windows else ""
    per_token = sum(each.nbytes(1, 1) for each in types if each.layer not in recurring)
    lines = [f"{len(decoder.attentions) - len(recurring)} attentions with caches, {per_token} bytes a token and row{shown}"]
    if not recurring:
        return tuple(lines)
    positions = min(POSITIONS, program.symbols.highest(decoder.length))
    held = sum(each.nbytes(1, positions) for each in types if each.layer in recurring)
    whole = sum(each.heads * each.width * each.dtype.itemsize * positions for each in types if each.layer in recurring and each.chunk)
    less = f"{whole / held:.3g} times less than all keys and values"
    line = f"{len(recurring)} recurrences with caches, {held} bytes a row at {positions} positions: {less}"
    return (line, *(lines if len(recurring) < len(decoder.attentions) else ()))
