"""Checks the row of a node on values: what the table claims of an op, the op must do.

For whoever declares a row:

    node, values = call_node(op, x, weight, groups=2)
    check_links(node, values, random.Random(0))
"""

import operator
import random
from dataclasses import dataclass, field

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from .call import Call
from .table import backward, forward, localize
from .tag import OperandSlot, Refusal, Tag


@dataclass(slots=True)
class LinkReport:
    """How many slices were compared, and the refusals of the dims that were not."""

    slices: int = 0
    refusals: list[Refusal] = field(default_factory=list)


def call_node(op, *args, **kwargs) -> tuple[fx.Node, dict[fx.Node, torch.Tensor]]:
    """A node that calls `op`, with a placeholder for each distinct tensor among the arguments, and the placeholders' tensors."""
    graph, mode, values, placeholders = fx.Graph(), FakeTensorMode(), {}, {}

    def placeholder(tensor):
        if id(tensor) not in placeholders:
            node = placeholders[id(tensor)] = graph.placeholder(f"x{len(placeholders)}")
            node.meta["val"], values[node] = mode.from_tensor(tensor), tensor
        return placeholders[id(tensor)]

    args, kwargs = tree_map_only(torch.Tensor, placeholder, (args, kwargs))
    node = graph.call_function(op, args, kwargs)
    with mode:
        node.meta["val"] = _call(op, args, kwargs, lambda n: n.meta["val"])
    return node, values


