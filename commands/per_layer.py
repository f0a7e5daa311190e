"""verify --per-layer: the error of each call against float64, as captured and as rewritten, as a table, as data and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..explorer.divergence import described, diverges, first_divergence, growth, picture, worst_first
from ..explorer.layer_errors import LayerError, call_errors
from ..ir import Program
from ..ir.calls import draws
from ..ir.float64 import NoFloat64
from ..passes.inputs import random_inputs
from ..runtime.atomic import atomic_write, check_writable
from .result import Mistake, table

_MOST_LISTED = 20


def per_layer(
    title: str, captured: Program, final: Program, inputs: Sequence[Any] | None, plot: Path | None
) -> tuple[str, list[dict[str, Any]], bool]:
    """What is said, the calls as data in the order in which the captured program runs, and whether one of them diverges."""
    if any(node.op == "call_function" and draws(node) for node in captured.nodes()):
        raise Mistake("the program draws random numbers, which are others in float64: put the model in eval mode, or leave --per-layer out")
    try:
        errors = call_errors(captured, final, random_inputs(captured) if inputs is None else inputs)
    except NoFloat64 as error:
        raise Mistake(f"the program has no float64 form to be compared with: {error}") from error
    said = _said(errors)
    if plot is not None:
        with atomic_write(plot) as file:
            file.write(picture(title, errors).encode())
        said += f"\nwrote {plot}"
    return said, [described(each) for each in errors], any(map(diverges, errors))


def plot_target(plot: str | None) -> Path | None:
    if plot is None:
        return None
    path = Path(plot)
    if path.suffix != ".svg":
        raise Mistake(f"{path}: plots are called something.svg")
    if not path.parent.is_dir():
        raise Mistake(f"{path}: the folder {path.parent} does not exist")
    check_writable(path)
    return path


def _said(errors: Sequence[LayerError]) -> str:
    worst = worst_first(errors)
    if not worst:
        return "no call of the program gives floats that the rewritten one has too"
    first, count = first_divergence(errors), sum(map(diverges, errors))
    common = sum(each.after is not None for each in errors)
    head = f"error against float64 of {common} calls that both programs have, of {len(errors)}: "
    if first is None:
        head += "none diverges"
    else:
        head += f"{count} diverge{'s' if count == 1 else ''}, first {described(first)['call']}  {described(first)['where']}"
    rows = [_row(each) for each in worst[:_MOST_LISTED]]
    text = f"{head}\n\n" + table(["call", "captured", "rewritten", "ratio", "", "line"], rows)
    return text + (f"and {len(worst) - _MOST_LISTED} more that compute, of smaller ratio" if len(worst) > _MOST_LISTED else "").rstrip()


def _row(each: LayerError) -> list[str]:
    about = described(each)
    mark = "diverges" if about["diverges"] else ""
    return [about["call"], f"{each.before:.1e}", f"{each.after:.1e}", f"{growth(each):.2g}", mark, about["where"]]
