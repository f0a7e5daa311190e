"""Mixtures of experts of transformers, in a form that torch.export takes while a model is captured.

A config says how experts run: "eager" loops over the experts that some token chose, which depends on data; "grouped_mm" sorts tokens by
expert, "batched_mm" copies the weights of each token's experts. Their results are the same. Unset, experts outside of a whole model are
eager.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

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
