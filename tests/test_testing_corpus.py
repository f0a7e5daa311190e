"""Past failures that random programs found, each a folder of tests/corpus: what went wrong stays right.

`graphwright.testing.cases` writes such folders; a note in case.json says what the fault was.
"""

from pathlib import Path

import pytest

from graphwright.testing.cases import load_case

CORPUS = Path(__file__).parent / "corpus"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", sorted(folder.name for folder in CORPUS.iterdir() if folder.is_dir()))
def test_a_past_failure_stays_right(name: str) -> None:
    case = load_case(CORPUS / name)
    assert case.note
    result = case.run()
    assert result.verdict.kind == "right", f"{case.note}: {result.verdict}"
