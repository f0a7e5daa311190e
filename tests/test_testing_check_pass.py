"""`check_pass`: right passes pass, each planted fault is caught and shrunk to a few calls, and the printed test reproduces it."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from graphwright.ir import Rewriter, parse
from graphwright.ir.errors import PassError
from graphwright.passes import CLEANUPS, Contract, Outcome, Pass, RemoveNoOps, Smooth
from graphwright.testing import check_pass
from graphwright.testing.cases import packed, unpacked

aten = torch.ops.aten
check_pass_module = sys.modules[check_pass.__module__]
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Replacing(Pass):
    """Base of passes that put something in the place of each call of `target` for which `new` gives one."""

    contract = Contract.EXACT
    target = None

    def new(self, rewriter: Rewriter, node):
        raise NotImplementedError

    def run(self, rewriter: Rewriter) -> Outcome:
        for node in list(rewriter.nodes()):
            if node.target is self.target:
                with rewriter.step("replace"):
                    made = self.new(rewriter, node)
                    if made is not None:
                        rewriter.replace(node, made)
        return Outcome()

    def call(self, rewriter: Rewriter, node, target, *args, **kwargs):
        return rewriter.insert(target, args, kwargs, before=node, origin=node)


@dataclass(frozen=True)
class SquareByProduct(Replacing):
    """Right: pow(x, 2) and square(x) -> x * x"""

    name = "square-by-product"
    target = aten.square.default

    def new(self, rewriter, node):
        return self.call(rewriter, node, aten.mul.Tensor, node.args[0], node.args[0])


@dataclass(frozen=True)
class DroppedBias(Replacing):
    name = "dropped-bias"
    target = aten.linear.default

    def new(self, rewriter, node):
        return self.call(rewriter, node, node.target, *node.args[:2]) if len(node.args) > 2 else None


@dataclass(frozen=True)
class SwappedSub(Replacing):
    name = "swapped-sub"
    target = aten.sub.Tensor

    def new(self, rewriter, node):
        x, y = node.args[:2]
        return self.call(rewriter, node, node.target, y, x) if isinstance(y, torch.fx.Node) and not node.kwargs else None


@dataclass(frozen=True)
class OffByOneSlice(Replacing):
    """Takes the elements one place further where there are enough."""

    name = "off-by-one-slice"
    target = aten.narrow.default

    def new(self, rewriter, node):
        x, dim, start, length = node.args
        if start + length >= x.meta["val"].size(dim):
            return None
        return self.call(rewriter, node, node.target, x, dim, start + 1, length)


@dataclass(frozen=True)
class StaleShape(Replacing):
    """Writes the size at capture where a symbol stood."""

    name = "stale-shape"
    target = aten.arange.default

    def new(self, rewriter, node):
        (size,) = node.meta["val"].shape
        return None if isinstance(size, int) else self.call(rewriter, node, node.target, size.node.hint)


@dataclass(frozen=True)
class WrongBroadcast(Replacing):
    """Multiplies by the transposed matrix where the shape allows it."""

    name = "wrong-broadcast"
    target = aten.mul.Tensor

    def new(self, rewriter, node):
        x, y = node.args
        if not isinstance(y, torch.fx.Node) or y.meta["val"].dim() != 1 or x.meta["val"].dim() < 2:
            return None
        rows, columns = x.meta["val"].shape[-2:]
        if rows != columns or y.meta["val"].size(0) != rows or rows == 1:
            return None
        return self.call(rewriter, node, node.target, x, self.call(rewriter, node, aten.unsqueeze.default, y, 1))


@dataclass(frozen=True)
class SmallError(Replacing):
    """Within what comparisons of float32 allow."""

    name = "small-error"
    target = aten.sigmoid.default

    def new(self, rewriter, node):
        return self.call(rewriter, node, aten.mul.Scalar, self.call(rewriter, node, node.target, *node.args), 1 + 1e-9)


@dataclass(frozen=True)
class LostPrecision(Replacing):
    """Right in real arithmetic: what float64 cannot see."""

    name = "lost-precision"
    target = aten.sigmoid.default

    def new(self, rewriter, node):
        if node.meta["val"].dtype != torch.float32:
            return None
        narrow = self.call(rewriter, node, aten._to_copy.default, node.args[0], dtype=torch.bfloat16)
        return self.call(rewriter, node, aten._to_copy.default, self.call(rewriter, node, node.target, narrow), dtype=torch.float32)


@dataclass(frozen=True)
class SharedOutput(Replacing):
    """Drops copies that callers receive."""

    name = "shared-output"
    target = aten.clone.default

    def new(self, rewriter, node):
        return node.args[0] if node.kwargs == {} and node.args[0].meta["val"].stride() == node.meta["val"].stride() else None


@dataclass(frozen=True)
class Crashing(Replacing):
    name = "crashing"
    target = aten.relu.default

    def new(self, rewriter, node):
        return node.missing


def test_a_right_pass_passes() -> None:
    check_pass(SquareByProduct(), ops=["aten.square.default", "elementwise"], examples=40)


def test_our_own_clean_up_passes_and_so_does_one_that_calibrates() -> None:
    check_pass(RemoveNoOps(), ops=["shapes", "motifs"], examples=30)
    check_pass(Smooth(min_numel=0, calibration=()), ops=["products"], examples=15)


FAULTS = {
    DroppedBias(): ["products"],
    SwappedSub(): ["aten.sub.Tensor", "elementwise"],
    OffByOneSlice(): ["aten.narrow.default"],
    StaleShape(): ["sizes"],
    SmallError(): ["aten.sigmoid.default", "elementwise"],
    LostPrecision(): ["aten.sigmoid.default", "elementwise"],
    SharedOutput(): ["aten.clone.default", "elementwise"],
    Crashing(): ["aten.relu.default", "elementwise"],
}


@pytest.mark.parametrize("each", FAULTS, ids=lambda each: each.name)
def test_a_planted_fault_is_caught_and_shrunk(each: Pass) -> None:
    with pytest.raises(AssertionError) as caught:
        check_pass(each, ops=FAULTS[each], examples=300, max_nodes=4)
    story = str(caught.value)
    assert story.startswith(f"{each.name} is not exact: ")
    program = story.partition("the smallest program that was found:\n\n")[2].partition("\n}")[0] + "\n}\n"
    assert len(parse(program).main.calls) <= 3, story


def test_the_kind_of_fault_is_said() -> None:
    def story(each: Pass) -> str:
        with pytest.raises(AssertionError) as caught:
            check_pass(each, ops=FAULTS[each], examples=300, max_nodes=4)
        return str(caught.value)

    assert "is not exact: wrong: off by 1.0e-09 of the output's scale in float64" in story(SmallError())
    assert re.search(r"is not exact: unstable: \d", story(LostPrecision()))
    assert "is not exact: crashed: PassError" in story(Crashing()) and "AttributeError" in story(Crashing())


def test_the_printed_test_fails_with_the_pass_and_passes_without_the_fault(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        check_pass(SwappedSub(), ops=FAULTS[SwappedSub()], max_nodes=4)
    test = str(caught.value).partition("a test that reproduces it:\n\n")[2]
    assert "from graphwright.tests.test_testing_check_pass import SwappedSub" in test or "import SwappedSub" in test
    test = re.sub(r"from \S+ import SwappedSub", "from planted import SwappedSub", test)
    source = Path(__file__).read_text().partition("def test_a_right_pass_passes")[0]
    swapped = "self.call(rewriter, node, node.target, y, x)"
    for mended, code in ((swapped, 1), (f"self.call(rewriter, node, aten.neg.default, {swapped})", 0)):
        (tmp_path / "planted.py").write_text(source.replace(swapped, mended))
        (tmp_path / "test_printed.py").write_text(test)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_printed.py")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr


def test_the_printed_test_holds_large_weights_and_gives_one_tensor_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.linspace(0, 1, 4000).view(40, 100).t(), torch.linspace(-1, 1, 40)
    text = (
        'graphwright 1\nweight @w : f32[100, 40] strides [1, 100] parameter "?"\nfunction main {\n  takes ((*, *), {})\n  gives *\n  input %x : f32[40]\n'
        "  input %y : f32[40]\n  %0 = aten.mul.Tensor(%x, %y)\n  %1 = aten.add.Tensor(@w, %0)\n  %2 = aten.sigmoid.default(%1)\n  return %2\n}\n"
    )
    monkeypatch.setattr(check_pass_module, "input_sets", lambda program, number: [[x, x]])
    with pytest.raises(AssertionError) as caught:
        check_pass(SmallError(), programs=st.just(parse(text, weights={"w": weight})), examples=1)
    test = str(caught.value).partition("a test that reproduces it:\n\n")[2]
    assert "[[x0, x0]]" in test
    names: dict[str, Any] = {}
    exec(test, names)
    with pytest.raises(AssertionError, match="wrong: off by 1.0e-09"):
        names["test_small_error_keeps_its_contract"]()
    assert torch.equal(unpacked(packed(weight)), weight)


def test_equal_seeds_find_the_same_program() -> None:
    stories = []
    for _ in range(2):
        with pytest.raises(AssertionError) as caught:
            check_pass(SwappedSub(), ops=["aten.sub.Tensor"], max_nodes=3, seed=3)
        stories.append(str(caught.value))
    assert stories[0] == stories[1]


def test_a_pass_that_changes_nothing_was_not_tested() -> None:
    with pytest.raises(AssertionError, match="square-by-product changed none of 40 programs, so nothing was tested: name operations"):
        check_pass(SquareByProduct(), ops=["creation"], examples=10)


TRIED: list[bool] = []


@dataclass(frozen=True)
class ChangesOne(Pass):
    """relu(x) -> clamp_min(x, 0), in the first program that has one."""

    name, contract = "changes-one", Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        found = next((node for node in rewriter.nodes() if node.target is aten.relu.default), None)
        if found is not None and not any(TRIED):
            with rewriter.step("clamp"):
                rewriter.replace(found, rewriter.insert(aten.clamp_min.default, (found.args[0], 0), before=found, origin=found))
        TRIED.append(found is not None)
        return Outcome()


def test_one_program_that_a_pass_changed_is_not_enough() -> None:
    TRIED.clear()
    with pytest.warns(UserWarning, match=r"changes-one changed 1 of \d+ programs, few to be sure of: name operations"):
        check_pass(ChangesOne(), ops=["aten.relu.default"], max_nodes=2, examples=10)
    assert len(TRIED) > 20


@dataclass(frozen=True)
class Refusing(Pass):
    name, contract = "refusing", Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        raise PassError("pass refusing takes decoders alone")


def test_refusals_are_no_failures_and_are_told_where_nothing_else_happened() -> None:
    with pytest.raises(AssertionError, match="it refused: PassError: pass refusing takes decoders alone"):
        check_pass(Refusing(), examples=5)


@dataclass(frozen=True)
class Unmeasured(SquareByProduct):
    name, contract = "unmeasured", Contract.BOUNDED


def test_a_bounded_pass_needs_a_measure_of_its_own() -> None:
    with pytest.raises(AssertionError, match="unmeasured is not bounded: unmeasured: nothing holds unmeasured to its contract"):
        check_pass(Unmeasured(), ops=["aten.square.default"], examples=20)


def scaled_rows(rows: int, columns: int):
    """A matrix times a row."""
    inputs = f"  input %x : f32[{rows}, {columns}]\n  input %y : f32[{columns}]\n"
    body = "  %0 = aten.mul.Tensor(%x, %y)\n  return %0\n"
    return parse("graphwright 1\nfunction main {\n  takes ((*, *), {})\n  gives *\n" + inputs + body + "}\n")


def test_programs_may_be_ones_own_such_as_those_on_which_a_wrong_broadcast_type_checks() -> None:
    with pytest.raises(AssertionError, match="wrong-broadcast is not exact: wrong") as caught:
        check_pass(WrongBroadcast(), programs=st.builds(scaled_rows, st.integers(2, 6), st.integers(2, 6)), examples=50)
    assert "input %x : f32[2, 2]" in str(caught.value)


def test_every_clean_up_is_checked_somewhere() -> None:
    for each in CLEANUPS:
        ops = {"remove-proven-assertions": ["sizes"], "remove-dead-code": ["elementwise", "shapes"]}.get(
            each.name, ["motifs", "elementwise"]
        )
        check_pass(each, ops=ops, examples=15, max_nodes=6)
