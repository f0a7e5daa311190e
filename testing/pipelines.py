"""Random pipelines: a subset of passes in an order that their constraints allow, some of them twice, options up to their ends.

    @given(st.data())
    def test(data):
        program = data.draw(programs())
        pipeline = data.draw(pipelines(program))

Source: specs/trust.md, section 3.6.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from hypothesis import strategies as st

from ..ir import Program
from ..passes import CLEANUPS, Pass, RegroupExperts, SliceGroups, Smooth, SplitLowRank
from ..passes.pipeline import must_precede
from .choices import Choices, DrawnChoices
from .inputs import inputs_for

EXACT: tuple[Pass, ...] = (*CLEANUPS, SliceGroups(), SplitLowRank(), Smooth(calibration=()), RegroupExperts())
"""Our exact passes that take any program. `kv-cache` wants a decoder, and the rest are not exact."""

# From the simplest; sizes are those of random programs, of which most tensors are smaller than 64 KiB.
_Options = Mapping[str, Mapping[str, tuple[Any, ...]]]
_OPTIONS: _Options = {
    "slice-groups": {
        "memory_budget": ("25%", "1%", "60%", "100%", "1KiB", "1MiB"),
        "max_slices": (64, 2, 7, 1),
        "axes": (("rows", "query"), ("rows",), ("query",), ("rows", "query", "features")),
    },
    "fold-constants": {"limit": ("16MiB", 0, "1KiB")},
    "split-low-rank": {"rank": (4, 1, 0, 32), "min_numel": (0,), "svd": ("auto", "exact", "randomized"), "share_down": (True, False)},
    "smooth": {"alpha": (0.5, 0.0, 1.0), "fold": (True, False), "pow2": (False, True), "min_numel": (0,)},
    "regroup-experts": {"verify": (True, False)},
}


@st.composite
def pipelines(draw: Any, program: Program | None = None, passes: Sequence[Pass] | None = None) -> tuple[Pass, ...]:
    """Pipelines of `passes`, of all exact ones when None. Passes that calibrate get inputs of `program`, and are left out without one."""
    return random_pipeline(DrawnChoices(draw, st.integers), program, passes)


def random_pipeline(choices: Choices, program: Program | None = None, passes: Sequence[Pass] | None = None) -> tuple[Pass, ...]:
    """The pipeline that `choices` lead to."""
    known = [each for each in (EXACT if passes is None else passes) if program is not None or not calibrates(each)]
    chosen = choices.subset(known, 55) or [choices.pick(known)]
    chosen += choices.subset(chosen, 15)  # a second time
    return _ready(choices, chosen, program, _OPTIONS)


def pipeline_with(choices: Choices, program: Program, wanted: Pass, options: Mapping[str, tuple[Any, ...]]) -> tuple[Pass, ...]:
    """A pipeline that has `wanted`, its options drawn from `options` where these say so, at times among a few others or twice."""
    others = [each for each in choices.subset(EXACT, 15) if each.name != wanted.name]
    chosen = [wanted, *others, *([wanted] if choices.chance(15) else [])]
    return _ready(choices, chosen, program, {**_OPTIONS, wanted.name: {**_OPTIONS.get(wanted.name, {}), **options}})


def _ready(choices: Choices, chosen: Sequence[Pass], program: Program | None, options: _Options) -> tuple[Pass, ...]:
    """The passes with options, calibrated, in an order."""
    ready = [_with_options(choices, each, options.get(each.name, {})) for each in chosen]
    if program is not None:
        ready = [calibrated(each, program) for each in ready]
    return _ordered(choices, ready)


def calibrates(each: Pass) -> bool:
    """Whether the pass looks at example inputs."""
    return any(option.name == "calibration" for option in fields(each))


def calibrated(each: Pass, program: Program) -> Pass:
    """The pass with plain inputs of `program` to calibrate on, where it does."""
    return calibrated_on(each, [as_arguments(program, inputs_for(program, seed)) for seed in range(2)])


def calibrated_on(each: Pass, examples: Sequence[Any]) -> Pass:
    """The pass with `examples` to calibrate on, where it does."""
    options: dict[str, Any] = {"calibration": examples} if calibrates(each) else {}
    return replace(each, **options)


def as_arguments(program: Program, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Flat inputs as the arguments and the named arguments of a call.

    Args:
        program: its inputs are flat but for names.
    """
    positional, named = program.main.in_tree.children
    count = positional.num_leaves
    return tuple(leaves[:count]), dict(zip(named.keys, leaves[count:], strict=True))  # type: ignore[arg-type]


def _with_options(choices: Choices, each: Pass, options: Mapping[str, tuple[Any, ...]]) -> Pass:
    return replace(each, **{name: choices.pick(values) for name, values in options.items()}) if options else each


def _ordered(choices: Choices, passes: list[Pass]) -> tuple[Pass, ...]:
    """The passes in any order that keeps all constraints."""
    left, ordered = list(passes), []
    while left:
        free = [place for place, each in enumerate(left) if not any(must_precede(other, each) for other in left)]
        ordered.append(left.pop(choices.pick(free or range(len(left)))))
    return tuple(ordered)