def check_links(node: fx.Node, values: dict, rng: random.Random, *, slices: int = 2, tolerance: float = 1e-12, contents: bool = True,
                converse: bool = True) -> LinkReport:  # fmt: skip
    """Take every link of `node` at its word, on random slices of random unit counts; AssertionError where it does not hold.

    - op(narrowed operands) = narrow(op(full operands)) within `tolerance` of the largest value (`contents=False`: shapes only);
    - with `converse`: a change in one slice of a sliced operand leaves the other slices of the output bitwise as they were;
    - `forward` of each operand's tag is the output's tag, and `backward` of each tag that `forward` gives is the operand's.

    `values`: operand node -> tensor (or tuple of tensors).
    """
    report = LinkReport()
    if node.target is operator.getitem:  # picks; computes nothing that a slice could change
        return report
    full = _outputs(_call(node.target, node.args, node.kwargs, values.__getitem__))
    for output, whole in enumerate(full):
        if not isinstance(whole, torch.Tensor):
            continue
        for dim, size in enumerate(whole.shape):
            for units in _unit_counts(size, rng):
                tag = Tag(dim, size // units)
                tags = backward(node, tag, units, output)
                if isinstance(tags, Refusal):
                    report.refusals.append(tags)
                    continue
                if all(t is None for t in tags.values()):
                    continue
                _check_both_ways(node, tags, tag, units, output)
                for _ in range(slices):
                    start = rng.randrange(units)
                    stop = rng.choice([start + 1, rng.randint(start + 1, units)])
                    _check_slice(node, values, tags, tag, units, output, (start, stop), whole, tolerance if contents else None)
                    report.slices += 1
                if converse and contents:
                    _check_converse(node, values, tags, tag, units, output, whole, rng)
    _check_forward(node, values)
    return report


def _unit_counts(size: int, rng: random.Random) -> set[int]:
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    return {size, rng.choice(divisors)} if divisors else set()


def _outputs(result) -> tuple:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _call(target, args, kwargs, value_of):
    return target(*fx.node.map_arg(args, value_of), **fx.node.map_arg(kwargs, value_of))


def _narrow(value: torch.Tensor, tag: Tag | None, start: int, stop: int) -> torch.Tensor:
    if tag is None:
        return value
    return value.narrow(tag.dim, start * tag.unit, (stop - start) * tag.unit)


def _check_slice(node, values, tags, tag, units, output, span, whole, tolerance):
    local = localize(node, tag, units, output)
    if local.args is node.args:  # an operand may occur twice, once sliced and once whole: by slot
        args, kwargs = _with_slots(node, {s: _narrow(values[s.node], t, *span) for s, t in tags.items()}, values)
        part = local.target(*args, **kwargs)
    else:
        by_node = {s.node: _narrow(values[s.node], t, *span) for s, t in tags.items()}
        part = _call(local.target, local.args, local.kwargs, lambda n: by_node.get(n, values.get(n)))
    part, expected = _outputs(part)[output], _narrow(whole, tag, *span)
    where = f"{node.format_node()} output {output} {tag} of {units} units, slice {span}, operands {tags}"
    assert part.shape == expected.shape, f"{where}: shape {list(part.shape)}, not {list(expected.shape)}"
    assert part.dtype == expected.dtype, f"{where}: {part.dtype}, not {expected.dtype}"
    if tolerance is not None:
        assert _close(part, expected, tolerance), f"{where}: differs by {_difference(part, expected)}"


def _with_slots(node, slot_values: dict[OperandSlot, object], values):
    args = [fx.node.map_arg(a, lambda n: values.get(n)) for a in node.args]
    kwargs = {k: fx.node.map_arg(a, lambda n: values.get(n)) for k, a in node.kwargs.items()}
    for slot, value in slot_values.items():
        holder = args if isinstance(slot.position, int) else kwargs
        if slot.index is None:
            holder[slot.position] = value
        else:
            holder[slot.position] = [*holder[slot.position]]
            holder[slot.position][slot.index] = value
    return args, kwargs


def _close(a, b, tolerance) -> bool:
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if a.numel() == 0:
        return True
    finite = b.abs()[b.isfinite()]
    scale = max(1.0, finite.max().item()) if finite.numel() else 1.0
    return torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


def _difference(a, b):
    return (a - b).abs().max().item() if a.is_floating_point() else "values"


def _check_converse(node, values, tags, tag, units, output, whole, rng):
    if units < 2:
        return
    u = rng.randrange(units)
    for slot, operand_tag in tags.items():
        if operand_tag is None:
            continue
        changed = values[slot.node].clone()
        part = _narrow(changed, operand_tag, u, u + 1)
        part.copy_(_perturbed(part, values[slot.node], rng))
        args, kwargs = _with_slots(node, {slot: changed}, values)
        after = _outputs(node.target(*args, **kwargs))[output]
        for start, stop in ((0, u), (u + 1, units)):
            same = torch.equal(_bits(_narrow(after, tag, start, stop)), _bits(_narrow(whole, tag, start, stop)))
            assert same, f"{node.format_node()}: unit {u} of {slot.node} {operand_tag} reaches other units of output {output} {tag}"


def _perturbed(part, full, rng):
    """Other values of the same kind; integers are drawn from those present, so that an index stays in range."""
    if part.dtype is torch.bool:
        return ~part
    if part.is_floating_point() or part.is_complex():
        return part * 0.5 + 0.25
    flat = full.flatten()
    return flat[torch.tensor([rng.randrange(flat.numel()) for _ in range(part.numel())])].view(part.shape)


def _bits(t):
    return torch.view_as_real(t.resolve_conj()).nan_to_num() if t.is_complex() else t.nan_to_num() if t.is_floating_point() else t


def _check_both_ways(node, tags, tag, units, output):
    """Each operand's tag leads forward to the output's tag."""
    for slot, operand_tag in tags.items():
        if operand_tag is None:
            continue
        ahead = forward(node, slot, operand_tag, units)
        ahead = ahead[output] if isinstance(ahead, tuple) else ahead
        # An axis of one unit may stand on any dim of size 1: there the way forward need not be the way back.
        assert ahead == tag or units == 1, f"{node.format_node()}: {slot} {operand_tag} leads to {ahead}, but {tag} came from it"


def _check_forward(node, values):
    """Each tag that an operand leads to leads back to the operand's."""
    for slot in _slots(node):
        for dim, size in enumerate(values[slot.node].shape):
            for units in {size, max(1, size // 2)}:
                if size == 0 or size % units:
                    continue
                given = Tag(dim, size // units)
                tags = forward(node, slot, given, units)
                for output, tag in enumerate(tags if isinstance(tags, tuple) else (tags,)):
                    if not isinstance(tag, Tag) or tag.unit == 0:
                        continue
                    back = backward(node, tag, units, output)
                    assert not isinstance(back, Refusal), f"{node.format_node()}: {slot} {given} leads to {tag}, and back to {back}"
                    assert back[slot] == given or units == 1, f"{node.format_node()}: {slot} {given} leads to {tag}, back to {back[slot]}"


def _slots(node) -> list[OperandSlot]:
    return list(Call(node).operands.values())
