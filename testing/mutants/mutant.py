"""A planted mistake: one place of one file of graphwright, said otherwise. It is planted into the running process and taken out again; no
file changes.

    with planted(mutant):
        ...

The text of the file is compiled with and without the mistake, and functions whose code differs get the other code. Source: specs/trust.md,
section 4.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType

from ...ir.infer import forget
from ...ir.where import PACKAGE_ROOT
from .hunts import Hunt

CATCHERS = ("verifier", "float64", "rmse", "types", "aliasing", "text", "states", "running", "key", "fuel", "refusal", "error")
"""What sees a mistake. verifier: a rule of the IR, or a step that does not do what it says; float64 and rmse: the two rules of the exact
contract; types: types, strides, nesting; aliasing: which outputs lie in the same memory; text: the text is that of another program;
running: what runs is not what the program says; key: a cache gives what was made of something else; fuel: rewrites are not counted;
refusal: a typed error of a check inside the pass, where the right compiler has none; error: any other exception inside a pass, which is a
PassError to its user."""


class NoSite(Exception):
    """The text that a mutant changes does not stand there, or not once: the source moved on, and the mutant must follow."""


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in `file` and is replaced by `new`.

    group: the operator, as in the spec: slices, operands, constants, masks, state, bookkeeping, routing, kernels, infrastructure.
    catchers: what is expected to see it, one of which must. hunt: how it is looked for. rule: "pass/rule" where it
    lies in a rewrite, which bisecting must name. equivalent: why it is no mistake at all, in a sentence, for one that nothing can see.
    """

    name: str
    group: str
    file: str
    old: str
    new: str
    catchers: tuple[str, ...]
    hunt: Hunt
    rule: str = ""
    equivalent: str = ""


@contextmanager
def planted(mutant: Mutant) -> Iterator[frozenset[CodeType]]:
    """The mistake is there inside the block, which gets the codes of the changed functions and of what is nested in them.

    Raises:
        NoSite: the source moved on.
    """
    changes = [(function, other) for code, other in _changed(mutant) for function in _functions(code)]
    if not changes:
        raise NoSite(f"{mutant.name}: no function of {mutant.file} that is alive has the code")
    before = [function.__code__ for function, _ in changes]
    try:
        for function, other in changes:
            function.__code__ = other
        forget()  # types that right code inferred
        yield frozenset(code for _, other in changes for code in _nested(other))
    finally:
        for (function, _), code in zip(changes, before, strict=True):
            function.__code__ = code
        forget()


def _changed(mutant: Mutant) -> list[tuple[CodeType, CodeType]]:
    path = Path(PACKAGE_ROOT) / mutant.file
    text = _source(path)
    if text.count(mutant.old) != 1:
        raise NoSite(f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}, not once")
    if mutant.old.count("\n") != mutant.new.count("\n"):
        raise NoSite(f"{mutant.name}: its text has other lines than what it replaces, which would move all functions behind it")
    changed = text.replace(mutant.old, mutant.new)
    right, wrong = (compile(each, str(path), "exec", dont_inherit=True) for each in (text, changed))
    found = list(_different(right, wrong))
    if not found:
        raise NoSite(f"{mutant.name}: the edit of {mutant.file} changes no function")
    return found


@cache
def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


_IS_FUNCTION = 0x02  # CO_NEWLOCALS: neither a module nor the body of a class


def _different(right: CodeType, wrong: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """The outermost functions whose code differs, in pairs."""
    pairs = [(a, b) for a, b in zip(right.co_consts, wrong.co_consts) if isinstance(a, CodeType) and isinstance(b, CodeType)]
    for a, b in pairs:
        if a == b:
            continue
        if a.co_flags & _IS_FUNCTION and a.co_flags & 0x01:  # CO_OPTIMIZED
            yield a, b
        else:
            yield from _different(a, b)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _nested(each)


def _functions(code: CodeType) -> list[FunctionType]:
    gc.unfreeze()  # frozen objects are not listed
    return [each for each in gc.get_objects() if type(each) is FunctionType and each.__code__ == code]
