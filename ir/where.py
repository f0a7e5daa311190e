"""The user's line behind a node, and files named so that dumps do not depend on where a package is installed."""

import functools
import os
import re
import traceback

import torch

from .program import Node, Where

PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TORCH_ROOT = os.path.dirname(os.path.abspath(torch.__file__))

_FLOORS = {"ir", "passes", "codegen", "runtime", "models", "testing", "compiler.py", "cli.py"}
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def where_of(node: Node) -> Where:
    """The innermost frame of the user's own code, and the path of the module that ran it."""
    stack = node.meta.get("nn_module_stack") or {}
    module = next((path for path, _ in reversed(list(stack.values()))), "")
    file, line = _user_frame(node.meta.get("stack_trace") or "")
    module = re.sub(r"^L\['self'\]\.?|@\d+$", "", str(module))
    # Nodes that torch itself inserts (size queries) carry the name of the hook that made them.
    return Where(file, line, "" if module.startswith("_empty_nn_module_stack") else module)


@functools.lru_cache(maxsize=4096)
def _user_frame(trace: str) -> tuple[str, int]:
    for file, line in reversed(_FRAME.findall(trace)):
        is_generated = file.startswith("<")  # torch runs graphs as code that lies in no file
        if not is_generated and not os.path.abspath(file).startswith(TORCH_ROOT) and os.path.basename(file) != "runtime_assert.py":
            return relative_file(file), int(line)
    return "", 0


@functools.lru_cache(maxsize=4096)
def relative_file(file: str) -> str:
    """`file` from the root of the package that holds it, so that dumps do not depend on where it is installed."""
    path = os.path.abspath(file)
    inside = os.path.relpath(path, PACKAGE_ROOT).replace(os.sep, "/")
    # The checkout is the package, but its tests and the environment that may lie in it are not of the package.
    if inside.partition("/")[0] in _FLOORS:
        return f"graphwright/{inside}"
    root = os.path.dirname(path)
    while os.path.exists(os.path.join(root, "__init__.py")):
        root = os.path.dirname(root)
    return os.path.relpath(path, root).replace(os.sep, "/")


def raised_at(error: BaseException) -> str:
    """file:line of the innermost frame that `error` came through and that is not torch's; "" where there is none."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if not file.startswith("<") and not os.path.abspath(file).startswith(TORCH_ROOT):
            return f"{relative_file(file)}:{line}"
    return ""
