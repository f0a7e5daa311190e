"""Trials by number, the runs that hold them, the files of a failure, and random pipelines."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphwright.ir import parse
from graphwright.ir.errors import ArtifactError
from graphwright.passes import CLEANUPS, FoldConstants, SliceGroups, parse_pipeline
from graphwright.passes.pipeline import check_order
from graphwright.testing import fuzz, pipelines, programs
from graphwright.testing.cases import Case, load_case, save_case, spelled
from graphwright.testing.choices import RandomChoices
from graphwright.testing.coverage import exact_rules, rule_counts
from graphwright.testing.pipelines import EXACT, random_pipeline
from graphwright.testing.themes import THEMES
from graphwright.testing.trials import Record, make_trial, record_of, run_trial, themed_trial
from graphwright.testing.verdict import try_passes

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(max_examples=20, suppress_health_check=list(HealthCheck), derandomize=True)


# --- pipelines ---


@given(st.data())
@few
def test_a_pipeline_keeps_the_order_that_its_passes_ask_for_and_spells_back(data) -> None:
    program = data.draw(programs(max_nodes=3))
    passes = data.draw(pipelines(program))
    check_order(passes)
    assert [type(each) for each in parse_pipeline(spelled(passes))] == [type(each) for each in passes]


def test_pipelines_repeat_passes_and_take_options_to_their_ends() -> None:
    drawn = [random_pipeline(RandomChoices(random.Random(seed))) for seed in range(200)]
    assert any(len({each.name for each in passes}) < len(passes) for passes in drawn)
    flat = [each for passes in drawn for each in passes]
    assert {each.limit for each in flat if isinstance(each, FoldConstants)} == {"16MiB", 0, "1KiB"}
    assert {each.max_slices for each in flat if isinstance(each, SliceGroups)} == {64, 2, 7, 1}


def test_without_a_program_passes_that_calibrate_are_left_out() -> None:
    names = {each.name for seed in range(60) for each in random_pipeline(RandomChoices(random.Random(seed)))}
    assert names == {each.name for each in EXACT} - {"smooth"}


def test_pipelines_of_given_passes_hold_these_alone() -> None:
    drawn = {each.name for seed in range(30) for each in random_pipeline(RandomChoices(random.Random(seed)), passes=CLEANUPS[:2])}
    assert drawn == {each.name for each in CLEANUPS[:2]}


# --- trials ---


def test_a_trial_is_the_same_each_time_and_alone() -> None:
    for number in (0, 7, 3):
        one, two = make_trial(5, number), make_trial(5, number)
        assert str(one.program) == str(two.program) and spelled(one.passes) == spelled(two.passes)
        assert str(one.inputs) == str(two.inputs)
    assert str(make_trial(6, 3).program) != str(make_trial(5, 3).program)


def test_no_exact_pipeline_changes_a_program() -> None:
    """A small run with a fixed seed; `make fuzz` is the long one."""
    records = [run_trial(20, number, max_nodes=8) for number in range(40)]
    assert [record for record in records if record.kind in fuzz.FAILING] == []
    assert sum(record.kind == "inconclusive" for record in records) <= 2
    assert sum(sum(record.fired.values()) for record in records) >= 10


def test_what_goes_wrong_while_a_trial_is_made_is_a_crash_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_, **__):
        raise RuntimeError("no luck")

    monkeypatch.setattr("graphwright.testing.trials.make_trial", broken)
    record = run_trial(0, 1)
    assert (record.kind, record.reason) == ("crashed", "RuntimeError: no luck")


def test_a_trial_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_, **__):
        while True:
            pass

    monkeypatch.setattr("graphwright.testing.trials.MAX_SECONDS", 1)
    monkeypatch.setattr("graphwright.testing.trials.make_trial", endless)
    assert run_trial(0, 1).kind == "timeout"


# --- runs ---


def test_a_run_goes_on_where_it_was_and_its_records_are_those_of_one_run(tmp_path: Path) -> None:
    whole = [run_trial(3, number, max_nodes=3) for number in range(4)]
    fuzz.fuzz(3, 2, tmp_path / "parts", max_nodes=3)
    results = tmp_path / "parts" / "results.jsonl"
    results.write_text(results.read_text()[:-20])  # killed while it wrote
    parts = fuzz.fuzz(3, 4, tmp_path / "parts", max_nodes=3)
    timeless = [[{**record.as_json(), "seconds": 0} for record in records] for records in (whole, parts)]
    assert timeless[0] == timeless[1] and len(parts) == 4
    assert len(results.read_text().splitlines()) == 4


def test_a_file_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"number": 1}\n{"number": 1, "kind": "right"}\n')
    with pytest.raises(ArtifactError, match=r"results.jsonl:1 is no record of a fuzzing run"):
        fuzz.fuzz(0, 1, tmp_path)


def test_what_is_asked_for_by_mistake_is_one_line_and_no_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--ops", "elementwise,nosuch", "--programs", "3", "--out", str(tmp_path / "run")]) == 2
    (tmp_path / "results.jsonl").write_text("no record\n")
    assert fuzz.main(["--programs", "3", "--out", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("fuzz: nosuch is neither an operation") and "is no record of a fuzzing run" in second
    assert not (tmp_path / "run" / "results.jsonl").exists()


@pytest.mark.parametrize("asked", [["--jobs", "0"], ["--programs", "-3"], ["--max-nodes", "0"], ["--only", "-1"], ["--out", __file__]])
def test_numbers_that_count_nothing_and_a_file_for_a_folder_are_one_line(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fuzz.main(["--programs", "1", "--out", str(tmp_path / "run"), *asked]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("fuzz: ") and asked[1] in said


def test_a_run_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fuzz, "fuzz", stopped)
    assert fuzz.main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == f"fuzz: stopped; what is in {tmp_path} stays, and the same command goes on from there\n"


@pytest.mark.parametrize("settings", [json.dumps({"seed": 1, "max_nodes": 12, "ops": ""}), "{"])
def test_another_run_does_not_mix_with_the_one_in_its_folder(settings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.json").write_text(settings)
    assert fuzz.main(["--seed", "2", "--out", str(tmp_path)]) == 2
    assert f"fuzz: {tmp_path} holds a run with {settings}: give another --out" in capsys.readouterr().err
    assert (tmp_path / "settings.json").read_text() == settings


def test_one_trial_is_shown_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--seed", "3", "--only", "1", "--max-nodes", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("graphwright 1") and '"kind": "right"' in shown


def test_the_summary_counts_verdicts_rules_and_reasons() -> None:
    records = [Record(0, "right", fired={"a/x": 2}, left={"a: no": 1}), Record(1, "refused", fired={"a/x": 1})]
    verdicts, rules, left = fuzz.summary(records)
    assert [list(column.cells) for column in verdicts.columns] == [["right", "refused"], ["1", "1"]]
    assert [next(column.cells) for column in rules.columns] == ["a/x", "3", "1"]
    assert [list(column.cells) for column in left.columns] == [["a: no"], ["1"]]


def test_a_rule_that_never_fired_is_shown_as_not_tested() -> None:
    rules = fuzz.summary([Record(0, "right", left={"smooth/fold-smoothing: no": 2})])[1]
    rows = list(zip(*(column.cells for column in rules.columns)))
    assert len(rows) == len(exact_rules()) and ("smooth/fold-smoothing", "0", "2") in rows
    assert rules.caption == "A rule at zero was not tested."


def test_of_the_reasons_of_one_rule_the_commonest_are_shown() -> None:
    left = fuzz.summary([Record(0, "right", left={"b: rare": 1, **{f"a: {'x' * n}": n for n in range(1, 11)}})])[2]
    rows = list(zip(*(column.cells for column in left.columns)))
    assert rows[0] == ("a: " + "x" * 10, "10") and rows[-2:] == [("a: 2 other reasons", "3"), ("b: rare", "1")]


# --- which rules were tested ---


def test_a_reason_of_one_rule_counts_for_it_and_one_of_a_pass_for_all_of_its_rules() -> None:
    records = [Record(0, "right", left={"smooth/fold-smoothing: a: b": 2, "smooth: no rows": 1}, fired={"smooth/multiply-by-smoothing": 4})]
    counts = {each.rule: (each.fired, each.refused) for each in rule_counts(records)}
    assert (counts["smooth/fold-smoothing"], counts["smooth/multiply-by-smoothing"]) == ((0, 3), (4, 1))
    assert counts["slice-groups/attention-rows"] == (0, 0)


def test_a_run_that_tested_a_rule_less_often_than_required_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(0, "right", fired=dict.fromkeys(exact_rules(), 2), left=dict.fromkeys((f"{rule}: no" for rule in exact_rules()), 3))
    record.fired["remove-no-ops/merge-views"] = 1
    monkeypatch.setattr(fuzz, "fuzz", lambda *_, **__: [record])
    assert [fuzz.main(["--out", str(tmp_path), *require]) for require in ([], ["--require", "1"], ["--require", "2"])] == [0, 0, 1]
    said = " ".join(capsys.readouterr().out.split())
    assert "remove-no-ops/merge-views fired 1 and was refused 3 times, and each is to be 2 at least" in said
    assert said.count("is to be") == 1


def test_every_rule_of_an_exact_pass_has_a_theme() -> None:
    assert {theme.name for theme in THEMES} == set(exact_rules())


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_a_theme_has_its_rule_fire_and_its_near_miss_is_refused(theme) -> None:
    """Both within thirty trials, and nothing but rules that passes declare fires."""
    seen = {"fired": False, "refused": False}
    for seed in range(30):
        trial = themed_trial(RandomChoices(random.Random(f"{theme.name}/{seed}")), theme, max_nodes=4)
        record = record_of(seed, trial, try_passes(trial.program, trial.passes, trial.inputs[:1]), 0.0)
        assert record.kind not in fuzz.FAILING, (record, str(trial.program))
        assert record.fired.keys() <= set(exact_rules())
        count = next(each for each in rule_counts([record]) if each.rule == theme.name)
        seen = {"fired": seen["fired"] or count.fired > 0, "refused": seen["refused"] or count.refused > 0}
        if all(seen.values()):
            return
    pytest.fail(f"{theme.name}: {seen}")


# --- cases ---


def test_a_case_comes_back_as_it_was_strides_shared_inputs_and_calibration_included(tmp_path: Path) -> None:
    program = parse(
        """graphwright 1
