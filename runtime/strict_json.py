"""JSON as the standard has it: no repeated keys, no NaN or Infinity, bounded depth. Python's own reader takes all of these."""

import json
from typing import Any, NoReturn

from ..ir.errors import ArtifactError


def strict_json(text: bytes) -> Any:
    """The value of `text`. Raises ArtifactError where it is not JSON in UTF-8."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"its JSON is broken ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")
