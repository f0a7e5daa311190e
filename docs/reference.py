"""Writes docs/reference/: the operators of the dialect, the passes and the public names, those of the packages too, each from its own
declaration and docstring.

python docs/reference.py [FOLDER]
"""

import importlib
import inspect
import sys
from dataclasses import Field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import graphwright as gw
from graphwright.ir.op import REGISTRY, OpDeclaration
from graphwright.passes import CLEANUPS, Contract, Pass, all_passes
from graphwright.passes.options import spell_value

PACKAGES = {
    "graphwright.ir": "Programs, and how they are changed: what a pass of your own works with.",
    "graphwright.ir.rewriter": "",
    "graphwright.passes": "What a pass gives back, and how pipelines run; the passes themselves have [a page of their own](passes.md).",
    "graphwright.passes.options": "Options of a pass: their defaults and what they may be.",
    "graphwright.testing": "Random programs and the checks that a pass must hold: see [testing a pass](../testing.md).",
    "graphwright.testing.bisect": "",
    "graphwright.testing.reduce": "",
    "graphwright.testing.reproducer": "",
    "graphwright.explorer": "What a compile did, as data and as a page: see [the report](../report.md).",
    "graphwright.models": "The networks of the zoo. `graphwright zoo` lists them.",
    "graphwright.models.text": "The text that `decoder:text` was trained on, and how well a model predicts it.",
    "graphwright.models.digits": "The digits that `dit:digits` was trained on, and how good samples are.",
    "graphwright.models.sampling": "",
}


def write(folder: Path) -> None:
    """The pages, written anew where they differ."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"operators.md": operators(), "passes.md": passes(), "api.md": api(), "packages.md": packages()}
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def operators() -> str:
    parts = [
        "# Operators of the dialect",
        "A program consists of ATen's operators and of these. The body of each is plain PyTorch and is its meaning: schema, types, "
        "gradients and the oracle of its kernels follow from it. One more, `gw.sliced`, is a region: its body runs over slices of its "
        "operands.",
    ]
    for name, declaration in sorted(REGISTRY.items()):
        parts += [f"## gw.{name}", _fenced(str(declaration.overload._schema)), _docstring(declaration.body), _home(declaration)]
    return "\n\n".join(parts) + "\n"


def _home(declaration: OpDeclaration) -> str:
    return f"Declared in `{declaration.body.__module__.partition('.')[2].replace('.', '/')}.py`."


def passes() -> str:
    parts = [
        "# Passes and their options",
        "As `graphwright passes PASS` prints them. Clean-ups run before the passes that are asked for, unless `cleanups=False`.",
    ]
    for name, kind in sorted(all_passes().items()):
        declared: Any = kind.contract  # a property where options may change it
        contract = declared if isinstance(declared, Contract) else kind().contract
        cleanup = " A clean-up." if any(each.name == name for each in CLEANUPS) else ""
        parts += [
            f"## {name}",
            f"`gw.{kind.__name__}`. Contract: [{contract}](../contracts.md#{contract}).{cleanup}",
            _docstring(kind),
            _options(kind),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _options(kind: type[Pass]) -> str:
    if not fields(kind):
        return ""
    rows = [f"| `{each.name}` | `{_cell(spell_value(each.default))}` | {_cell(_legal(each))} |" for each in fields(kind)]
    return "\n".join(["| option | default | legal |", "|---|---|---|", *rows])


def _legal(option: Field[Any]) -> str:
    legal: str = option.metadata.get("legal", "")
    return legal if option.metadata.get("spelled", True) else f"{legal}; given in Python, not in a pipeline's text"


def api() -> str:
    parts = [
        "# Public names",
        "Everything that `import graphwright as gw` offers, besides the passes, which have [a page of their own](passes.md). "
        "[Its packages](packages.md) offer more.",
    ]
    for name in gw.__all__:
        value = getattr(gw, name)
        if inspect.ismodule(value) or (inspect.isclass(value) and issubclass(value, Pass) and value is not Pass):
            continue
        parts.append(f"## gw.{name}")
        if not callable(value):
            parts.append(f"`{', '.join(map(str, value))}`")
            continue
        parts += _described(name, value, 3)
    return "\n\n".join(part for part in parts if part) + "\n"


def packages() -> str:
    parts = [
        "# Names of the packages",
        "What is public below `graphwright` besides [what `gw` itself offers](api.md), by the module that it is imported from.",
    ]
    for module, about in PACKAGES.items():
        parts += [f"## {module}", about]
        for name, value in public_names(module).items():
            parts += [f"### {name}", *_described(name, value, 4)]
    return "\n\n".join(part for part in parts if part) + "\n"


def public_names(module: str) -> dict[str, Any]:
    """What a package lists in `__all__`, or else what a module declares itself, less what `gw` and packages above it offer."""
    found = importlib.import_module(module)
    names = getattr(found, "__all__", None) or [
        name for name, value in vars(found).items() if not name.startswith("_") and getattr(value, "__module__", "") == module
    ]
    above = {name: getattr(gw, name) for name in gw.__all__}
    for other in PACKAGES:
        above |= public_names(other) if module.startswith(f"{other}.") else {}
    values = {name: getattr(found, name) for name in names}
    return {name: value for name, value in values.items() if callable(value) and above.get(name) is not value}


def _described(name: str, value: Any, level: int) -> list[str]:
    """Signature and docstring, and those of a class's methods under headings of that level."""
    methods = [_method(f"{name}.{method}", each, level) for method, each in _methods(value)]
    return [_fenced(f"{name}{_signature(value)}"), _docstring(value), *methods]


def _methods(value: Any) -> list[tuple[str, Any]]:
    """The methods and properties that a class of ours declares itself, with a docstring."""
    if not inspect.isclass(value) or not value.__module__.startswith("graphwright"):
        return []
    return [(name, each) for name, each in vars(value).items() if not name.startswith("_") and is_member(each) and each.__doc__]


def is_member(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, property | cached_property | staticmethod | classmethod)


def _method(name: str, each: Any, level: int) -> str:
    called = each.__func__ if isinstance(each, staticmethod | classmethod) else each
    signature = _signature(called) if inspect.isfunction(called) else ""
    return "\n\n".join([f"{'#' * level} {name}", _fenced(f"{name.rpartition('.')[2]}{signature}"), _docstring(each)])


def _signature(value: Any) -> str:
    try:
        return str(inspect.signature(value)).replace("graphwright.", "gw.")
    except (TypeError, ValueError):
        return ""


def _docstring(value: Any) -> str:
    return _fenced(inspect.cleandoc(value.__doc__ or ""))


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "reference")
