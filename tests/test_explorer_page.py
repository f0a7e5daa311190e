"""The page as a file: whole, alone, and safe whatever a model is called. What it does in a browser is in test_explorer_browser.py."""

import base64
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.cli import main
from graphwright.explorer import Story, document, page
from graphwright.passes import Contract

VOID = {"meta", "input", "link", "br", "img", "hr"}
HOSTILE = "</script><script>alert(1)</script>\u2028\u202e<!--\x00&\"'"

TEXT = """graphwright 1

function main {
  takes ((*), {})
  gives *
  input %x : f32[2, 3]
  %0 = aten.relu.default(%x) : f32[2, 3]  # [0] net.py:7 act
  %1 = aten.relu.default(%x) : f32[2, 3]  # [1] net.py:8 act
  %2 = aten.add.Tensor(%0, %1) : f32[2, 3]  # [2] net.py:9
  return %2
}
"""


class Elements(HTMLParser):
    """The elements of a page with their attributes; a tag that closes none that is open is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.found, self.content = [], [], {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> where {self.open[-3:]} are open"
        self.open.pop()

    def handle_data(self, data):
        if self.open and data.strip():
            self.content.setdefault(self.open[-1], []).append(data)


def told(text):
    """The document in a page."""
    packed = re.search(r'<script id="data"[^>]*>([^<]*)</script>', text)[1]
    return json.loads(zlib.decompress(base64.b64decode(packed)))


@pytest.fixture(scope="module")
def small():
    program = gw.parse(TEXT)
    result = gw.passes.PassManager("share-subexpressions").run(program)
    return document(Story(result.history, result.reports, result.contract, title="net"))


def test_a_page_is_well_formed_and_holds_its_document(small):
    text = page(small)
    elements = Elements(text)
    assert elements.open == [] and elements.content["title"] == ["graphwright: net"]
    assert told(text) == small
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_page_asks_for_nothing(small):
    elements = Elements(page(small)).found
    assert not [tag for tag, _ in elements if tag in {"link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"}]
    assert not [(tag, name) for tag, attributes in elements for name in attributes if name in {"src", "href", "srcset", "action"}]
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on") or name == "style"]
    styles = page(small).partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in styles and "@import" not in styles


def test_a_pages_policy_lets_its_own_style_and_script_run_and_nothing_else(small):
    elements = Elements(page(small))
    [policy] = [a["content"] for tag, a in elements.found if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules.keys() == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        content = elements.content[tag][-1]
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def test_no_name_of_a_model_breaks_out_of_a_page(small):
    hostile = json.loads(json.dumps(small).replace('"net.py"', json.dumps(HOSTILE)))
    hostile["title"] = HOSTILE
    hostile["sources"] = {HOSTILE: [{"first": 1, "lines": [HOSTILE]}]}
    text = page(hostile)
    elements = Elements(text)
    assert [tag for tag, _ in elements.found] == [tag for tag, _ in Elements(page(small)).found]
    assert "alert(1)" not in text.replace("&lt;script&gt;alert(1)", "") and "\u2028" not in text.partition("</title>")[2]
    assert told(text) == hostile


def test_names_of_weights_and_files_come_through_whole():
    text = TEXT.replace("input %x", 'input %"</script>\\u202e"').replace("(%x)", '(%"</script>\\u202e")')
    found = told(page(document(Story([gw.parse(text)], [], Contract.EXACT))))
    assert any("</script>" in line["text"] for line in found["programs"][0]["lines"])


def test_numbers_that_json_lacks_are_text(small):
    found = document(Story([gw.parse(TEXT)], [], Contract.EXACT, seconds=float("inf")))
    assert found["measured"]["seconds"] == "inf"
    json.loads(json.dumps(found), parse_constant=lambda name: pytest.fail(name))


def test_libraries_are_named_with_version_and_licence():
    folder = Path(gw.__file__).parent / "explorer" / "page" / "vendor"
    readme = (folder / "README.md").read_text()
    files = {path.name for path in folder.iterdir()} - {"README.md"}
    assert files and all(f"`{name}`" in readme for name in files)
    assert all("MIT" in line for line in readme.splitlines() if ".js`" in line)


def test_pages_carry_the_licences_of_libraries(small):
    text = page(small)
    assert "Copyright (c) 2012-2014 Chris Pettitt" in text and "Leon Sorokin" in text


def test_a_page_of_a_small_model_is_small(small):
    assert len(page(small)) < 300_000


# --- report and command ----------------------------------------------------------------------------------------------------


class Relu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


def test_a_report_writes_its_page(tmp_path):
    compiled = gw.compile(Relu(), example_inputs=(torch.ones(2),), backend="aten", cache=False)
    compiled.report().html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert told(text) == compiled.report().data() and told(text)["title"] == "Relu"


def test_a_page_that_cannot_be_written_leaves_what_was_there(tmp_path):
    compiled = gw.compile(Relu(), example_inputs=(torch.ones(2),), backend="aten", cache=False)
    with pytest.raises(OSError):
        compiled.report().html(tmp_path / "missing" / "report.html")


@pytest.fixture
def program(tmp_path):
    (tmp_path / "net.txt").write_text(TEXT)
    return tmp_path / "net.txt"


def test_view_writes_a_page_of_a_text_program(program, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["view", str(program), "--passes", "share-subexpressions", "--no-cleanups"]) == 0
    found = told((tmp_path / "net.txt.report.html").read_text())
    assert [stage["name"] for stage in found["stages"]] == ["captured", "share-subexpressions"] and len(found["programs"]) == 2
    assert "net.txt.report.html" in capsys.readouterr().out


def test_view_prints_the_document_as_json(program, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["view", str(program), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["graphwright_report"] == 1 and len(found["stages"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.txt"]


def test_view_profiles_a_decoder_with_the_positions_that_it_takes(tmp_path, capsys):
    assert main(["view", "decoder:tiny", "--decoder", "--profile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in found["programs"][-1]["functions"]} >= {"main", "prefill", "decode"}
    assert found["errors"] and any(kernel["seconds"] for kernel in found["kernels"])


def test_view_profiles_a_file_on_inputs_that_it_makes_up(tmp_path, capsys):
    gw.compile(Relu(), example_inputs=(torch.ones(2),), backend="aten", cache=False).save(tmp_path / "relu.gw")
    assert main(["view", str(tmp_path / "relu.gw"), "--profile", "-o", str(tmp_path / "relu.html")]) == 0
    found = told((tmp_path / "relu.html").read_text())
    assert found["kernels"][0]["seconds"] > 0 and found["measured"]["seconds"] > 0


@pytest.mark.parametrize(
    "arguments, advice",
    [
        (["-o", "net.pdf"], "something.html"),
        (["-o", "missing/net.html"], "missing does not exist"),
        (["--profile"], "has no weights"),
        (["--backend", "best"], "backend"),
    ],
)
def test_mistakes_are_one_line(program, arguments, advice, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["view", str(program), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and advice in said.err
