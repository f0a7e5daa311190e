"""How long compiling takes: capture and clean-ups against torch.export, passes on growing programs, import against import torch.

All is CPU time. Rows "per 1,000 nodes" have the smallest program as their peer, so a ratio of 1 is linear growth.
"""

import argparse
import dataclasses
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from harness import Bench, relative_spread

import graphwright as gw
from graphwright.ir import Program, capture, verify
from graphwright.models import decoder
from graphwright.models.random_weights import draw_weights
from graphwright.passes import CLEANUPS, Pass, PassManager

PEERS = {"torch.export": "torch", "import torch": "torch", "smallest": "torch"}
EXPORT_NODES = {"quick": 150, "full": 2000}
PASS_NODES = {"quick": (250, 500), "full": (1000, 2000, 4000, 10000)}
ROUNDS = {"quick": 3, "full": 9}
PASS_ROUNDS = {"quick": 1, "full": 3}
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
        growth(bench, bench.options.nodes or PASS_NODES[mode], PASS_ROUNDS[mode])
    bench.finish()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument("--nodes", type=int, action="append", metavar="N", help="about this many nodes for the passes; may be repeated")


def imports(bench: Bench, rounds: int) -> None:
    """A fresh interpreter that imports torch, ours, or both; in turns."""
    programs = {
        "import torch": "import torch",
        "import graphwright": "import graphwright",
        "import torch, graphwright": "import torch, graphwright",
        # Names load on first use: this is what a user of any of them has waited for by then.
        "import graphwright; graphwright.compile": "import graphwright; graphwright.compile",
    }
    samples = in_turns({name: lambda text=text: interpreter(text) for name, text in programs.items()}, rounds)
    torch_alone = statistics.median(samples.pop("import torch"))
    for name, values in samples.items():
        bench.row(name, "CPU time", "s", statistics.median(values), {"import torch": torch_alone}, relative_spread(values))


def interpreter(program: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def against_export(bench: Bench, nodes: int, rounds: int) -> None:
    """From a module to a CompiledModel with clean-ups, and to a program, against torch.export alone."""
    module, args = sized_decoder(nodes)
    samples = in_turns(
        {
            "capture and clean-ups": lambda: seconds(lambda: gw.compile(module, backend="aten", example_inputs=args)),
            "capture alone": lambda: seconds(lambda: capture(module, args)),
            "torch.export": lambda: seconds(lambda: torch.export.export(module, args)),
        },
        rounds,
    )
    export = statistics.median(samples.pop("torch.export"))
    for name, values in samples.items():
        case = f"decoder, {node_count(capture(module, args))} nodes"
        bench.row(case, name, "s", statistics.median(values), {"torch.export": export}, relative_spread(values))


def growth(bench: Bench, sizes: tuple[int, ...], rounds: int) -> None:
    """The verifier on a captured program, each clean-up, and slice-groups on what they leave, on deeper and deeper decoders."""
    figures: dict[str, dict[int, float]] = {}
    for wanted in sizes:
        module, args = sized_decoder(wanted)
        program = capture(module, args)
        nodes = node_count(program)
        each = {"verify": seconds(lambda program=program: verify(program))}
        for one in (*CLEANUPS, gw.SliceGroups()):
            each[one.name], program = timed(program, one, rounds)
        each["all passes"] = sum(each.values())
        for name, value in each.items():
            known = figures.setdefault(name, {})
            known[nodes] = value
            smallest = min(known)
            peer = {"smallest": 1000 * known[smallest] / smallest}
            bench.row(f"{name}, {nodes} nodes", "CPU time per 1,000 nodes", "s", 1000 * value / nodes, peer)
        bench.save()
    for name, known in figures.items():
        first, last = min(known), max(known)
        bench.note(f"{name}: {known[last] / known[first]:.1f} x the time on {last / first:.1f} x the nodes")


def timed(program: Program, one: Pass, rounds: int) -> tuple[float, Program]:
    """Seconds of the pass manager with this pass, the verifier after it included; and the program that it makes."""
    values = []
    for _ in range(rounds):
        start = time.process_time()
        result = PassManager((one,)).run(program)
        values.append(time.process_time() - start)
    return statistics.median(values), result.program


def in_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contestant says that it took, one sample a round after a round to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for done in range(rounds + 1):
        for name, measure in contestants.items():
            value = measure()
            if done:
                samples[name].append(value)
    return samples


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


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
