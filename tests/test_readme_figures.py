"""The README's table of passes says what the files of measurements say."""

import json
import re
from pathlib import Path

import pytest

import graphwright as gw

ROOT = Path(gw.__file__).resolve().parent
RESULTS = ROOT / "bench" / "results"


def row(name: str) -> str:
    """The measured part of a pass's row."""
    found = re.search(rf"^\| `{name}`[^|]*\|[^|]*\|[^|]*\|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert found is not None, name
    return found[1]


def ratios(file: str, metric: str, peers: tuple[str, ...], case: str = "") -> list[float]:
    """Our figure over that of the fastest of `peers`, for each case that is called so and has one of them."""
    rows = json.loads((RESULTS / file).read_text())["rows"]
    chosen = [each["ratio"] for each in rows if each["metric"] == metric and re.match(case, each["case"])]
    known = [[ratio[peer] for peer in peers if peer in ratio] for ratio in chosen]
    return [max(each) for each in known if each]


def between(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


FORMS = ("eager", "grouped_mm", "batched_mm")
OFFERED = ("diffusers chunked", "diffusers split")
TRANSFORMERS = ("transformers static",)


@pytest.mark.parametrize(
    "name, said",
    [
        ("regroup-experts", between(ratios("experts_epyc.json", "time", FORMS))),
        ("expert-choice", between(ratios("experts_epyc.json", "time", ("regroup-experts",)))),
        ("kv-cache", between(ratios("layer_skip_epyc.json", "time a token", TRANSFORMERS))),
        ("kv-cache", between(ratios("layer_skip_epyc.json", "time a token", ("onnxruntime",)))),
        ("layer-skip", between(ratios("layer_skip_epyc.json", "decode step", ("all layers",)))),
        ("rat-recurrence", between(ratios("rat_epyc.json", "time", ("SDPA",), "decode"))),
        ("rat-recurrence", between(ratios("rat_epyc.json", "bytes", ("SDPA",)))),
        ("slice-groups", between([each for peer in OFFERED for each in ratios("slicing_epyc.json", "peak_bytes", (peer,))])),
        ("slice-groups", between([each for peer in OFFERED for each in ratios("slicing_epyc.json", "time", (peer,))])),
    ],
)
def test_the_table_of_passes_says_what_was_measured(name, said):
    assert said in row(name)


def test_every_pass_that_is_no_clean_up_has_a_row():
    table = (ROOT / "README.md").read_text().partition("What was measured, how")[0]
    cleanups = {each.name for each in gw.CLEANUPS}
    assert [name for name in gw.all_passes() if name not in cleanups and f"`{name}`" not in table] == []


def test_programs_and_files_that_the_readme_names_are_there():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?<![\w/])((?:bench|examples|docs)/[\w/]+\.(?:py|json|svg|png|md))", text))
    assert named and [name for name in sorted(named) if not (ROOT / name).exists()] == []
