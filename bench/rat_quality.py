"""What chunked recurrence costs in perplexity: the zoo's trained language model with its attention converted, before any training, beside
the model itself and plain attention to as many tokens.

    python bench/rat_quality.py [--quick] [--json FILE]

Held-out text, whose first windows are the calibration of fitted gates and are not measured. How training brings it back:
examples/finetune_rat.py.
"""

from typing import Any

import torch
from harness import Bench

import graphwright as gw
from graphwright import models
from graphwright.models import text

CALIBRATION = 1024  # tokens
# name -> options of the pass; windows are short, since text.CONTEXT tokens are all that the model was trained to look back on
FORMS: dict[str, dict[str, Any]] = {
    "chunk 4, window 0": {"chunk": 4, "window": 0, "sinks": 0},
    "chunk 16, window 0": {"chunk": 16, "window": 0, "sinks": 0},
    "chunk 16, window 64, sinks 16": {"chunk": 16, "window": 64, "sinks": 16},
    "every second layer, chunk 16, window 64, sinks 16": {"chunk": 16, "window": 64, "sinks": 16, "layers": "even"},
}
QUICK = ("chunk 16, window 64, sinks 16",)


def main() -> None:
    bench = Bench("rat_quality", peers={"attention": "torch", "mean gates": "torch", "closed gates": "torch", "window alone": "torch"})
    ids = torch.tensor(text.encode(text.held_out()))
    calibration = (ids[:CALIBRATION].reshape(-1, text.CONTEXT),)
    measured = ids[CALIBRATION : CALIBRATION + (4 * text.CONTEXT + 1 if bench.quick else len(ids))]
    module, _, _ = models.load("decoder", "text")
    attention = text.perplexity(module, measured).per_token
    for name, options in FORMS.items():
        if bench.quick and name not in QUICK:
            continue
        found = {init: perplexity(module, measured, options | {"init": init}) for init in ("mean", "closed")}
        fitted = perplexity(module, measured, options | {"init": "fit", "calibration": calibration})
        window = {"layers": options.get("layers", "all"), "window": options["window"] + options["chunk"]}
        peers = {"attention": attention, "mean gates": found["mean"], "closed gates": found["closed"]}
        if options["window"]:
            peers["window alone"] = windowed(module, measured, window)
        bench.row(f"{name}, fitted gates", "perplexity", "", fitted, peers)
    if "text" in models.trained("rat"):
        native = text.perplexity(models.load("rat", "text")[0], measured).per_token
        bench.row("rat:text, trained with recurrence", "perplexity", "", native, {"attention": attention})
    bench.note("no converted model was trained after conversion")
    bench.finish()


def perplexity(module: torch.nn.Module, ids: torch.Tensor, options: dict[str, Any]) -> float:
    """Of a token, with attention converted."""
    size = torch.export.Dim("batch", max=64)
    example = (torch.zeros(2, text.CONTEXT, dtype=torch.int64),)
    recurrence = gw.RatRecurrence(**options)
    model = gw.compile(module, [recurrence], example_inputs=example, dynamic_shapes=({0: size},), backend="aten", cache=False)
    return text.perplexity(model, ids).per_token


def windowed(module: torch.nn.Module, ids: torch.Tensor, options: dict[str, Any]) -> float:
    """Of a token, where converted layers see what is near and no summaries: as many raw tokens as a recurrence does at most."""
    summaries_hidden = {"sinks": 0, "summary_bias": -1e9, "chunk": 1, "init": "closed"}
    return perplexity(module, ids, summaries_hidden | options)


if __name__ == "__main__":
    main()
