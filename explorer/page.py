"""The page of a document: one HTML file that opens from disk, holds everything, and asks for nothing.

The document lies in it compressed and in base64, of which no text of a model can break out; scripts show text as text. A policy in the
page's head lets run what has the digests of the page's own style and script, and forbids every connection.
"""

import base64
import hashlib
import html
import json
import zlib
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

_FOLDER = Path(__file__).parent / "page"
_STYLES = ("vendor/uPlot.min.css", "style.css")
_LIBRARIES = ("vendor/dagre.min.js", "vendor/uPlot.iife.min.js")
_SCRIPTS = ("report.js", "dom.js", "state.js", "text.js", "groups.js", "graph.js", "memory.js", "details.js", "dock.js", "main.js")
_LICENCES = ("vendor/dagre.license.txt", "vendor/uPlot.license.txt")


def page(document: dict[str, Any]) -> str:
    """The page that shows `document`, as `explorer.document` makes it."""
    packed = base64.b64encode(zlib.compress(json.dumps(document, separators=(",", ":")).encode(), level=9)).decode()
    title = _visible(document["title"])
    style, script = _style(), _script()
    policy = f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; base-uri 'none'; form-action 'none'"
    parts = {
        "policy": policy,
        "title": html.escape(f"graphwright: {title}" if title else "graphwright"),
        "style": style,
        "script": script,
        "data": packed,
        "licences": _comment("\n\n".join(_read(name) for name in _LICENCES)),
    }
    return Template(_read("index.html")).substitute(parts)


def _visible(text: str) -> str:
    """`text` with what is not seen, or changes the order of what is, spelled out."""
    return "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in text)


@cache
def _style() -> str:
    return "\n".join(map(_read, _STYLES))


@cache
def _script() -> str:
    """The libraries, then our files as one function, so that they share names with nothing else."""
    own = "\n".join(map(_read, _SCRIPTS))
    return "\n".join([*map(_read, _LIBRARIES), f'(() => {{\n"use strict";\n{own}}})();\n'])


@cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _comment(text: str) -> str:
    return text.replace("--", "- -")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
