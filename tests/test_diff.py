"""The difference of two programs: calls beside the ones they came from, whatever their numbers and whichever region they are in."""

import re

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.diff import compare
from graphwright.passes import PassManager

LEGEND = "(values in - lines and after `was` are numbered as in the first program, all others as in the second)"


class Geglu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(8, 64), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return x + self.out(hidden * nn.functional.gelu(gate))


class Norms(nn.Module):
    """Convolutions with batch norms, to fold, and a dropout, to remove."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.drop(self.norm(self.conv(x)))).sum(0)


class Chain(nn.Module):
    """Linear layers, one after the other; `extra` stands before them."""

    def __init__(self, *extra: nn.Module) -> None:
        super().__init__()
        self.extra = nn.Sequential(*extra)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.extra(x)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def captured(module: nn.Module, *args: torch.Tensor) -> gw.Program:
    torch.manual_seed(0)
    return gw.capture(module.eval(), args, {})


def rewritten(program: gw.Program, passes: str) -> gw.Program:
    return PassManager(passes).run(program).program


def body(text: str) -> list[str]:
    """The changed lines inside functions, without the user's lines."""
    lines = [line for line in text.splitlines()[2:] if line[0] in "-+<>~" and " weight " not in line and "pipeline" not in line]
    return [re.sub(r"( # \[[\d,.]+\]).*", r"\1", line) for line in lines if line[1:].strip()]


@pytest.fixture(scope="module")
def geglu() -> gw.Program:
    return captured(Geglu(), torch.randn(64, 8))


SLICED = """\
+   %12 = gw.sliced(..) out_dims=[0] count=8 : (f32[64, 8]) {  <region 0>  # [0,1,2,..]
+     input %0 : f32[8, 8]  <%x along dim 0>
+     input %1 : f32[64, 8]  <@proj.weight>
+     input %2 : f32[64]  <@proj.bias>
+     input %3 : f32[8, 32]  <@out.weight>
+     input %4 : f32[8]  <@out.bias>
>     %5 = aten.linear.default(%0, %1, %2) : f32[8, 64]  <was %0 : f32[64, 64]>  # [0]
>     %6 = aten.split.Tensor(%5, 32, -1) : (f32[8, 32] strides [64, 1], f32[8, 32] strides [64, 1])\
  <was %1 : (f32[64, 32] strides [64, 1], f32[64, 32] strides [64, 1])>  # [1]
>     %7 = getitem(%6, 0) : f32[8, 32] strides [64, 1]  <was %2 : f32[64, 32] strides [64, 1]>  # [2]
>     %8 = getitem(%6, 1) : f32[8, 32] strides [64, 1]  <was %3 : f32[64, 32] strides [64, 1]>  # [3]
>     %9 = aten.gelu.default(%8) : f32[8, 32]  <was %4 : f32[64, 32]>  # [4]
>     %10 = aten.mul.Tensor(%7, %9) : f32[8, 32]  <was %5 : f32[64, 32]>  # [5]
>     %11 = aten.linear.default(%10, %3, %4) : f32[8, 8]  <was %6 : f32[64, 8]>  # [6]
+     return %11
+   }
+   %13 = getitem(%12, 0) : f32[64, 8]  # [6]
"""


def test_calls_that_moved_into_a_region_are_shown_there_once(geglu: gw.Program) -> None:
    text = gw.diff(geglu, rewritten(geglu, "slice-groups{memory_budget=25%}"))
    assert text.splitlines()[:2] == ["7 calls moved into 1 region", LEGEND]
    assert body(text) == SLICED.splitlines()


def test_calls_that_left_a_region_are_shown_where_they_are_now(geglu: gw.Program) -> None:
    text = gw.diff(rewritten(geglu, "slice-groups{memory_budget=25%}"), geglu)
    assert text.startswith("7 calls moved out of regions\n")
    assert "<   %0 = aten.linear.default(%x, @proj.weight, @proj.bias) : f32[64, 64]  <was %5 : f32[8, 64]>  # [0]" in body(text)
    assert "-     input %1 : f32[64, 8]  <@proj.weight>" in body(text)


def test_other_slices_of_a_region_are_a_change_of_the_region_and_its_inputs(geglu: gw.Program) -> None:
    first, second = (rewritten(geglu, f"slice-groups{{max_slices={count},memory_budget=25%}}") for count in (2, 4))
    summary, text = compare(first, second).summary, gw.diff(first, second)
    assert (summary.moved, summary.changed, summary.added, summary.removed) == (0, 0, 0, 0)
    assert text.startswith("no call or weight changed; ") and "count=2" in text and "count=4" in text
    assert "+     input %0 : f32[16, 8]" in body(text) and not any("gelu" in line for line in body(text))
    assert_whole(first, second)


