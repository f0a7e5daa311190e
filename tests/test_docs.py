"""The code of the documentation runs, and prints what it says that it prints. docs/testing.md has a test of its own."""

import re
from pathlib import Path

import torch
from torch import nn

import graphwright as gw

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
