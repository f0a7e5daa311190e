"""passes and zoo: what there is."""

import argparse
import inspect
from dataclasses import fields
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .. import models
from ..passes import CLEANUPS, Contract, Pass, all_passes
from ..passes.options import spell_value
from ..passes.registry import pass_named
from .result import Result, table


def passes(options: argparse.Namespace) -> Result:
    if options.passname is not None:
        found = _described(options.passname, pass_named(options.passname))
        title = f"{found['name']}  ({found['contract']}{', a clean-up: on by default' if found['cleanup'] else ''})"
        objects = [f"  {o['name']}  ({o['legal']}; given in Python, not in a pipeline's text)" for o in found["objects"]]
        return Result("\n".join([title, "", found["doc"], "", *_spelled(found), *objects]).rstrip() + "\n", found)
    every = [_described(name, kind) for name, kind in all_passes().items()]
    rows = []
    for each in every:
        default = "  (a clean-up: on by default)" if each["cleanup"] else ""
        rows.append([each["name"], each["contract"], each["about"] + default])
        rows += [["", "", line] for line in _spelled(each)]
    return Result(table(["pass", "contract", "what it does; options with their defaults"], rows), {"passes": every})


def _described(name: str, kind: type[Pass]) -> dict[str, Any]:
    spelled = [f for f in fields(kind) if f.metadata.get("spelled", True)]
    listed = [{"name": f.name, "default": spell_value(f.default), "legal": f.metadata.get("legal", "")} for f in spelled]
    objects = [{"name": f.name, "legal": f.metadata["legal"]} for f in fields(kind) if f not in spelled]
    declared: Any = kind.contract  # a property where options may change it
    contract = declared if isinstance(declared, Contract) else kind().contract
    doc = inspect.cleandoc(kind.__doc__ or "")
    about = next(iter(doc.splitlines()), "")
    is_cleanup = any(each.name == name for each in CLEANUPS)
    plain = {"name": name, "contract": str(contract), "cleanup": is_cleanup, "about": about, "doc": doc}
    return plain | {"options": listed, "objects": objects}


def _spelled(described: dict[str, Any]) -> list[str]:
    return [f"  {o['name']}={o['default']}  ({o['legal']})" for o in described["options"]]


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
