"""Schedules of a program as matrices: rows, columns and a number for each pair, to be drawn as heat maps."""

from collections.abc import Mapping
from typing import Any

import torch

from ..ir import Program
from ..ir.pattern import named_arguments
from ..ir.program import walk
from ..passes.experts.capacity import CapacitySchedule

_SHARES = 20  # columns of a schedule of capacities, less one
_MAX_STEPS = 512


def schedules(program: Program) -> list[dict[str, Any]]:
    """`{"name", "title", "row_axis", "column_axis", "rows": [label], "columns": [label], "values": [[number]], "data"}` for each schedule;
    one of a kind that has no matrix has its name and data alone."""
    makers = {"layer-skip": _layers, "expert-choice": _capacity}
    found = []
    for name, data in sorted(program.schedules.items()):
        matrix = makers[name](program, data) if name in makers else {}
        found.append({"name": name, **matrix, "data": data})
    return found


def _layers(program: Program, data: Mapping[str, Any]) -> dict[str, Any]:
    """1 where a layer runs at a step."""
    levels, level_of_step = data["levels"], data["level_of_step"][:_MAX_STEPS]
    runs, columns, axis = [levels[level] for level in level_of_step], list(map(str, range(len(level_of_step)))), data.get("clock", "step")
    if data.get("mode") == "speculative":
        runs, columns, axis = [data["draft_layers"], levels[0]], ["draft", "verify"], "function"
    count = max(max(level) for level in levels) + 1
    return {
        "title": "layers that run",
        "row_axis": "layer",
        "column_axis": axis,
        "rows": list(map(str, range(count))),
        "columns": columns,
        "values": [[int(layer in ran) for ran in runs] for layer in range(count)],
    }


def _capacity(program: Program, data: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens that an expert of each layer takes of a row, by the share of masked positions."""
    if "kmin" not in data:
        return {}
    schedule = CapacitySchedule(data["kmin"], data["kmax"], data["shape"], data["ratio"])
    capacities = {k: _capacities(program, function) for k, function in zip(data["k"], data["functions"], strict=True)}
    columns = [capacities[schedule.k(step, _SHARES)] for step in range(_SHARES + 1)]
    return {
        "title": "tokens that an expert takes of a row",
        "row_axis": "layer",
        "column_axis": "masked",
        "rows": list(map(str, range(len(columns[0])))),
        "columns": [f"{step / _SHARES:.0%}" for step in range(_SHARES + 1)],
        "values": [list(row) for row in zip(*columns, strict=True)],
    }


def _capacities(program: Program, function: str) -> list[int]:
    """Of each layer in which experts choose, in order."""
    nodes = walk(program.functions[function].graph)
    return [int(named_arguments(node)["capacity"]) for node in nodes if node.target is torch.ops.gw.expert_choice.default]
