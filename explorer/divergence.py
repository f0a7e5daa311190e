"""Where a rewritten program leaves the captured one: the error of each call that both have, the first that diverges, and a plot.

A call diverges where the rewritten program is more than 4 times as far from float64 as the captured one, and as the rounding of its dtype.
Errors are those of whole runs, so what follows the first divergent call may inherit its error.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ir import Node
from ..ir.calls import name_of
from ..passes.verdict import RMSE_FACTOR, STRICT
from .layer_errors import LayerError

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 960, 360, 64, 48, 44
_BEFORE, _AFTER, _MARK = "#9aa3af", "#2563eb", "#dc2626"


def diverges(each: LayerError) -> bool:
    """Whether the rewritten program is further off there than rounding and the captured program explain."""
    return each.after is not None and each.after > RMSE_FACTOR * max(each.before, _rounding(each))


def first_divergence(errors: Sequence[LayerError]) -> LayerError | None:
    """The first call, in the order in which the captured program runs, that diverges."""
    return next((each for each in errors if diverges(each)), None)


def worst_first(errors: Sequence[LayerError]) -> list[LayerError]:
    """The calls that both programs have, by how much further the rewritten one is off; those that only pass a value on, as views do, are
    left out."""
    known = {each.source: (each.before, each.after) for each in errors}
    own = [each for each in errors if each.after is not None and not _passes_on(each, known)]
    return sorted(own, key=lambda each: -growth(each))


def _passes_on(each: LayerError, known: Mapping[Node, tuple[float, float | None]]) -> bool:
    return any(known.get(operand) == (each.before, each.after) for operand in each.source.all_input_nodes)


def growth(each: LayerError) -> float:
    """The error in the rewritten program over that in the captured one, or over the rounding of the dtype where that is larger."""
    return (each.after or 0.0) / max(each.before, _rounding(each))


def described(each: LayerError) -> dict[str, Any]:
    """The call as plain data; an error that is no number is text."""
    after = each.after if each.after is None or math.isfinite(each.after) else str(each.after)
    return {
        "call": name_of(each.source.target),  # type: ignore[arg-type]
        "module": each.module,
        "where": str(each.source.meta.get("where") or ""),
        "before": each.before if math.isfinite(each.before) else str(each.before),
        "after": after,
        "diverges": diverges(each),
    }


def picture(title: str, errors: Sequence[LayerError]) -> str:
    """Both errors of each common call in the order of the captured program, on a logarithmic scale, as one SVG that asks for nothing."""
    common = [each for each in errors if each.after is not None]
    shown = [min(max(value, _LEAST), 1e3) for each in common for value in (each.before, each.after or 0.0)] or [_LEAST]
    low, high = math.floor(math.log10(min(shown))), max(math.ceil(math.log10(max(shown))), math.floor(math.log10(min(shown))) + 1)
    step = (_WIDTH - _LEFT - 16) / max(len(common) - 1, 1)

    def x(place: int) -> float:
        return _LEFT + step * place

    def y(error: float) -> float:
        share = (math.log10(min(max(error, _LEAST), 1e3)) - low) / (high - low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    def line(values: Sequence[float], color: str) -> str:
        points = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in enumerate(values))
        return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>'

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20">{html.escape(_plain(title))}: RMS error against float64, over RMS. '
        f'<tspan fill="#6b7280">Grey: as captured.</tspan> <tspan fill="{_AFTER}">Blue: rewritten.</tspan></text>',
        *(_rule(power, y(10.0**power)) for power in range(low, high + 1, max((high - low) // 6, 1))),
        line([each.before for each in common], _BEFORE),
        line([each.after or 0.0 for each in common], _AFTER),
    ]
    first = first_divergence(common)
    if first is not None:
        at = x(common.index(first))
        said = html.escape(_plain(f"first that diverges: {described(first)['call']} {first.module}"))
        anchor = "end" if at > _WIDTH / 2 else "start"
        lines += [
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="{_MARK}" stroke-dasharray="4 3"/>',
            f'<text x="{at:.1f}" y="{_TOP - 8}" fill="{_MARK}" text-anchor="{anchor}">{said}</text>',
        ]
    lines.append(f'<text x="{_LEFT}" y="{_HEIGHT - 14}">{len(common)} calls that both programs have, first to last</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


_LEAST = 1e-17  # of an error of zero, which a logarithm does not have


def _rule(power: int, y: float) -> str:
    text = f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>'
    return f'<line x1="{_LEFT}" x2="{_WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>{text}'


def _rounding(each: LayerError) -> float:
    """The distance from 1 to the next number of the call's dtype; in float64 what tests allow, since r is rounded as much."""
    dtype = each.source.meta["val"].dtype
    return STRICT if dtype == torch.float64 else torch.finfo(dtype).eps


def _plain(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)
