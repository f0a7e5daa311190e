"""Whether passes keep their contracts on networks that others made: small configurations of transformers, diffusers, timm and the zoo with
random weights, each under each pass behind the clean-ups, judged as `graphwright.testing` judges programs (specs/trust.md, R4).

A trial ends `right`, `refused` (a typed error, whose reason is noted) or as a fault. `rate` is the share of trials that are right.

    python bench/networks.py [--quick] [--only NAME ...] [--json FILE]
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from harness import Bench, installed
from timm_networks import timm_network

import graphwright as gw
from graphwright.ir.decoder_example import decoder_example
from graphwright.ir.errors import GraphwrightError, first_line
from graphwright.ir.torch_log import silenced
from graphwright.passes import Pass
from graphwright.testing import try_passes
from graphwright.testing.pipelines import as_arguments, calibrated_on
from graphwright.tests import decoders, real_networks

SMALL = 256  # numbers that a weight has at least, here, to be worth a branch or codes
PASSES: dict[str, tuple[Pass, ...]] = {
    "clean-ups": (),
    "slice-groups": (gw.SliceGroups(),),
    "slice-groups, as low as it goes": (gw.SliceGroups("1%"),),
    "smooth": (gw.Smooth(calibration=(), min_numel=SMALL),),
    "split-low-rank": (gw.SplitLowRank(rank=4, min_numel=SMALL),),
    "regroup-experts": (gw.RegroupExperts(),),
    "absorb-outliers in 8 bits": (gw.AbsorbOutliers(weight="int8-channel", act="int8-token", min_numel=SMALL, rank=4),),
    "absorb-outliers in 4 bits": (gw.AbsorbOutliers(min_numel=SMALL, rank=4),),
}
ZOO = ("video_unet", "video_unet_svd", "dit", "vit", "moe_dlm")
TIMM = ("resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_lite0", "mixer_s32_224")

Captured = tuple[gw.Program, list[Any]]


def main() -> None:
    bench = Bench("networks", {}, add_arguments=_arguments)
    networks = {name: make for name, make in _networks().items() if not bench.options.only or name in bench.options.only}
    if bench.quick:
        networks = dict(list(networks.items())[::6])
    if installed("timm") == "missing":
        bench.note("networks of timm are left out, it is missing (make bench-deps installs it)")
    kinds = {name: Counter[str]() for name in PASSES}
    for name, make in networks.items():
        try:
            with silenced():
                program, leaves = make()
        except GraphwrightError as error:
            bench.note(f"{name} is not captured: {first_line(error)}")
            kinds["clean-ups"]["refused"] += 1
            continue
        _try_all(bench, name, program, leaves, kinds)
    total = sum(kinds.values(), Counter())
    for name, counts in kinds.items():
        bench.row(name, "networks", "1", sum(counts.values()), {})
        bench.row(name, "right", "1", counts["right"], {})
    for kind, count in total.items():
        bench.row("all", kind, "1", count, {})
    bench.row("all", "rate", "1", total["right"] / max(sum(total.values()), 1), {})
    bench.finish()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these networks alone")


def _try_all(bench: Bench, name: str, program: gw.Program, leaves: list[Any], kinds: dict[str, Counter[str]]) -> None:
    start, said = time.perf_counter(), []
    for label, passes in PASSES.items():
        ready = [calibrated_on(each, [as_arguments(program, leaves)]) for each in passes]
        with silenced():
            verdict = try_passes(program, [*gw.CLEANUPS, *ready], [leaves]).verdict
        kinds[label][verdict.kind] += 1
        if verdict.kind != "right":
            said.append(f"{label}: {verdict}")
    bench.note(f"{name}: {len(PASSES) - len(said)} of {len(PASSES)} right, {time.perf_counter() - start:.0f} s")
    for text in said:
        bench.note(f"    {text}")


# --- networks ---------------------------------------------------------------------------------------------------------------------


def _networks() -> dict[str, Callable[[], Captured]]:
    found: dict[str, Callable[[], Captured]] = {}
    for name, case in real_networks.NETWORKS.items():
        found[name] = lambda case=case: _of_case(*case())  # type: ignore[misc]
    for name, factory in decoders.FAMILIES.items():
        found[f"{name}, a decoder of any length"] = lambda factory=factory: _of_decoder(factory())  # type: ignore[misc]
    for name in ZOO:
        found[f"zoo {name}"] = lambda name=name: _of_case(*gw.models.load(name, "tiny"), None)  # type: ignore[misc]
    for name in TIMM if installed("timm") != "missing" else ():
        found[f"timm {name}"] = lambda name=name: _of_case(timm_network(name), (torch.rand(1, 3, 224, 224),), {}, None)  # type: ignore[misc]
    return found


def _of_case(model: torch.nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any) -> Captured:
    torch.manual_seed(0)
    return gw.capture(model, args, kwargs, dynamic_shapes=dynamic_shapes), pytree.tree_leaves((args, kwargs))


def _of_decoder(model: torch.nn.Module) -> Captured:
    example = decoder_example(model)
    program = gw.capture(model, (), example.kwargs, dynamic_shapes=example.dynamic_shapes)
    return program, pytree.tree_leaves(((), example.kwargs))


if __name__ == "__main__":
    main()
