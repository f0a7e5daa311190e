"""What the package promises before any model is compiled: it is complete, light to import, and runs nothing that it read."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import graphwright

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = {"tests", "bench", "docs", "examples"}
NOT_SOURCE = {"build", "dist", "out", "__pycache__"}

HEAVY = {
    "transformers",
    "diffusers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "triton",
    "hypothesis",
    "torch._dynamo",
    "torch._inductor",
}

RUNS_WHAT_IT_READS = {
    *("eval", "exec", "builtins.eval", "builtins.exec", "torch.load", "allow_pickle"),
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
}
ALLOWED: dict[tuple[str, str], str] = {
    # ("path/of/file.py", "name from the set above"): "why it is safe there",
    ("codegen/stored_code.py", "marshal"): "compiled code is code; runtime/cache.py gives none that another user could have written",
    ("codegen/stored_code.py", "pickle"): "the same",
    ("tests/test_docs.py", "exec"): "runs the code of our own documentation",
    ("tests/test_testing_check_pass.py", "exec"): "runs a test that `check_pass` printed of a program of ours",
    ("tests/test_links_rules.py", "eval"): "evaluates the halo formulas that our own links print, over two integers",
}


def folders() -> Iterator[tuple[Path, list[str]]]:
    """Every source folder of the checkout, relative to its root, with its file names."""
    for here, dirs, files in os.walk(ROOT):
        dirs[:] = sorted(d for d in dirs if not d.startswith(".") and d not in NOT_SOURCE and not d.endswith(".egg-info"))
        yield Path(here).relative_to(ROOT), files


def test_every_package_is_listed_in_pyproject():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = [path for path, files in folders() if "__init__.py" in files and not NOT_SHIPPED & {*path.parts[:1]}]
    expected = {".".join(("graphwright", *path.parts)): path.as_posix() for path in shipped}
    assert sorted(setuptools["packages"]) == sorted(expected)
    assert setuptools["package-dir"] == expected


def test_every_shipped_module_is_in_a_package():
    loose = [path for path, files in folders() if "__init__.py" not in files and any(f.endswith(".py") for f in files)]
    assert [path.as_posix() for path in loose if path.parts[0] not in NOT_SHIPPED] == []


def test_the_checkout_is_imported_as_graphwright_and_under_no_other_name():
    init = ROOT / "__init__.py"
    assert Path(graphwright.__file__).resolve() == init
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    names = [name for name, file in files.items() if file and Path(file).resolve() == init]
    assert names == ["graphwright"]


def test_import_adds_nothing_heavy_to_what_torch_loads():
    program = "import sys, torch; before = {*sys.modules}; import graphwright; print(*sorted({*sys.modules} - before), sep='\\n')"
    added = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.anchor).stdout.split()
    assert "graphwright" in added
    assert [name for name in added if HEAVY & {name.split(".")[0], ".".join(name.split(".")[:2])}] == []


def test_no_source_runs_what_it_reads():
    found = set()
    for path, files in folders():
        for file in files:
            if file.endswith(".py"):
                source = path / file
                found |= {(source.as_posix(), name) for name in names_used((ROOT / source).read_text()) & RUNS_WHAT_IT_READS}
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set(), "allowed, and used no more"


def names_used(source: str) -> set[str]:
    """What a source calls, refers to as module.name, imports (each name, each module and its root) and passes by keyword."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id=name)):
                names.add(name)
            case ast.Attribute(value=ast.Name(id=module), attr=name):
                names.add(f"{module}.{name}")
            case ast.keyword(arg=str(name)):
                names.add(name)
            case ast.Import():
                names |= {alias.name.split(".")[0] for alias in node.names}
            case ast.ImportFrom(module=str(module), level=0):
                names |= {module.split(".")[0]} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_names_used_sees_each_way_in():
    assert names_used("eval('1')") == {"eval"}
    assert names_used("model.eval()") == {"model.eval"}
    assert "torch.load" in names_used("torch.load(f)")
    assert "torch.load" in names_used("from torch import load as read")
    assert "pickle" in names_used("import pickle as p")
    assert "pickle" in names_used("from pickle import loads")
    assert "allow_pickle" in names_used("np.load(f, allow_pickle=True)")


def test_modules_that_users_write_are_there_without_an_import_of_their_own():
    program = "import graphwright as gw; print(gw.ir.capture.__name__, gw.models.load.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.anchor)
    assert done.stdout.split() == ["capture", "load"], done.stderr
