"""passes and zoo: what there is."""

import argparse
from dataclasses import fields
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .. import models
from ..passes import CLEANUPS, Contract, all_passes
from ..passes.options import spell_value
from .result import Result, table


def passes(options: argparse.Namespace) -> Result:
    cleanups = {each.name for each in CLEANUPS}
    found: list[dict[str, Any]] = []
    for name, kind in all_passes().items():
        spelled = [f for f in fields(kind) if f.metadata.get("spelled", True)]
        listed = [{"name": f.name, "default": spell_value(f.default), "legal": f.metadata.get("legal", "")} for f in spelled]
        about = next(iter((kind.__doc__ or "").strip().splitlines()), "")
        declared: Any = kind.contract  # a property where options may change it
        contract = declared if isinstance(declared, Contract) else kind().contract
        found.append({"name": name, "contract": str(contract), "cleanup": name in cleanups, "about": about, "options": listed})
    rows = []
    for each in found:
        default = "  (a clean-up: on by default)" if each["cleanup"] else ""
        rows.append([each["name"], each["contract"], each["about"] + default])
        rows += [["", "", f"  {o['name']}={o['default']}  ({o['legal']})"] for o in each["options"]]
    return Result(table(["pass", "contract", "what it does; options with their defaults"], rows), {"passes": found})


def zoo(options: argparse.Namespace) -> Result:
    found: list[dict[str, Any]] = []
    for name in models.names():
        for size in models.sizes(name):
            with torch.device("meta"):
                module, args, kwargs = models.load(name, size)
            inputs = [list(each.shape) for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            about = next(iter((type(module).__doc__ or "").strip().splitlines()), "")
            parameters = sum(parameter.numel() for parameter in module.parameters())
            found.append({"name": name, "size": size, "parameters": parameters, "inputs": inputs, "about": about})
    rows = [[f"{m['name']}:{m['size']}", f"{m['parameters'] / 1e6:,.1f} M", ", ".join(map(str, m["inputs"]))] for m in found]
    return Result(table(["network", "parameters", "shapes of its example inputs"], rows), {"networks": found})