def test_a_view_whose_sizes_became_those_of_a_slice_is_beside_its_original() -> None:
    module, args, kwargs = gw.models.load("dit", "tiny")
    history = PassManager("share-subexpressions,slice-groups{memory_budget=25%}").run(gw.capture(module, args, kwargs)).history
    difference = compare(history[0], history[-1])
    rows, summary = difference.rows, difference.summary
    views = [i for i, row in enumerate(rows) if row.marker == "-" and "view" in row.text]
    assert views and all("aten.reshape" in rows[i + 1].text and rows[i + 1].marker == "+" for i in views)
    origin = re.compile(r"# (\[\d+\]) ")
    assert all(origin.findall(rows[i].text) == origin.findall(rows[i + 1].text) for i in views)
    assert (len(views), 0) == (summary.moved_and_changed, summary.changed) and summary.moved > 50 and summary.reordered == 0
    assert gw.diff(history[0], history[-1]).count("\n") < 200  # of 389 lines in both
    copies = [row.text for row in rows if row.marker == "+" and "<again %" in row.text]
    assert len(copies) == summary.added and all("aten.split" in text for text in copies)
    assert_whole(history[0], history[-1])
    assert_whole(history[-1], history[0])


def test_what_was_folded_is_beside_what_it_was_folded_into() -> None:
    program = captured(Norms(), torch.randn(1, 3, 8, 8))
    text = gw.diff(program, rewritten(program, "remove-no-ops,fold-batch-norm"))
    assert text.splitlines()[0] == "3 calls removed, 1 changed; weights: 5 removed, 2 added"
    assert body(text) == [
        "-   %0 = aten.conv2d.default(%x, @conv.weight) : f32[1, 4, 6, 6]  # [0]",
        "+   %0 = aten.conv2d.default(%x, @conv.folded.weight, @conv.folded.bias, [1, 1], [0, 0], [1, 1], 1) : f32[1, 4, 6, 6]  # [0,1,2,3]",
        "-   %1 = aten._native_batch_norm_legit_no_training.default(%0, @norm.weight, @norm.bias, @norm.running_mean, @norm.running_var,"
        " 0.1, 1e-05) : (f32[1, 4, 6, 6], f32[0], f32[0])  # [1]",
        "-   %2 = getitem(%1, 0) : f32[1, 4, 6, 6]  # [2]",
        "-   %3 = aten.clone.default(%2) : f32[1, 4, 6, 6]  <now %0>  # [3]",
    ]


def parsed(*lines: str) -> gw.Program:
    """The function of one `%x : f32[4]` with these lines."""
    head = ["graphwright 1", "", "function main {", "  takes ((*), {})", "  gives *", "  input %x : f32[4]"]
    return gw.parse("\n".join([*head, *lines, "}", ""]))


def test_a_shared_call_says_what_is_read_now_and_its_readers_are_the_same() -> None:
    before = parsed(
        "  %0 = aten.relu.default(%x) : f32[4]  # [0] a.py:1",
        "  %1 = aten.relu.default(%x) : f32[4]  # [1] a.py:2",
        "  %2 = aten.add.Tensor(%0, %1) : f32[4]  # [2] a.py:3",
        "  return %2",
    )
    text = gw.diff(before, rewritten(before, "share-subexpressions"))
    assert text == "\n".join(
        [
            "1 call removed",
            LEGEND,
            "@@ -6,6 +6,7 @@",
            "    input %x : f32[4]",
            "    %0 = aten.relu.default(%x) : f32[4]  # [0,1] a.py:1",
            "-   %1 = aten.relu.default(%x) : f32[4]  <now %0>  # [1] a.py:2",
            "    %1 = aten.add.Tensor(%0, %0) : f32[4]  # [2] a.py:3",
            "    return %1",
            "  }",
            "+ ",
            '+ pipeline "share-subexpressions"',
            "",
        ]
    )


