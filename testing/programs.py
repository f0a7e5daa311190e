"""Random programs: well typed, over every family of operations that the IR claims, forward from a pool of values.

    @given(programs(ops=["elementwise", "shapes"], max_nodes=8))
    def test_my_pass(program): ...

A program is built in the IR itself, which costs about 10 ms; nothing is captured. Values carry intervals, so that logarithms, roots and
quotients get operands that they are defined for. Source: specs/trust.md, section 3; NNSmith (arXiv 2207.13066).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st
from torch import fx

from ..ir import Function, Program
from ..ir.build import set_outputs
from ..ir.calls import is_assertion
from ..ir.program import new_function
from ..ir.tree import LEAF, Tree
from .builder import Builder, Rejected
from .choices import Choices, DrawnChoices
from .ops import makers_of
from .ops.registry import Maker
from .values import Value

_TRIES = 4  # draws for each call that a program is to have; some do not fit


@st.composite
def programs(draw: Any, ops: Collection[str] | None = None, max_nodes: int = 12) -> Program:
    """Programs of one function with up to about `max_nodes` calls (a motif that was begun is finished).

    `ops` are families: attention, convolutions, creation, dialect, elementwise, indexing, motifs, norms, outputs (copies and views that are
    returned), products, random, reductions, shapes, sizes (of programs with dynamic dims), state and wide (what slicing is for); one maker
    of a family, such as `motifs.attention_block`; or single operations by name, such as `aten.relu.default`. None is all families. Weights
    have values. Inputs are made with `inputs_for`.

    Raises:
        InputError: there is no such family or operation.
    """
    return random_program(DrawnChoices(draw, st.integers), ops, max_nodes)


def random_program(choices: Choices, ops: Collection[str] | None = None, max_nodes: int = 12) -> Program:
    """The program that `choices` lead to."""
    families = makers_of(ops)
    dynamic = choices.chance(25)
    builder = _begun(choices, dynamic)
    names = _drawn_families(choices, list(families), dynamic)
    _grow_by(builder, families, names, choices.integer(1, max_nodes))
    return _finish(builder)


def program_around(choices: Choices, site: Maker, max_nodes: int = 12, *, dynamic: bool = False) -> Program:
    """A program in which `site` was made once or twice, with a few random calls before and at times behind."""
    builder = _begun(choices, dynamic)
    families = makers_of(None)
    names = _drawn_families(choices, list(families), dynamic)
    _grow_by(builder, families, names, choices.integer(0, max_nodes // 4))
    for _ in range(choices.pick((1, 2))):
        before = builder.calls
        for _ in range(_TRIES):
            _grow(builder, [site])
            if builder.calls > before:
                break
    if choices.chance(25):
        _grow_by(builder, families, names, choices.integer(1, max(1, max_nodes // 4)))
    return _finish(builder)


def _begun(choices: Choices, dynamic: bool) -> Builder:
    builder = Builder(choices, dynamic=dynamic)
    last = choices.pick((4, 8, 3))
    builder.input((*builder.symbolic(), last) if dynamic else builder.shape(2, 2), builder.float_dtype())
    return builder


def _grow_by(builder: Builder, families: Mapping[str, list[Maker]], names: Sequence[str], wanted: int) -> None:
    """About `wanted` more calls of the families called `names`."""
    end = builder.calls + wanted
    for _ in range(_TRIES * wanted):
        if builder.calls >= end:
            return
        _grow(builder, families[builder.choices.pick(names)])


def _drawn_families(choices: Choices, names: list[str], dynamic: bool) -> list[str]:
    """A few families for each program, so that calls of one meet each other."""
    usable = [name for name in names if dynamic or name != "sizes"] or names
    if choices.chance(35):
        return usable
    chosen = choices.subset(usable, 30) or usable
    return [*chosen, *["motifs"] * len(chosen)] if "motifs" in usable and choices.chance(50) else chosen


def _grow(builder: Builder, makers: list[Maker]) -> None:
    maker = builder.choices.pick(makers)
    try:
        maker(builder)
    except Rejected:
        return


def _finish(builder: Builder) -> Program:
    """The program with outputs: the last value, others, at times an input, one value twice, numbers and None; most often without what
    reaches none of these."""
    choices = builder.choices
    if not builder.values:
        builder.leaf((2, 3))
    leaves: list[Any] = [value.node for value in _drawn_outputs(builder)]
    if choices.chance(10):
        leaves.append(choices.pick((None, 3, 0.5, leaves[0])))
    new_values = {name: value for name, value in builder.states.items() if _fits_state(builder, name, value)}
    set_outputs(builder.graph, [*leaves, *(value.node for value in new_values.values())], tuple(new_values))
    if not choices.chance(20) and not builder.keeps_unused:
        _drop_dead(builder.graph)
    used = {str(node.target) for node in builder.graph.nodes if node.op == "get_attr"} | builder.states.keys()
    weights = {name: weight for name, weight in builder.weights.items() if name in used}
    function = new_function("main", builder.graph)
    return Program([_nested(function, choices)], weights, builder.symbols)


def _drawn_outputs(builder: Builder) -> list[Value]:
    choices, values = builder.choices, builder.values
    made = [value for value in values if value.node.op == "call_function"] or values
    outputs = [made[-1], *builder.returned]
    while len(outputs) < 4 and choices.chance(35):
        outputs.append(choices.pick(values if choices.chance(20) else made))
    return outputs


def _fits_state(builder: Builder, name: str, value: Value) -> bool:
    weight = builder.weights[name]
    return value.dtype == weight.dtype and value.shape == weight.shape


def _drop_dead(graph: fx.Graph) -> None:
    """Takes away calls and weights that nothing reads; inputs stay, since a caller gives them."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or node.op == "call_function" and not is_assertion(node.target)):
            graph.erase_node(node)


def _nested(function: Function, choices: Choices) -> Function:
    """The function with its outputs in a tuple, in a dict or nested, and at times its last input by name."""
    inputs, outputs = function.in_tree.num_leaves, function.out_tree.num_leaves
    in_tree, out_tree = function.in_tree, function.out_tree
    if inputs and choices.chance(10):
        in_tree = Tree("tuple", (Tree("tuple", (LEAF,) * (inputs - 1)), Tree("dict", (LEAF,), keys=("last",))))
    shape = choices.pick(("tuple", "tuple", "dict", "nested"))
    if shape == "dict":
        out_tree = Tree("dict", (LEAF,) * outputs, keys=tuple(f"y{n}" for n in range(outputs)))
    elif shape == "nested":
        out_tree = Tree("tuple", (LEAF, Tree("list", (LEAF,) * (outputs - 1))))
    return Function(function.name, function.graph, in_tree, out_tree)
