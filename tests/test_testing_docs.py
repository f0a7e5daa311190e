"""The tutorial docs/testing.md: its files run, its mistake is caught as it says, and its remedy is one."""

import re
import subprocess
import sys
from pathlib import Path

TUTORIAL = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL, re.DOTALL)


def pytest_in(folder: Path, *files: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    named = {match[1]: block for block in blocks("python") if (match := re.match(r"# (\w+\.py)\n", block))}
    assert named.keys() == {"merge_scales.py", "test_merge_scales.py", "test_pipelines.py"}
    for name, source in named.items():
        (tmp_path / name).write_text(source)

    caught = pytest_in(tmp_path, "test_merge_scales.py")
    assert caught.returncode == 1, caught.stdout
    (shown,) = blocks("text")
    for line in filter(None, shown.splitlines()):
        assert line in caught.stdout, f"{line}\n\nis not in\n\n{caught.stdout}"

    (remedy,) = (block.strip() for block in blocks("python") if not block.startswith("# "))
    mistake = remedy.replace("a * b", "a + b")
    assert mistake in named["merge_scales.py"]
    (tmp_path / "merge_scales.py").write_text(named["merge_scales.py"].replace(mistake, remedy))
    mended = pytest_in(tmp_path, "test_merge_scales.py", "test_pipelines.py")
    assert mended.returncode == 0, mended.stdout
