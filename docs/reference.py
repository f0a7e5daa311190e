"""Writes docs/reference/: the operators of the dialect, the passes and the public names, each from its own declaration and docstring.

python docs/reference.py [FOLDER]
"""

import inspect
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import graphwright as gw
from graphwright.ir.op import REGISTRY, OpDeclaration
from graphwright.passes import CLEANUPS, Contract, Pass, all_passes
from graphwright.passes.options import spell_value


def write(folder: Path) -> None:
    """The pages, written anew where they differ."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"operators.md": operators(), "passes.md": passes(), "api.md": api()}
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
    spelled = [each for each in fields(kind) if each.metadata.get("spelled", True)]
    if not spelled:
        return ""
    rows = [f"| `{each.name}` | `{_cell(spell_value(each.default))}` | {_cell(each.metadata.get('legal', ''))} |" for each in spelled]
    return "\n".join(["| option | default | legal |", "|---|---|---|", *rows])


def api() -> str:
    parts = [
        "# Public names",
        "Everything that `import graphwright as gw` offers, besides the passes, which have [a page of their own](passes.md).",
    ]
    for name in gw.__all__:
        value = getattr(gw, name)
        if inspect.ismodule(value) or (inspect.isclass(value) and issubclass(value, Pass) and value is not Pass):
            continue
        parts.append(f"## gw.{name}")
        if not callable(value):
            parts.append(f"`{', '.join(map(str, value))}`")
            continue
        parts += [_fenced(f"{name}{_signature(value)}"), _docstring(value)]
        parts += [_method(name, method, each) for method, each in _methods(value)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _methods(value: Any) -> list[tuple[str, Any]]:
    """The methods and properties that a class of ours declares itself, with a docstring."""
    if not inspect.isclass(value):
        return []
    return [
        (name, each)
        for name, each in vars(value).items()
        if not name.startswith("_") and (inspect.isfunction(each) or isinstance(each, property)) and each.__doc__
    ]


def _method(owner: str, name: str, each: Any) -> str:
    signature = "" if isinstance(each, property) else _signature(each)
    return "\n\n".join([f"### {owner}.{name}", _fenced(f"{name}{signature}"), _docstring(each)])


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
