"""Passes as objects and as text: options, spelling, syntax errors, order, and passes of other packages."""

import math
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir import Rewriter
from graphwright.ir.errors import PassError
from graphwright.passes import CLEANUPS, Contract, FoldConstants, Outcome, Pass, all_passes, parse_pipeline, pass_named, registry, spell
from graphwright.passes.options import at_least, between, is_share, is_size, one_of, option, share, size_in_bytes
from graphwright.passes.pipeline import check_order


@dataclass(frozen=True)
class Example(Pass):
    name = "example"
    contract = Contract.EXACT

    rank: int = option(32, "an integer of at least 1", at_least(1))
    budget: Any = option("25%", "a share or a size", lambda value: is_share(value) or is_size(value))
    rate: float = option(0.5, "a number in [0, 1]", between(0.0, 1.0))
    mode: str = option("fast", "fast or slow", one_of(("fast", "slow")))
    anything: Any = option(None, "anything", lambda value: True)

    def run(self, rewriter: Rewriter) -> Outcome:
        return Outcome()


@dataclass(frozen=True)
class Early(Pass):
    name = "early"
    contract = Contract.BOUNDED
    before = frozenset({"example"})

    def run(self, rewriter: Rewriter) -> Outcome:
        return Outcome()


@dataclass(frozen=True)
class Late(Pass):
    name = "late"
    contract = Contract.SUBSTITUTION
    after = frozenset({"example"})

    def run(self, rewriter: Rewriter) -> Outcome:
        return Outcome()


@dataclass(frozen=True)
class AlsoEarly(Early):
    name = "also-early"
    after = frozenset({"late"})


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (Example, Early, Late, AlsoEarly):
        monkeypatch.setitem(registry.BUILT_IN, each.name, each)


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "pass example: option rank is 0, but must be an integer of at least 1"),
        ({"rank": 1.5}, "pass example: option rank is 1.5, but must be an integer of at least 1"),
        ({"rank": True}, "pass example: option rank is True, but must be an integer of at least 1"),
        ({"rate": 2}, r"pass example: option rate is 2, but must be a number in \[0, 1\]"),
        ({"mode": "medium"}, "pass example: option mode is 'medium', but must be fast or slow"),
        ({"budget": "25"}, "pass example: option budget is '25', but must be a share or a size"),
        ({"ranks": 3}, "pass example has no option ranks: its options are rank, budget, rate, mode, anything"),
    ],
)
def test_a_bad_option_names_the_pass_the_option_and_what_is_legal(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Example(**options)


def test_too_many_options_are_an_error_of_the_pass() -> None:
    with pytest.raises(PassError, match="pass early takes 0 options, not 1: it has no options"):
        Early(3)  # type: ignore[call-arg]


def test_a_pass_without_a_kebab_case_name_cannot_be_declared() -> None:
    with pytest.raises(PassError, match="names are kebab-case"):
        type("Misnamed", (Pass,), {"name": "MisNamed"})


def test_passes_are_values_and_lists_in_options_become_tuples() -> None:
    assert Example(anything=[1, 2]) == Example(anything=(1, 2)) and hash(Example()) == hash(Example())
    assert replace(Example(), rank=4).rank == 4


@pytest.mark.parametrize(
    ("text", "nbytes"), [("512B", 512), ("1KiB", 1024), ("1.5MiB", 3 * 2**19), ("2GiB", 2**31), ("1MB", 10**6), (7, 7)]
)
def test_a_size_is_in_bytes(text: int | str, nbytes: int) -> None:
    assert is_size(text) and size_in_bytes(text) == nbytes


def test_a_share_is_a_fraction_and_neither_is_taken_for_the_other() -> None:
    assert share("12.5%") == 0.125
    with pytest.raises(PassError, match="'2GiB' is not a percentage"):
        share("2GiB")
    with pytest.raises(PassError, match="'25%' is not a size"):
        size_in_bytes("25%")


# --- pipelines ---


def test_the_list_and_the_text_of_a_pipeline_are_one_thing() -> None:
    text = 'example{rank=16, budget=2GiB, rate=1e-3, mode=slow, anything=[1, "a b", none, -inf, [true]]},late'
    listed = [Example(16, "2GiB", 0.001, "slow", (1, "a b", None, -math.inf, (True,))), "late"]
    assert parse_pipeline(text) == parse_pipeline(listed)
    assert parse_pipeline(["early,example", Late()]) == parse_pipeline("early,example,late")
    assert parse_pipeline(Example()) == (Example(),) and parse_pipeline("") == parse_pipeline([]) == ()


def test_only_options_that_are_not_at_their_default_are_spelled() -> None:
    assert spell([Example(), Example(rank=8, budget="10%"), Late()]) == "example,example{rank=8,budget=10%},late"


_plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from(["25%", "2GiB", "true", "inf", "1e5"]),
)


