"""Calibration: runs a program on example inputs and gathers statistics of the values that sites read.

The program runs under the reference interpreter and is not changed, so that each site sees what the unchanged layers before it give.
A value is dropped once it was seen. Sites go in waves, each small enough for the memory that it may take, with a run of the
examples for each wave.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ir import Node, Program, Rewriter
from ...ir.calls import draws
from ...ir.errors import GraphwrightError, InputError
from ...ir.program import Function, content_digest
from ...ir.run import run
from .examples import Examples
from .resume import ResumeFolder
from .statistics import Statistics, Watch

Tell = Callable[[int, int | None, float | None], None]

_VERSION = 1  # of what is kept in a resume folder


def collect(
    program: Program,
    taps: Mapping[str, Node],
    calibration: Iterable[Any],
    *,
    function: str = "main",
    max_rows: int = 4096,
    max_bytes: int = 2 * 2**30,
    resume: Path | None = None,
    tell: Tell | None = None,
) -> dict[str, Statistics]:
    """What `collect_waves` gives, all at once: `max_bytes` bounds the memory of gathering, not that of the result."""
    waves = collect_waves(program, taps, calibration, function=function, max_rows=max_rows, max_bytes=max_bytes, resume=resume, tell=tell)
    return {name: statistics for wave in waves for name, statistics in wave.items()}


def collect_waves(
    program: Program,
    taps: Mapping[str, Node],
    calibration: Iterable[Any],
    *,
    function: str = "main",
    max_rows: int = 4096,
    max_bytes: int = 2 * 2**30,
    resume: Path | None = None,
    tell: Tell | None = None,
) -> Iterator[dict[str, Statistics]]:
    """The statistics of the sites of `taps`, wave by wave: one wave can be used and dropped before the next is gathered. Sites of one
    value come together, in the order in which `taps` first has it, so that their order does not depend on the waves.

    `taps` maps a site's name to the node of `function` whose value [.., K] it reads. `calibration` gives, whenever it is iterated,
    the same items: tuples of positional arguments, or pairs `(args, kwargs)`, as the captured model was called. A site takes
    max_rows*K*2 + 8*K bytes, all sites of a wave `max_bytes` at most. Operations that draw random numbers are seeded by the item.

    With `resume`, a folder, the state of each site is kept there, now and then also within a wave, and a run of equal program,
    weights, options, number of items (where `calibration` has a len) and first item goes on from it. No more can be told of an
    iterable: other items behind an equal first one are not noticed. Items that were seen are read again, and skipped.

    `tell(items done, items in all, seconds left)` is called after each item of each wave; None is what is not known yet.

    Raises:
        InputError: a tap is none, `max_bytes` is too little for a site, there are no items, one does not fit the signature or fails
            in the model, items that can be had once only are needed for several waves, or a resumed run has fewer than before.
        CalibrationError: `calibration` raises as it is iterated.
    """
    if not taps:
        return
    body = program.functions[function]
    widths = {node: _width(name, node, body) for name, node in taps.items()}
    waves = _planned_waves({node: name for name, node in taps.items()}, widths, max_rows, max_bytes)
    examples = Examples(calibration, program, body)
    if len(waves) > 1 and examples.is_one_pass:
        raise InputError(
            f"calibration is an iterator, which gives its items once, and {len(waves)} runs over them are needed: "
            "give a list, or another iterable that starts anew, or raise max_calib_bytes"
        )
    folder = None
    if resume is not None:
        folder = ResumeFolder(resume, _key(program, examples.first(), [function, max_rows, examples.size]))
    progress = _Progress(tell, len(waves), examples.size)
    for wave in waves:
        watches = {node: Watch(widths[node], node.meta["val"].dtype, max_rows) for node in wave}
        _Run(program, body, watches, folder).over(examples, progress)
        yield {name: watch.statistics() for node, watch in watches.items() for name, tap in taps.items() if tap is node}


def copied(rewriter: Rewriter) -> tuple[Program, dict[Node, Node]]:
    """A copy of the program, to gather from while the program is rewritten, and which of its nodes are those of the function."""
    copy = rewriter.program.copy()
    return copy, dict(zip(rewriter.graph.nodes, copy.functions[rewriter.function.name].graph.nodes, strict=True))


def _width(name: str, node: Node, body: Function) -> int:
    """K of the value [.., K] of a tap."""
    value = node.meta.get("val")
    if node.graph is not body.graph:
        raise InputError(f"site {name} is no value of function {body.name}: tap a value of it, and none inside a region")
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point or value.dim() == 0:
        raise InputError(f"site {name} has no rows of real numbers to watch: tap a floating tensor with a last dim")
    if not isinstance(value.shape[-1], int) or value.shape[-1] == 0:
        raise InputError(f"site {name} has rows of {value.shape[-1]} numbers: tap a value whose last dim has a fixed size")
    return value.shape[-1]


def _planned_waves(names: Mapping[Node, str], widths: Mapping[Node, int], max_rows: int, max_bytes: int) -> list[list[Node]]:
    """The nodes in order, as many in each wave as `max_bytes` holds."""
    waves: list[list[Node]] = [[]]
    taken = 0
    for node, k in widths.items():
        needed = max_rows * k * 2 + 8 * k
        if needed > max_bytes:
            raise InputError(
                f"site {names[node]} needs {needed} bytes for {max_rows} rows of {k} numbers, "
                f"more than the {max_bytes} of max_calib_bytes: raise it or lower max_rows"
            )
        if taken + needed > max_bytes:
            waves.append([])
            taken = 0
        waves[-1].append(node)
        taken += needed
    return waves


class _Run:
    """One run over the examples, for the sites of a wave."""

    def __init__(self, program: Program, body: Function, watches: dict[Node, Watch], folder: ResumeFolder | None):
        self._program, self._body, self._watches, self._folder = program, body, watches, folder
        order = {node: position for position, node in enumerate(body.graph.nodes)}
        self._sites = {str(order[node]): watch for node, watch in watches.items()}
        self._draws = any(node.op == "call_function" and draws(node) for node in program.nodes())

    def over(self, examples: Examples, progress: "_Progress") -> None:
        """Shows every item to the sites that have not seen it."""
        if self._folder is not None:
            self._folder.load(self._sites)
        if all(watch.is_finished for watch in self._watches.values()):
            return progress.skip(max(watch.items for watch in self._watches.values()))
        start, count = min(watch.items for watch in self._watches.values()), 0
        for count, item in enumerate(examples, 1):
            if count <= start:
                progress.step()
                continue
            began = time.monotonic()
            self._show(count - 1, examples.inputs(count - 1, item))
            progress.step(time.monotonic() - began)
            if self._folder is not None:
                self._folder.save_when_due(self._sites)
        self._finish(examples, count, progress)

    def _finish(self, examples: Examples, count: int, progress: "_Progress") -> None:
        if count == 0:
            raise examples.none()
        seen = max(watch.items for watch in self._watches.values())
        if seen > count:
            raise InputError(
                f"calibration ended after {count} items, but the run to resume had seen {seen}: give the same items, or another folder"
            )
        progress.size = count
        for watch in self._watches.values():
            watch.is_finished = True
        if self._folder is not None:
            self._folder.save(self._sites)

    def _show(self, number: int, inputs: list[Any]) -> None:
        """Runs the program on item `number` and has each site see its value."""

        def observe(node: Node, value: Any) -> Any:
            watch = self._watches.get(node)
            if watch is not None and watch.items <= number:
                watch.see(value, number)
            return value

        try:
            with _seeded(number, self._program) if self._draws else nullcontext():
                run(self._program, inputs, function=self._body.name, observe=observe)
        except GraphwrightError:
            raise
        except Exception as error:
            raise InputError(f"calibration item {number} fails in the model ({type(error).__name__}: {error})") from error
        given = iter(inputs)
        for node in self._body.placeholders:
            is_input = node.meta.get("role", "input") == "input"
            observe(node, next(given) if is_input else self._program.weights[str(node.target)].tensor)
        for watch in self._watches.values():
            watch.items = max(watch.items, number + 1)


@contextmanager
def _seeded(seed: int, program: Program) -> Iterator[None]:
    """Random numbers by `seed`; the generators are afterwards as they were."""
    devices = {weight.device for weight in program.weights.values() if weight.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
        torch.manual_seed(seed)
        yield


def _key(program: Program, first: list[Any], options: list[Any]) -> str:
    """What tells one calibration from another, hex."""
    leaves = [content_digest(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in first]
    weights = [weight.digest for weight in program.weights.values()]
    return hashlib.sha256(json.dumps([_VERSION, torch.__version__, str(program), weights, options, leaves]).encode()).hexdigest()


class _Progress:
    """Counts items over all waves, and tells how long the rest takes by those that were run."""

    def __init__(self, tell: Tell | None, waves: int, size: int | None):
        self.size = size
        self._tell, self._waves = tell, waves
        self._done, self._run, self._seconds = 0, 0, 0.0

    def step(self, seconds: float | None = None) -> None:
        """One more item, which took so long; None for one that was skipped."""
        self._done += 1
        if seconds is not None:
            self._run, self._seconds = self._run + 1, self._seconds + seconds
        self._say()

    def skip(self, items: int) -> None:
        """All `items` of a wave, none of which has to be run."""
        self._done += items
        self.size = items
        self._say()

    def _say(self) -> None:
        if self._tell is None:
            return
        if self.size is None:
            return self._tell(self._done, None, None)
        whole = self.size * self._waves
        rest = max(whole - self._done, 0)
        self._tell(self._done, whole, self._seconds / self._run * rest if self._run else None)
