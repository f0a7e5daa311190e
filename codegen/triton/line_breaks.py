"""Statements that are longer than a line, as `ruff format` breaks them: a kernel's file is read as any other source.

It breaks the last pair of brackets up to which a statement fits: what is inside goes on a line of its own if it fits there, else each
element on one. Emitted statements are calls, definitions and tuples, so nothing else of the formatter's rules is needed.
"""

WIDTH = 140
_OPEN, _CLOSE = "([{", ")]}"


def with_breaks(text: str) -> str:
    """`text`, lines of Python, with its long statements over several lines. Comments, docstrings and what has no brackets stay."""
    return "\n".join(line for statement in text.split("\n") for line in _broken(statement))


def _broken(line: str) -> list[str]:
    start = line.lstrip()
    if len(line) <= WIDTH or start.startswith(("#", '"""')):
        return [line]
    pairs = [(begin, end) for begin, end in _pairs(line) if begin < WIDTH]
    if not pairs:
        return [line]
    begin, end = pairs[-1]
    indent = " " * (len(line) - len(start))
    inside = line[begin + 1 : end].removesuffix(",")
    lines = [f"{indent}    {inside}"]
    if len(lines[0]) > WIDTH:
        lines = [part for element in _split(inside, ", ") for part in _element(f"{indent}    {element},")]
    return [line[: begin + 1], *lines, indent + line[end:]]


def _element(line: str) -> list[str]:
    """An element of what is in brackets; a sum that is too long has a line for each term."""
    first, *others = _split(line.replace(" - ", " + -"), " + ")
    if len(line) <= WIDTH or not others:
        return _broken(line)
    indent = " " * (len(line) - len(line.lstrip()))
    return [first, *(f"{indent}- {term[1:]}" if term.startswith("-") else f"{indent}+ {term}" for term in others)]


def _pairs(text: str) -> list[tuple[int, int]]:
    """Where the brackets that lie in no others open and close."""
    return [(begin, end) for begin, end, depth in _brackets(text) if depth == 0]


def _split(text: str, separator: str) -> list[str]:
    """`text` at each `separator` that is in no brackets."""
    parts, start = [], 0
    inside = _pairs(text)
    at = text.find(separator)
    while at >= 0:
        if not any(begin < at < end for begin, end in inside):
            parts.append(text[start:at])
            start = at + len(separator)
        at = text.find(separator, at + 1)
    return [*parts, text[start:]]


def _brackets(text: str) -> list[tuple[int, int, int]]:
    """(begin, end, how many others it lies in) of each pair of brackets outside of strings."""
    found, opened, quote = [], [], ""
    for at, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in _OPEN:
            opened.append(at)
        elif character in _CLOSE:
            found.append((opened.pop(), at, len(opened)))
    return found
