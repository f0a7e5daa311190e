"""cache list, cache explain and cache clear: what is kept between processes, and why something is not found."""

import argparse
import time
from collections.abc import Mapping
from typing import Any

from ..ir.errors import InputError
from ..ir.liveness import format_bytes
from ..passes import PassManager
from ..runtime.cache import KINDS, Entry, default_cache
from ..runtime.pass_cache import KIND, NotKept, pass_key
from .programs import pipeline_of
from .result import FOUND, OK, Result, progress, table
from .sources import load, program_of

_SHOWN = 12  # digits of a digest, which has 64


def list_(options: argparse.Namespace) -> Result:
    cache = default_cache()
    entries, problem = cache.entries(), cache.problem
    total = sum(entry.nbytes for entry in entries)
    head = f"{cache.folder}: {len(entries)} entries, {format_bytes(total)} of at most {format_bytes(cache.max_bytes)}"
    rows = [[entry.kind, format_bytes(entry.nbytes), _time(entry.used), _what(entry.key)] for entry in entries]
    lines = [head, *_problem_lines(problem), *([table(["kind", "size", "last used", "of"], rows)] if rows else [])]
    data = {"folder": str(cache.folder), "max_bytes": cache.max_bytes, "problem": problem, "entries": list(map(_entry_data, entries))}
    return Result("\n".join(lines), data)


def clear(options: argparse.Namespace) -> Result:
    cache = default_cache()
    kinds = sorted({*KINDS, *(entry.kind for entry in cache.entries())})
    if options.kind and options.kind not in kinds:
        raise InputError(f"{cache.folder} has no entries of kind {options.kind}: there are {', '.join(kinds)}")
    removed = cache.clear(options.kind)
    kind = f" of kind {options.kind}" if options.kind else ""
    return Result(f"{cache.folder}: removed {removed} entr{'y' if removed == 1 else 'ies'}{kind}", {"removed": removed})


def explain(options: argparse.Namespace) -> Result:
    """Whether `compile` with these passes would find what they make of MODEL; if not, in what the nearest that is kept differs."""
    passes = pipeline_of(options)
    PassManager(passes)  # a wrong order is said before the work
    cache = default_cache()
    with progress():
        program = program_of(load(options.model, options.trusted), options.trusted)
    try:
        key = pass_key(program, passes)
    except NotKept as reason:
        return Result(f"never kept: {reason}", {"found": False, "kept": False, "reason": str(reason)}, FOUND)
    is_found = cache.get(KIND, key) is not None
    nearest = cache.nearest(KIND, key)
    differing = {} if is_found or nearest is None else nearest.differing(key)
    if is_found:
        lines = ["hit: what these passes make of this model is kept"]
    elif nearest is None:
        lines = ["miss: nothing that passes made is kept"]
    elif not differing:
        lines = ["miss: the entry is damaged, and compiling writes it anew"]
    else:
        lines = [f"miss: the nearest entry, last used {_time(nearest.used)}, differs in {', '.join(differing)}"]
        lines += [f"  {name}: {_shown(there)} there, {_shown(here)} here" for name, (there, here) in differing.items()]
    data = {
        "found": is_found,
        "kept": True,
        "key": key,
        "nearest": None if nearest is None else _entry_data(nearest),
        "differing": {name: {"there": there, "here": here} for name, (there, here) in differing.items()},
        "problem": cache.problem,
    }
    return Result("\n".join([*lines, *_problem_lines(cache.problem)]), data, OK if is_found else FOUND)


def _problem_lines(problem: str | None) -> list[str]:
    return [] if problem is None else [f"this cache is not used: {problem}"]


def _entry_data(entry: Entry) -> dict[str, Any]:
    return {"kind": entry.kind, "key": dict(entry.key), "bytes": entry.nbytes, "used": entry.used}


def _what(key: Mapping[str, str]) -> str:
    """The parts of a key that are its own, rather than of the machine: those that tell entries apart."""
    own = {name: value for name, value in key.items() if name in ("passes", "program", "graph", "weights", "question")}
    return " ".join(f"{name}={_shown(value)}" for name, value in sorted(own.items()))


def _shown(value: str | None) -> str:
    if value is None:
        return "nothing"
    is_digest = len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value[:_SHOWN] if is_digest else value or "nothing"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
