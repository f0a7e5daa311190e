"""How long compiling takes: capture and clean-ups against torch.export, passes on growing programs, import against import torch.

`per node` rows divide by the number of nodes; their peer "smallest" is the smallest program, so a ratio of 1 is linear growth.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import graphwright as gw
import torch
from graphwright.ir import Program, capture
from graphwright.models import decoder
from graphwright.models.random_weights import draw_weights
from graphwright.passes import CLEANUPS, Pass, PassManager
from harness import Bench, relative_spread

PEERS = {"torch.export": "torch", "import torch": "torch", "smallest": "torch"}
EXPORT_NODES = {"quick": 150, "full": 2000}
PASS_NODES = {"quick": (100, 200), "full": (1000, 2000, 5000, 10000)}
ROUNDS = {"quick": 3, "full": 5}
PARTS = ("export", "passes", "import")

Network = tuple[torch.nn.Module, tuple]


def main() -> None:
    bench = Bench("compile_time", PEERS, add_arguments=_arguments)
    mode = "quick" if bench.quick else "full"
    parts = bench.options.only or PARTS
    if "import" in parts:
        imports(bench, ROUNDS[mode])
        bench.save()
    if "export" in parts:
        against_export(bench, EXPORT_NODES[mode], ROUNDS[mode])
        bench.save()
    if "passes" in parts:
        growth(bench, bench.options.nodes or PASS_NODES[mode])
    bench.finish()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument("--nodes", type=int, action="append", metavar="N", help="about this many nodes for the passes; may be repeated")


def imports(bench: Bench, rounds: int) -> None:
    """Seconds of a fresh interpreter that imports one of both, in turns."""
    programs = {
        "graphwright": "import graphwright",
        # `import graphwright` alone loads no torch: what a user waits for is this one.
        "first use": "import graphwright; graphwright.compile",
        "torch": "import torch",
    }
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for done in range(rounds + 1):
        for name, values in samples.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", programs[name]], check=True)
            if done:  # the first one fills the file cache
                values.append(time.perf_counter() - start)
    spread = max(map(relative_spread, samples.values()))
    peer = statistics.median(samples["torch"])
    bench.row("import graphwright", "time", "s", statistics.median(samples["graphwright"]), {"import torch": peer}, spread)
    bench.row(
        "import graphwright; graphwright.compile", "time", "s", statistics.median(samples["first use"]), {"import torch": peer}, spread
    )


def against_export(bench: Bench, nodes: int, rounds: int) -> None:
    """From a module to a CompiledModel with clean-ups, against torch.export alone."""
    module, args = sized_decoder(nodes)
    contestants: dict[str, Callable[[], object]] = {
        "ours": lambda: gw.compile(module, backend="aten", example_inputs=args),
        "capture": lambda: capture(module, args),
        "torch.export": lambda: torch.export.export(module, args),
    }
    contestants["ours"]()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    peer = {"torch.export": medians["torch.export"]}
    case = f"decoder, {node_count(capture(module, args))} nodes"
    bench.row(case, "capture and clean-ups", "s", medians["ours"], peer, max(map(relative_spread, samples.values())))
    bench.row(case, "capture alone", "s", medians["capture"], peer)


def growth(bench: Bench, sizes: tuple[int, ...]) -> None:
    """Seconds of the clean-ups, and of slice-groups on what they leave, on deeper and deeper decoders."""
    smallest: dict[str, float] = {}
    for wanted in sizes:
        module, args = sized_decoder(wanted)
        program = capture(module, args)
        nodes = node_count(program)
        seconds, cleaned = timed(program, CLEANUPS)
        figures = {"clean-ups": seconds, "slice-groups": timed(cleaned, (gw.SliceGroups(),))[0]}
        for name, value in figures.items():
            first = smallest.setdefault(name, value / nodes)
            bench.row(f"{name}, {nodes} nodes", "time", "s", value, {})
            bench.row(f"{name}, {nodes} nodes", "per node", "s", value / nodes, {"smallest": first})
        bench.save()


def timed(program: Program, passes: tuple[Pass, ...]) -> tuple[float, Program]:
    """Seconds of the pass manager with these passes, the verifier after each included; and the program that they make."""
    start = time.perf_counter()
    result = PassManager(passes).run(program)
    return time.perf_counter() - start, result.program


def sized_decoder(nodes: int) -> Network:
    """A narrow decoder of about `nodes` nodes: their number grows by the same with each layer."""
    shallow, deeper = (node_count(capture(*_decoder(depth))) for depth in (1, 2))
    return _decoder(max(1, 1 + round((nodes - shallow) / (deeper - shallow))))


def _decoder(depth: int) -> Network:
    config = dataclasses.replace(decoder.SIZES["tiny"], depth=depth, length=64)
    module = decoder.Decoder(config).eval()
    draw_weights(module)
    return module, decoder.example_inputs(config)[0]


def node_count(program: Program) -> int:
    return sum(1 for _ in program.nodes())


if __name__ == "__main__":
    main()
