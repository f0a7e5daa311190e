"""Calls leave nothing behind, and a model that nobody holds is gone. `bench/load.py` has the long runs, of threads, processes and kills."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw


class Net(nn.Module):
    """A product, an activation and a norm, for rows of any number."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16))

    def forward(self, x):
        return x + self.layers(x)


def compiled(backend: str) -> gw.CompiledModel:
    rows = torch.export.Dim("rows", min=2, max=64)
    return gw.compile(Net().eval(), example_inputs=(torch.randn(4, 16),), dynamic_shapes=({0: rows},), backend=backend, cache=False)


@pytest.mark.parametrize("backend", ["aten", "tuned"])
def test_calls_leave_no_objects_and_no_memory_behind(backend: str) -> None:
    model, inputs = compiled(backend), [torch.randn(rows, 16) for rows in (2, 7, 33)]

    def call(times: int) -> tuple[int, int]:
        for n in range(times):
            model(inputs[n % len(inputs)])
        gc.collect()
        return len(gc.get_objects()), int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    call(300)
    objects, resident = call(3)
    more_objects, more_resident = call(900)
    assert more_objects - objects < 90, "a tenth of an object each"
    assert more_resident - resident < 900 * 1024


@pytest.mark.parametrize("backend", ["aten", "tuned"])
def test_a_model_that_nobody_holds_is_gone(backend: str) -> None:
    model = compiled(backend)
    model(torch.randn(3, 16))
    watched = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert [each() for each in watched] == [None] * len(watched)
