"""Programs read from text without inferring their types again.

    kind types    text, environment     snapshot of the program

Reading text is mostly inference (3 s for 2,200 nodes, with the verifier's). The types of a text that was read and verified before, by this
version of everything, are known; its weights are held against the table that comes with it each time.
"""

import json
import zlib
from collections.abc import Mapping
from contextlib import suppress

import torch

from ..ir import Program, parse, verify
from ..ir.snapshot import NoSnapshot, rebuild, take
from .cache import Cache
from .cache_key import digest, environment

KIND = "types"
_FUNCTION = "\nfunction "  # begins a line, and text has no other line breaks than those between lines
_NO_FUNCTION = "\nfunction main { takes ((), {}) gives () return }\n"


def read_program(text: str, weights: Mapping[str, torch.Tensor], cache: Cache | None) -> Program:
    """The verified program of `text` over `weights`.

    Raises:
        ParseError, VerifyError: as `parse` and `verify` do.
    """
    if cache is None:
        return _read(text, weights)
    key = {"text": digest(text), **environment()}
    kept = cache.get(KIND, key)
    if kept is not None:
        declared = parse(text.partition(_FUNCTION)[0] + _NO_FUNCTION, weights)
        with suppress(Exception):  # a snapshot that this version did not write
            return rebuild(json.loads(zlib.decompress(kept)), declared.weights, declared.symbols)
    program = _read(text, weights)
    with suppress(NoSnapshot):
        snapshot = take(program)
        # Text of another form than ours may declare a weight behind a function.
        if str(program) == text and take(rebuild(snapshot, program.weights, program.symbols)) == snapshot:
            cache.put(KIND, key, zlib.compress(json.dumps(snapshot).encode(), level=1))
    return program


def _read(text: str, weights: Mapping[str, torch.Tensor]) -> Program:
    program = parse(text, weights)
    verify(program)
    return program
