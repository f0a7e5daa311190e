"""How `bench/gpu.py` goes through its cases, so that half an hour of a rented GPU ends with all that there was time for: what fails is a
note, what was measured is saved after each case, and when the time is spent the rest is named and left out."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import Bench

from graphwright.codegen.triton.tune import device_seconds
from graphwright.ir.errors import first_line

Call = Callable[[], Any]
_BEGIN = time.perf_counter()


def run_case(bench: Bench, case: str, action: Callable[[], None]) -> None:
    """Measures one case, unless the time is spent. A failure of our own is a note here, and an error at the end (`end`)."""
    if time.perf_counter() - _BEGIN > 60 * bench.options.minutes:
        bench.note(f"{case}: left out, the {bench.options.minutes:g} minutes are spent")
        return
    try:
        action()
    except Exception as error:
        bench.note(f"{case}: FAILED, {_said(error)}")
        bench.failed.append(case)
    bench.save()
    _free()


def attempt(bench: Bench, case: str, peer: str, action: Callable[[], Any]) -> Any:
    """What `action` gives for a peer; None where the peer is skipped, and where it cannot do that, which is a note."""
    if peer in bench.options.skip.split(","):
        return None
    try:
        return action()
    except Exception as error:
        bench.note(f"{case}: {peer} cannot run it, {_said(error)}")
        _free()
        return None


def peer_seconds(bench: Bench, case: str, device: torch.device, peers: dict[str, Callable[[], Call]]) -> dict[str, float]:
    """Seconds on the device of each peer that runs; `peers` make the calls, which is where compilers fail."""
    measured = {peer: attempt(bench, case, peer, lambda make=make: device_seconds(make(), device)) for peer, make in peers.items()}
    return {peer: seconds for peer, seconds in measured.items() if seconds is not None}


def compiled_call(function: Callable[..., Any], args: Any, mode: str | None = None) -> Call:
    """A call of what torch.compile makes of `function`, with nothing left of what it compiled before."""
    torch._dynamo.reset()
    compiled = torch.compile(function, mode=mode)
    return lambda: compiled(*args)


def end(bench: Bench) -> None:
    """Prints the table; exits with an error if cases of ours failed."""
    bench.finish()
    if bench.failed:
        sys.exit(f"{len(bench.failed)} failed: {'; '.join(bench.failed)}")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
