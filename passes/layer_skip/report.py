"""What the compile report says of a schedule: layers by step, what they cost in quality, what they save at most."""

from collections.abc import Sequence

import torch

from ...ir import Node, Program
from .schedule import Schedule
from .units import Unit


def described(
    program: Program, units: Sequence[Unit], schedule: Schedule, functions: Sequence[str], kls: Sequence[float], clock: str
) -> tuple[str, ...]:
    """Lines for the report. `clock` is what the schedule counts, "step" or "position". The speedup is of decoding alone, as the bytes of
    weights that a step reads have it."""
    steps = len(schedule.level_of_step)
    lines = []
    for number, level in enumerate(schedule.levels):
        first = schedule.level_of_step.index(number)
        quality = f", KL {kls[number]:.3g} nats a token" if kls else ""
        lines.append(f"from {clock} {first}: {len(level)} of {len(units)} ({functions[number]}){quality}: {_ranges(level)}")
    whole = _bytes_read(program, "decode")
    read = [_bytes_read(program, functions[schedule.level_of_step[step]]) for step in range(steps)]
    mean = sum(read) / steps
    counted = f"{steps} {clock}s" if steps != 1 else f"1 {clock}"
    lines.append(f"{schedule.mean_layers(steps):.1f} of {len(units)} in the mean of {counted}: at most {whole / mean:.2f} x as fast")
    if clock == "position" and len(schedule.levels) > 1:
        lines.append("positions count the prompt too: rows of prompts of different lengths are on different levels, which run one by one")
    if len(schedule.levels[-1]) < len(units):
        lines.append("this changes the model: published schedules were fine-tuned for each dataset, this one was not")
        if not kls:
            lines.append("its quality is unmeasured: give calibration= tokens to see the KL of each level")
    return tuple(lines)


def _bytes_read(program: Program, function: str) -> int:
    """Of the weights that a step of one row reads; of a table that is looked up, a row."""
    names = {str(node.target) for node in program.functions[function].graph.nodes if node.op == "get_attr" and not _is_table(node)}
    return sum(program.weights[name].nbytes for name in names)


def _is_table(node: Node) -> bool:
    return all(user.target is torch.ops.aten.embedding.default for user in node.users)


def _ranges(layers: Sequence[int]) -> str:
    """0-3, 7, 9-11."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