@pytest.mark.parametrize(
    ("second", "summary"),
    [
        ([("relu", "x", 0), ("exp", "x", 1), ("add", "1, %0", 2)], "1 call changed"),
        ([("relu", "x", 0), ("exp", "0", 1), ("add", "0, %1", 2)], "1 call changed"),
        ([("relu", "x", 0), ("sin", "x", 1), ("add", "0, %1", 2)], "1 call changed"),
        ([("exp", "x", 1), ("relu", "x", 0), ("add", "1, %0", 2)], "1 call reordered"),
        ([("relu", "x", 0), ("exp", "x", 1), ("neg", "1", 2), ("add", "0, %2", 2)], "1 call added, 1 changed"),
        ([("relu", "x", 0), ("exp", "x", 7), ("add", "0, %1", 2)], "1 call changed"),
    ],
    ids=["operands swapped", "another operand", "another operation", "reordered", "inserted", "another origin"],
)
def test_each_kind_of_change_is_counted_as_what_it_is(second: list[tuple[str, str, int]], summary: str) -> None:
    def program(calls: list[tuple[str, str, int]]) -> gw.Program:
        names = {"add": "aten.add.Tensor"}
        lines = [
            f"  %{i} = {names.get(op, f'aten.{op}.default')}(%{args}) : f32[4]  # [{origin}]" for i, (op, args, origin) in enumerate(calls)
        ]
        return parsed(*lines, f"  return %{len(calls) - 1}")

    first = program([("relu", "x", 0), ("exp", "x", 1), ("add", "0, %1", 2)])
    assert gw.diff(first, program(second)).splitlines()[0] == summary
    assert_whole(first, program(second))


def test_one_operation_spelled_by_several_is_followed_by_them() -> None:
    before = parsed("  %0 = aten.silu.default(%x) : f32[4]  # [0]", "  %1 = aten.neg.default(%0) : f32[4]  # [1]", "  return %1")
    after = parsed(
        "  %0 = aten.sigmoid.default(%x) : f32[4]  # [0]",
        "  %1 = aten.mul.Tensor(%x, %0) : f32[4]  # [0]",
        "  %2 = aten.neg.default(%1) : f32[4]  # [1]",
        "  return %2",
    )
    assert body(gw.diff(before, after)) == [
        "-   %0 = aten.silu.default(%x) : f32[4]  <now %1>  # [0]",
        "+   %0 = aten.sigmoid.default(%x) : f32[4]  # [0]",
        "+   %1 = aten.mul.Tensor(%x, %0) : f32[4]  # [0]",
    ]


def test_two_captures_are_aligned_by_what_they_say() -> None:
    x = torch.randn(2, 4)
    before, after = captured(Chain(), x), captured(Chain(nn.Tanh()), x)
    summary = compare(before, after).summary
    assert (summary.added, summary.removed) == (1, 0)
    assert "+   %0 = aten.tanh.default(%x) : f32[2, 4]  # [0]" in body(gw.diff(before, after))
    assert_whole(before, after)


def test_equal_programs_have_no_difference_and_others_always_have_one(geglu: gw.Program) -> None:
    sliced = rewritten(geglu, "slice-groups{memory_budget=25%}")
    for program in (geglu, sliced):
        assert gw.diff(program, program.copy()) == gw.diff(program, gw.parse(str(program))) == ""
    assert gw.diff(sliced, geglu) == gw.diff(sliced, geglu) != ""
    renamed = gw.parse(str(geglu).replace("test_diff.py:", "elsewhere.py:"))
    assert compare(geglu, renamed).summary.changed == 8


def test_colors_are_those_of_the_markers_and_only_when_asked(geglu: gw.Program) -> None:
    sliced = rewritten(geglu, "slice-groups{memory_budget=25%}")
    plain, colored = gw.diff(geglu, sliced), gw.diff(geglu, sliced, color=True)
    assert "\x1b" not in plain and re.sub(r"\x1b\[\d+m", "", colored) == plain
    assert {"\x1b[32m+", "\x1b[33m>", "\x1b[36m@"} <= set(re.findall(r"\x1b\[\d\dm.", colored))


def test_context_is_as_long_as_asked_and_hunks_that_meet_are_one(geglu: gw.Program) -> None:
    sliced = rewritten(geglu, "slice-groups{memory_budget=25%}")
    for context in (0, 1, 3):
        lines = gw.diff(geglu, sliced, context=context).splitlines()[2:]
        assert sum(line.startswith("  ") for line in lines) <= 4 * context
    assert gw.diff(geglu, sliced, context=10**6).count("@@ -") == 1


def assert_whole(before: gw.Program, after: gw.Program) -> None:
    """Each line of both programs is in the difference once, the second's in order; it is empty for equal programs alone."""
    rows = compare(before, after).rows
    assert [row.after for row in rows if row.after >= 0] == list(range(len(str(after).splitlines())))
    assert sorted(row.before for row in rows if row.before >= 0) == list(range(len(str(before).splitlines())))
    assert (gw.diff(before, after) == "") == (str(before) == str(after))
    kept = [(row.before, row.after) for row in rows if row.marker == " "]
    assert kept == sorted(kept)
