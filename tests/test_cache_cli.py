"""`graphwright cache`: what is kept, why something is not found, and how to be rid of it."""

import json
import os

import pytest

from graphwright.cli import main
from graphwright.runtime.cache import default_cache

PASSES = "slice-groups{memory_budget=50%}"


def run(capsys, *arguments):
    code = main(list(arguments))
    return code, *capsys.readouterr()


def as_json(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)


@pytest.fixture
def compiled(capsys):
    """What `compile` of a network leaves in the cache."""
    run(capsys, "compile", "dit:tiny", "--passes", PASSES)


def test_what_was_compiled_is_a_hit(capsys, compiled):
    code, out, _ = run(capsys, "cache", "explain", "dit:tiny", "--passes", PASSES)
    assert (code, out) == (0, "hit: what these passes make of this model is kept\n")
    code, data = as_json(capsys, "cache", "explain", "dit:tiny", "--passes", PASSES)
    assert code == 0 and data["found"] and data["differing"] == {} and data["key"]["passes"].endswith(PASSES)


def test_a_miss_names_the_part_that_differs_and_both_values(capsys, compiled):
    code, out, _ = run(capsys, "cache", "explain", "dit:tiny", "--passes", "slice-groups{memory_budget=40%}")
    first, line = out.splitlines()
    assert code == 1
    assert first.startswith("miss: the nearest entry, last used ") and first.endswith(", differs in passes")
    there, here = line.split(" there, ")
    assert there.startswith("  passes: ") and there.endswith("slice-groups{memory_budget=50%}")
    assert here.endswith("slice-groups{memory_budget=40%} here")


def test_a_miss_by_weights_or_by_program_says_so(capsys, compiled):
    code, data = as_json(capsys, "cache", "explain", "vit:tiny", "--passes", PASSES)
    assert code == 1 and not data["found"] and set(data["differing"]) == {"program", "weights"}
    assert data["nearest"]["kind"] == "passes"


def test_a_miss_in_an_empty_cache_says_so(capsys):
    assert run(capsys, "cache", "explain", "dit:tiny")[:2] == (1, "miss: nothing that passes made is kept\n")


def test_a_damaged_entry_is_a_miss_that_says_so(capsys, compiled):
    (path,) = (default_cache().folder / "passes").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, out, _ = run(capsys, "cache", "explain", "dit:tiny", "--passes", PASSES)
    assert (code, out) == (1, "miss: the entry is damaged, and compiling writes it anew\n")


def test_passes_of_others_are_said_never_to_be_kept(capsys, tmp_path, monkeypatch):
    (tmp_path / "own_cache_pass.py").write_text(
        "import graphwright as gw\nfrom graphwright.passes import Outcome\n"
        "class Own(gw.Pass):\n    name, contract = 'own', gw.Contract.EXACT\n    def run(self, rewriter):\n        return Outcome()\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "cache", "explain", "dit:tiny", "--passes", "own_cache_pass:Own")
    assert (code, out) == (1, "never kept: pass own is none of graphwright's own, and what it depends on is not known\n")


@pytest.mark.parametrize(
    ("passes", "takes"),
    [
        ("quantize", "quantize takes calibration, an option that is"),
        ("absorb-outliers", "absorb-outliers takes calibration and resume, options that are"),
    ],
)
def test_an_option_that_is_no_plain_data_is_named_with_its_pass(capsys, passes, takes):
    code, out, _ = run(capsys, "cache", "explain", "dit:tiny", "--passes", passes)
    assert (code, out) == (1, f"never kept: pass {takes} no plain data\n")


def test_explaining_keeps_nothing(capsys):
    run(capsys, "cache", "explain", "dit:tiny", "--passes", PASSES)
    assert default_cache().entries() == []


def test_entries_are_listed_with_kind_size_and_what_they_are_of(capsys, compiled):
    code, out, _ = run(capsys, "cache", "list")
    head, header, *rows = out.splitlines()
    assert code == 0 and head.startswith(f"{default_cache().folder}: {len(rows)} entries, ") and head.endswith(" of at most 1.00 GiB")
    assert header.split() == ["kind", "size", "last", "used", "of"]
    assert any(row.startswith("passes") and PASSES in row for row in rows)
    code, data = as_json(capsys, "cache", "list")
    assert data["problem"] is None and len(data["entries"]) == len(rows)
    assert {"kind", "key", "bytes", "used"} == set(data["entries"][0])


def test_a_cache_that_is_not_trusted_says_why(capsys, compiled):
    os.chmod(default_cache().folder, 0o777)
    os.chmod(default_cache().folder / "passes", 0o777)
    for arguments in (("list",), ("explain", "dit:tiny", "--passes", PASSES)):
        _, out, _ = run(capsys, "cache", *arguments)
        assert f"this cache is not used: {default_cache().folder} can be written by others" in out


def test_entries_are_removed_all_or_of_one_kind(capsys, compiled):
    default_cache().put("tuning", {"question": "tiles"}, b"16")
    assert run(capsys, "cache", "clear", "tuning")[:2] == (0, f"{default_cache().folder}: removed 1 entry of kind tuning\n")
    left = len(default_cache().entries())
    assert left and as_json(capsys, "cache", "clear") == (0, {"removed": left})
    assert default_cache().entries() == []


def test_a_mistake_is_one_line(capsys):
    code, out, err = run(capsys, "cache")
    assert code == 2 and out == "" and err.count("\n") == 1 and "ACTION" in err
    code, _, err = run(capsys, "cache", "explain", "dit:tiny", "--passes", "slice-group")
    assert code == 2 and "did you mean slice-groups" in err


def test_a_kind_that_is_not_kept_is_named_with_those_that_are(capsys):
    default_cache().put("tuning", {"kernel": "x"}, b"tile")
    assert run(capsys, "cache", "clear", "probe")[:2] == (0, f"{default_cache().folder}: removed 0 entries of kind probe\n")
    code, _, error = run(capsys, "cache", "clear", "tunning")
    assert code != 0 and "has no entries of kind tunning: there are" in error and "tuning" in error