@given(st.recursive(_plain, lambda items: st.lists(items, max_size=3).map(tuple), max_leaves=6))
def test_every_plain_value_survives_being_spelled(value: Any) -> None:
    original = Example(anything=value)
    (again,) = parse_pipeline(spell([original]))
    assert again == original and repr(again) == repr(original)  # repr keeps 1, 1.0 and true, and both zeros, apart


def test_an_option_that_is_no_plain_data_cannot_be_spelled() -> None:
    with pytest.raises(PassError, match="a object cannot be written in a pipeline's text: give the pass as an object"):
        spell([Example(anything=object())])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exampel", r"no pass is called exampel: did you mean example\? \(column 1 "),
        ("late,fold-constant", r"no pass is called fold-constant: did you mean fold-constants\? \(column 6 "),
        (
            "zzz",
            "no pass is called zzz: known are absorb-outliers, also-early, append-lora, early, example, expert-choice, fold-batch-norm",
        ),
        ("example{rnk=3}", "pass example has no option rnk: its options are rank"),
        ("late,example{rank=0}", r"option rank is 0, but must be an integer of at least 1 \(column 6 "),
        ("example{rank=}", r"a value was expected, not '}' \(column 14 "),
        ("example{rank 3}", r"'=' was expected, not '3' \(column 14 "),
        ("example{rank=3", r"',' was expected, not the end \(column 15 "),
        ("example late", r"',' was expected, not 'l' \(column 9 "),
        ("example,,late", r"the name of a pass was expected, not ',' \(column 9 "),
        ("example{rank=3,rank=4}", r"option rank is given twice"),
        ("example{3=4}", r"the name of an option was expected, not '3' \(column 9 "),
        ("example{anything=[1 2]}", r"',' was expected, not '2' \(column 21 "),
        (r'example{anything="\x"}', r"this is no string \(column 18 "),
        ("example{anything=" + "9" * 5000 + "}", "this is no integer"),
        ("example{anything=" + "[" * 100, "lists are nested more than 16 deep"),
    ],
)
def test_a_mistake_in_a_pipeline_says_what_where_and_what_to_do(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        parse_pipeline(text)


def test_a_class_in_a_list_is_told_apart_from_a_pass() -> None:
    with pytest.raises(PassError, match=r"not the class Example: write Example\(\)"):
        parse_pipeline([Example])  # type: ignore[list-item]


# --- order ---


def test_an_order_that_breaks_a_constraint_names_both_passes_and_suggests_one_that_does_not() -> None:
    with pytest.raises(PassError, match="pass example must stand before pass late: write early,example{rank=4},late"):
        check_order(parse_pipeline("early,late,example{rank=4}"))
    with pytest.raises(PassError, match="pass early must stand before pass example: write early,example"):
        check_order(parse_pipeline("example,early"))


def test_constraints_bind_only_passes_that_are_there() -> None:
    check_order(parse_pipeline("late,early"))
    check_order(parse_pipeline("example,example"))


def test_constraints_that_contradict_each_other_are_told() -> None:
    with pytest.raises(PassError, match="no order of these passes satisfies all of them"):
        check_order(parse_pipeline("example,late,also-early"))


# --- the registry ---


def entries(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    found = [EntryPoint(name.replace("_", "-"), value, registry.GROUP) for name, value in values.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: found if group == registry.GROUP else [])


def test_a_pass_of_another_package_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, broken="no.such.module:Pass", cleaner="graphwright.passes:FoldConstants")
    assert pass_named("fold-constants") is FoldConstants  # a name of ours loads no entry point
    with pytest.raises(PassError, match="pass broken of package .* fails to import: ModuleNotFoundError: No module named 'no'"):
        pass_named("broken")
    with pytest.raises(PassError, match="entry point cleaner .* holds a pass named fold-constants"):
        pass_named("cleaner")


def test_an_entry_point_that_is_no_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, contract="graphwright.passes:Contract")
    with pytest.raises(PassError, match="is not a subclass of graphwright's Pass"):
        all_passes()


def test_all_passes_lists_ours_by_name() -> None:
    listed = all_passes()
    assert list(listed) == sorted(listed) and {each.name for each in CLEANUPS} <= set(listed)


# --- contracts ---


def test_contracts_are_ordered_by_strength() -> None:
    assert Contract.POLICY < Contract.SUBSTITUTION < Contract.BOUNDED < Contract.EXACT
    assert Contract.weakest([Contract.EXACT, Contract.BOUNDED]) is Contract.BOUNDED
    assert Contract.weakest([]) is Contract.EXACT


def test_each_contract_promises_one_sentence() -> None:
    assert all(contract.promise.endswith(".") and contract.promise.count(".") == 1 for contract in Contract)
