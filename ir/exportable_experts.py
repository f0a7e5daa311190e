"""Mixtures of experts of transformers, in a form that torch.export takes while a model is captured.

A config says how experts run: "eager" loops over the experts that some token chose, which depends on data; "grouped_mm" sorts tokens by
expert, "batched_mm" copies the weights of each token's experts. Their results are the same. Unset, experts outside of a whole model are
eager.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_DECORATED = "is_transposed"  # what transformers gives experts that run in the form that their config says
_NAME = "_experts_implementation"  # private to transformers; a library without it has no such forms


@contextmanager
def exportable_experts(model: nn.Module) -> Iterator[None]:
    """Within it, experts that run in the eager form run in another; afterwards all configs are as before."""
    configs = _configs(model)
    before = [(config, getattr(config, _NAME)) for config in configs]
    form = _form(model)
    try:
        for config, form_of_config in before:
            if form_of_config in (None, "eager"):
                setattr(config, _NAME, form)
        yield
    finally:
        for config, form_of_config in before:  # setting one also sets those inside it, which come later
            setattr(config, _NAME, form_of_config)


def advice_on_loop(modules: Iterable[nn.Module]) -> str | None:
    """What to do about control flow that depends on data inside of `modules`, where that is a loop over experts; None where it is not."""
    held = next((module for module in modules if _holds_experts(module)), None)
    if held is None:
        return None
    if hasattr(held, _DECORATED):
        return (
            f"experts of {type(held).__name__} run one by one, as data says, in a form of its own: choose one that is captured, by "
            "model.set_experts_implementation('grouped_mm') or 'batched_mm'"
        )
    return (
        f"{type(held).__name__} decides by data which of its experts run: run them all, since an expert runs on no rows as well (rows, "
        "choice = torch.where(index == expert)); or stack its weights into [experts, 2 * inner, width] and [experts, width, inner] and "
        "multiply those of each token's experts by torch.bmm, which regroup-experts makes fast; Mixtral of transformers 5 does so"
    )


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module is experts by its name, has layers of one class in a list that is, or two weights of as many matrices."""
    if "experts" in type(module).__name__.lower():
        return True
    lists = [child for name, child in module.named_children() if "expert" in name.lower() and isinstance(child, nn.ModuleList)]
    if any(len(each) > 1 and len({type(layer) for layer in each}) == 1 for each in lists):
        return True
    counts = [parameter.size(0) for _, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
    return len(counts) > 1 and len(set(counts)) == 1


def _configs(model: nn.Module) -> list[Any]:
    """The configs of all modules that have such a choice, each before those that it holds."""
    found: dict[int, Any] = {}
    pending = [config for module in model.modules() if hasattr(config := getattr(module, "config", None), _NAME)]
    while pending:
        config = pending.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())
            pending += [each for each in inner if hasattr(each, _NAME)]
    return list(found.values())


def _form(model: nn.Module) -> str:
    """Grouped products, unless rows of bfloat16 matrices do not start at multiples of 16 bytes, which torch asks for there."""
    experts = (p for p in model.parameters() if p.dim() == 3 and p.dtype == torch.bfloat16)
    return "batched_mm" if any(size % 8 for p in experts for size in p.shape[1:]) else "grouped_mm"
