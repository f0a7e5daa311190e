"""What docs/report.md and the pictures of the README promise."""

import json
import re
from pathlib import Path

import graphwright as gw

ROOT = Path(gw.__file__).resolve().parent
TEXT = (ROOT / "docs" / "report.md").read_text()


def test_the_fields_that_it_names_are_those_of_the_schema():
    schema = json.loads((ROOT / "explorer" / "schema.json").read_text())
    table = TEXT.partition("| field |")[2]
    named = {name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named <= schema["properties"].keys() | {"memory"}
    plain = {"title", "pipeline", "contract", "backend", "torch", "measured", "graphwright_report", "errors_missing"}
    assert schema["properties"].keys() - named == plain


def test_pictures_are_small_and_there():
    for name in re.findall(r"\]\((docs/\S+\.png)\)", (ROOT / "README.md").read_text()):
        data = (ROOT / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) < 300_000
