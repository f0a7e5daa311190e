"""Options of passes: how a pass declares them, what values they take, and how a value is spelled in a pipeline.

rank: int = option(32, "an integer of at least 1", at_least(1))
memory_budget: str = option("25%", "a share such as 25% or a size such as 2GiB", lambda v: is_share(v) or is_size(v))
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import field
from typing import Any

from ..ir.errors import PassError

WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.:/-]*")
SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
SIZE = re.compile(r"(\d+(?:\.\d+)?)(B|KiB|MiB|GiB|TiB|kB|MB|GB|TB)")
KEYWORDS: dict[str, Any] = {"true": True, "false": False, "none": None, "inf": float("inf"), "nan": float("nan")}

_UNITS = {unit: 1024**power for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))}
_UNITS |= {unit: 1000 ** (power + 1) for power, unit in enumerate(("kB", "MB", "GB", "TB"))}


def option(default: Any, legal: str, accepts: Callable[[Any], bool], *, spelled: bool = True) -> Any:
    """A dataclass field that is an option: `legal` says in words which values `accepts` accepts.

    An option that is no plain data (a calibration set) has `spelled=False` and does not appear in pipeline text.
    """
    return field(default=default, metadata={"legal": legal, "accepts": accepts, "spelled": spelled})


def at_least(low: float) -> Callable[[Any], bool]:
    """Accepts numbers >= low, of low's type: an integer bound accepts integers alone."""
    return lambda value: _is_number(value, type(low)) and value >= low


def between(low: float, high: float) -> Callable[[Any], bool]:
    """Accepts numbers in [low, high], of low's type."""
    return lambda value: _is_number(value, type(low)) and low <= value <= high


def one_of(choices: Collection[Any]) -> Callable[[Any], bool]:
    """Accepts the members of `choices`."""
    return lambda value: value in choices


def is_share(value: Any) -> bool:
    """Whether `value` is a percentage in text: `25%`."""
    return isinstance(value, str) and SHARE.fullmatch(value) is not None


def is_size(value: Any) -> bool:
    """Whether `value` is an amount of memory: bytes, or text such as `64MiB`."""
    return _is_number(value, int) and value >= 0 or isinstance(value, str) and SIZE.fullmatch(value) is not None


def is_texts(value: Any) -> bool:
    """Whether `value` is a sequence of texts, not a single one."""
    return not isinstance(value, str) and all(isinstance(item, str) for item in value)


def share(text: str) -> float:
    """`25%` -> 0.25. Raises PassError for anything else."""
    match = SHARE.fullmatch(text)
    if match is None:
        raise PassError(f"{text!r} is not a percentage: write one such as 25%")
    return float(match[1]) / 100


def size_in_bytes(size: int | str) -> int:
    """`64MiB` -> 67108864; a number is bytes already. Raises PassError for anything else."""
    if isinstance(size, int):
        return size
    match = SIZE.fullmatch(size)
    if match is None:
        raise PassError(f"{size!r} is not a size: write bytes, or one such as 64MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def spell_value(value: Any) -> str:
    """The value as a pipeline's text writes it. Raises PassError when it is no plain data."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(spell_value, value)) + "]"
    if not isinstance(value, str):
        raise PassError(f"a {type(value).__name__} cannot be written in a pipeline's text: give the pass as an object")
    bare = WORD.fullmatch(value) and value not in KEYWORDS or SHARE.fullmatch(value) or SIZE.fullmatch(value)
    return value if bare else json.dumps(value)


def _is_number(value: Any, kind: type) -> bool:
    wanted = int if kind is int else int | float
    return isinstance(value, wanted) and not isinstance(value, bool)
