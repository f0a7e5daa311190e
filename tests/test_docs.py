"""The code of the documentation runs, and prints what it says that it prints. docs/testing.md has a test of its own."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.op import REGISTRY

DOCS = Path(gw.__file__).resolve().parent / "docs"


def run(path: Path, names: dict) -> dict:
    """Runs the blocks of Python of a page, one after the other, and gives what they defined."""
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(compile(block, path.name, "exec"), names)
    return names


def test_the_code_of_the_report_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16)).eval()
    names = run(DOCS / "report.md", {"gw": gw, "model": model, "args": (torch.randn(64, 16),)})
    assert (tmp_path / "report.html").stat().st_size > 100_000 and names["text"].startswith("{")
    printed = capsys.readouterr().out.splitlines()
    assert 1 <= len(printed) <= 3 and all(re.match(r"\d+  +%\d+ = ", line) for line in printed)


PAGES = [
    "index",
    "contracts",
    "left_alone",
    "debugging",
    "own_pass",
    *(f"tutorials/{path.stem}" for path in sorted((DOCS / "tutorials").glob("*.md"))),
]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(DOCS / f"{page}.md", {"__name__": "docs"})
    assert capsys.readouterr().out


def test_every_pass_has_a_tutorial_that_names_it():
    text = "\n".join(path.read_text() for path in (DOCS / "tutorials").glob("*.md"))
    cleanups = {each.name for each in gw.CLEANUPS}
    assert [name for name in gw.all_passes() if name not in cleanups and f"{name}" not in text] == []


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def headings(text: str) -> set[str]:
    return set(re.findall(r"^## (.*)$", text, re.MULTILINE))


def test_the_references_leave_nothing_out(reference):
    assert headings(reference.operators()) == {f"gw.{name}" for name in REGISTRY}
    assert headings(reference.passes()) == set(gw.all_passes())
    passes = {name for name in gw.__all__ if isinstance(getattr(gw, name), type) and issubclass(getattr(gw, name), gw.Pass)} - {"Pass"}
    assert headings(reference.api()) == {f"gw.{name}" for name in gw.__all__} - {f"gw.{name}" for name in passes} - {"gw.ir", "gw.models"}


def test_packages_list_what_a_pass_of_ones_own_needs(reference):
    text = reference.packages()
    named = set(re.findall(r"^###+ (.*)$", text, re.MULTILINE))
    assert {
        "Rewriter",
        "Rewriter.insert",
        "RegionBuilder.call",
        "Outcome",
        "LeftAlone.at",
        "option",
        "check_pass",
        "bisect",
        "load",
    } <= named
    assert {f"## {module}" for module in reference.PACKAGES} <= set(text.splitlines())


def test_every_public_name_is_documented(reference):
    for name in gw.__all__:
        value = getattr(gw, name)
        if callable(value):
            assert (value.__doc__ or "").strip(), name
    for module in reference.PACKAGES:
        for name, value in reference.public_names(module).items():
            assert (value.__doc__ or "").strip(), f"{module}.{name}"
            members = vars(value).items() if isinstance(value, type) and value.__module__.startswith("graphwright") else ()
            bare = [each for each, member in members if not each.startswith("_") and reference.is_member(member) and not member.__doc__]
            assert bare == [], f"{module}.{name}"
    for kind in gw.all_passes().values():
        assert "".join((kind.__doc__ or "").split()), kind


def test_links_between_pages_lead_somewhere():
    written = {"reference/operators.md", "reference/passes.md", "reference/api.md", "reference/packages.md"}
    for path in DOCS.rglob("*.md"):
        if path.parent.name == "reference":
            continue
        for target in re.findall(r"\]\(([^)#]+\.md)", path.read_text()):
            place = (path.parent / target).resolve()
            assert place.exists() or place.relative_to(DOCS).as_posix() in written, f"{path.name}: {target}"
    listed = set(re.findall(r"^((?:tutorials/|reference/)?\w+)$", (DOCS / "index.md").read_text(), re.MULTILINE))
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md") if path.parent.name != "reference"}
    assert pages - {"index"} <= listed


def test_the_pages_are_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="the pages are built by sphinx: pip install 'graphwright[docs]'")
    pytest.importorskip("myst_parser", reason="the pages are Markdown: pip install 'graphwright[docs]'")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        str(DOCS),
        str(tmp_path / "out"),
        "-d",
        str(tmp_path / "tree"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "gw.cached_attention" in (tmp_path / "out" / "reference" / "operators.html").read_text()
