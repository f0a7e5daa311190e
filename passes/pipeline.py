"""Pipelines as text and as lists, which mean the same: `slice-groups{memory_budget=25%},fold-constants`.

    pipeline = [pass {"," pass}]
    pass     = NAME | MODULE ":" CLASS ["{" [option {"," option}] "}"]
    option   = NAME "=" value
    value    = INT | FLOAT | true | false | none | PERCENT | SIZE | WORD | STRING | "[" [value {"," value}] "]"

A class of yours is named by its module, which is imported. A percentage (`25%`), a size (`2GiB`) and a bare word are strings, which
the pass interprets.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ..ir.errors import PassError
from .base import Pass
from .options import KEYWORDS, SHARE, SIZE, WORD
from .registry import pass_named

Pipeline = str | Pass | Sequence["Pass | str"]

_FLOAT = re.compile(r"-?(?:\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|inf(?![A-Za-z0-9_]))")
_INT = re.compile(r"-?\d+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*|[A-Za-z][A-Za-z0-9-]*")
_OPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SPACE = re.compile(r"\s*")

_MAX_DEPTH = 16


def parse_pipeline(pipeline: Pipeline) -> tuple[Pass, ...]:
    """The passes that `pipeline` names: text, one pass, or a list that mixes passes and text.

    Raises:
        PassError: unknown pass or option, bad value, bad syntax (with its column), or an entry that is neither pass nor text.
    """
    if isinstance(pipeline, str):
        return _Parser(pipeline).pipeline()
    if isinstance(pipeline, Pass):
        return (pipeline,)
    if isinstance(pipeline, type) or not isinstance(pipeline, Iterable):
        raise PassError(f"a pipeline is text, a pass or a list of these, not {_given(pipeline)}")
    passes: list[Pass] = []
    for entry in pipeline:
        if not isinstance(entry, str | Pass):
            raise PassError(f"a pipeline holds passes and their names, not {_given(entry)}")
        passes += parse_pipeline(entry)
    return tuple(passes)


def _given(value: Any) -> str:
    return f"the class {value.__name__}: write {value.__name__}()" if isinstance(value, type) else f"a {type(value).__name__}"


def spell(passes: Iterable[Pass]) -> str:
    """The text that `parse_pipeline` reads back to equal passes."""
    return ",".join(each.spelling for each in passes)


def check_order(passes: Sequence[Pass]) -> None:
    """Holds the passes' `after` and `before` against where they stand.

    Raises:
        PassError: naming two passes that stand in the wrong order, and an order that is right.
    """
    for at, later in enumerate(passes):
        for earlier in passes[:at]:
            if must_precede(later, earlier):
                order = _suggested(passes)
                advice = f"write {spell(order)}" if order else "no order of these passes satisfies all of them"
                raise PassError(f"pass {later.name} must stand before pass {earlier.name}: {advice}")


def must_precede(a: Pass, b: Pass) -> bool:
    """Whether `a` must not stand behind `b`."""
    return a.name != b.name and (b.name in a.before or a.name in b.after)


def _suggested(passes: Sequence[Pass]) -> list[Pass] | None:
    """The passes in the first order that keeps every constraint and otherwise moves nothing; None when they contradict."""
    import networkx  # a tenth of a second that only a wrong order pays for

    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    graph.add_edges_from((i, j) for i, a in enumerate(passes) for j, b in enumerate(passes) if must_precede(a, b))
    try:
        return [passes[i] for i in networkx.lexicographical_topological_sort(graph)]
    except networkx.NetworkXUnfeasible:
        return None


class _Parser:
    def __init__(self, text: str):
        self.text = text
        self.at = 0
        self.failed = False  # an error of syntax says its column already

    def pipeline(self) -> tuple[Pass, ...]:
        self._skip(_SPACE)
        passes: list[Pass] = []
        while self.at < len(self.text):
            if passes:
                self._expect(",")
            passes.append(self._pass())
        return tuple(passes)

    def _pass(self) -> Pass:
        column = self.at
        name = self._take(_NAME, "the name of a pass")
        try:
            return pass_named(name)(**(self._options() if self._accept("{") else {}))
        except PassError as error:
            if self.failed:
                raise
            raise PassError(f"{error} (column {column + 1} of the pipeline)") from None

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        while not self._accept("}"):
            if options:
                self._expect(",")
            name = self._take(_OPTION, "the name of an option")
            if name in options:
                self._fail(f"option {name} is given twice")
            self._expect("=")
            options[name] = self._value()
        return options

    def _value(self, depth: int = 0) -> Any:
        if depth > _MAX_DEPTH:
            self._fail(f"lists are nested more than {_MAX_DEPTH} deep")
        if self._accept("["):
            items: list[Any] = []
            while not self._accept("]"):
                if items:
                    self._expect(",")
                items.append(self._value(depth + 1))
            return tuple(items)
        for kind, pattern, convert in _VALUES:
            column, text = self.at, self._skip(pattern)
            if text is None:
                continue
            try:
                value = convert(text)
            except ValueError:
                self.at = column
                self._fail(f"this is no {kind}")
            self._skip(_SPACE)
            return value
        self._fail(f"a value was expected, not {self._next()}")

    def _take(self, pattern: re.Pattern[str], what: str) -> str:
        text = self._skip(pattern)
        if text is None:
            self._fail(f"{what} was expected, not {self._next()}")
        self._skip(_SPACE)
        return text

    def _skip(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match.group()

    def _accept(self, mark: str) -> bool:
        if not self.text.startswith(mark, self.at):
            return False
        self.at += 1
        self._skip(_SPACE)
        return True

    def _expect(self, mark: str) -> None:
        if not self._accept(mark):
            self._fail(f"{mark!r} was expected, not {self._next()}")

    def _next(self) -> str:
        return repr(self.text[self.at]) if self.at < len(self.text) else "the end"

    def _fail(self, message: str) -> NoReturn:
        self.failed = True
        raise PassError(f"{message} (column {self.at + 1} of the pipeline {self.text!r})")


def _word(text: str) -> Any:
    return KEYWORDS.get(text, text)


_VALUES: tuple[tuple[str, re.Pattern[str], Any], ...] = (
    ("percentage", SHARE, str),
    ("size", SIZE, str),
    ("number", _FLOAT, float),
    ("integer", _INT, int),
    ("string", _STRING, json.loads),
    ("word", WORD, _word),
)