weight @w : f32[4, 6] strides [1, 4] parameter "?"
function main {
  takes ((*, *, *), {})
  gives *
  input %x : f32[3, 6] strides [0, 1]
  input %y : f32[3, 6]
  input %z : f32[3, 6]
  %a = aten.add.Tensor(%x, %y)
  %b = aten.add.Tensor(%a, %z)
  %c = aten.linear.default(%b, @w)
  return %c
}""",
        weights={"w": torch.randn(6, 4).T},
    )
    x, y = torch.randn(6).expand(3, 6), torch.randn(3, 6)
    case = Case(program, "smooth{alpha=1.0,min_numel=0,calibration=[]},remove-no-ops", ([x, y, y], [x, y, x + y]), "why")
    save_case(tmp_path / "case", case, "wrong")
    again = load_case(tmp_path / "case")
    assert again.program == program and again.program.weights["w"].tensor.stride() == (1, 4)
    assert again.inputs[0][1] is again.inputs[0][2] and again.inputs[0][0].stride() == (0, 1)
    assert all(torch.equal(a, b) for before, after in zip(case.inputs, again.inputs) for a, b in zip(before, after))
    assert spelled(again.passes()) == case.pipeline and len(again.passes()[0].calibration) == 2
    assert again.run().verdict.kind == "right"


def test_a_folder_that_holds_no_case_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no case of graphwright.testing"):
        load_case(tmp_path)
