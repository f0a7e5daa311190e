"""The plain PyTorch that a kernel is checked against, as text: the group's operations one by one, as the program wrote them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...ir import Node
from ...ir.calls import GETITEM
from ...ir.float64 import widened
from .addresses import RESERVED, Addresses, unique
from .index import size_of
from .pointwise import NotFusible
from .statements import number_text, tuple_text
from .views import is_split, is_view

GW_FUNCTIONS = {
    "norm_stats": '''def norm_stats(x, groups):
    """Count, mean and sum of squared differences from the mean of each group of channels: [1, B, G, 3]."""
    grouped = x.reshape(x.size(0), groups, -1)
    mean = grouped.mean(-1)
    m2 = (grouped - mean.unsqueeze(-1)).square().sum(-1)
    return torch.stack([torch.full_like(mean, grouped.size(-1)), mean, m2], -1).unsqueeze(0)
''',
    "norm_apply": '''def norm_apply(x, stats, weight, bias, groups, eps):
    """(x - mean) / sqrt(variance + eps) * weight + bias, from the mean and variance of all partial statistics together."""
    count, means, m2 = stats.unbind(-1)
    total = count.sum(0)
    mean = (count * means).sum(0) / total
    variance = (m2 + count * (means - mean).square()).sum(0) / total
    shape = (x.size(0), x.size(1)) + (1,) * (x.dim() - 2)
    mean, variance = (v.repeat_interleave(x.size(1) // groups, 1).reshape(shape) for v in (mean, variance))
    y = (x - mean) / torch.sqrt(variance + eps)
    y = y if weight is None else y * weight.reshape((1, *shape[1:]))
    return y if bias is None else y + bias.reshape((1, *shape[1:]))
''',
    "_grouped_mm": '''def _grouped_mm(a, b, offs, bias=None, out_dtype=None):
    """Rows of `a` up to each end of `offs`, from the one before, times the matrix of that group."""
    ends = [0, *offs.tolist()]
    y = a.new_zeros(a.size(0), b.size(-1))
    for group, (begin, end) in enumerate(zip(ends, ends[1:])):
        y[begin:end] = a[begin:end] @ b[group]
    return y
''',
    "_scaled_mm": '''def _scaled_mm(a, b, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
    """a b, scaled by row and column or as a whole, in float64."""
    y = (a.double() @ b.double()) * scale_a.double() * scale_b.double()
    return (y if bias is None else y + bias.double()).to(out_dtype or torch.float64)
''',
}


def in_order(nodes: Sequence[Node], outputs: Sequence[Node], inputs: Collection[Node] = ()) -> list[Node]:
    """`nodes` with the views between them and their inputs (views of which are found where they are left out), operands first."""
    inside, order, seen = set(nodes), [], set(inputs)

    def visit(node: Node) -> None:
        if node in seen or not (node in inside or is_view(node) or is_split(node)):
            return
        seen.add(node)
        for operand in node.all_input_nodes:
            visit(operand)
        order.append(node)

    for output in outputs:
        visit(output)
    return order


def reference_lines(nodes: Sequence[Node], outputs: Sequence[Node], inputs: Mapping[Node, str], addresses: Addresses) -> list[str]:
    """The body of `reference(*inputs)`, which returns the outputs as a tuple."""
    names, taken, lines = dict(inputs), {*RESERVED, *inputs.values(), *addresses.symbol_names.values()}, []
    first = next(iter(inputs.values()))

    def argument(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value] if value in names else addresses.symbolic(size_of(value.meta["val"]))
        if isinstance(value, tuple | list):
            return "[" + ", ".join(map(argument, value)) + "]"
        if isinstance(value, torch.dtype):
            return str(widened(value))
        if isinstance(value, torch.device):
            return f"{first}.device"
        if isinstance(value, torch.memory_format | torch.layout):
            return str(value)
        return number_text(value)

    for node in in_order(nodes, outputs, inputs):
        packet = str(node.target._schema.name).partition("::")[2] if node.target is not GETITEM else "item"  # type: ignore[union-attr]
        name = unique(packet.strip("_"), taken)
        if node.target is GETITEM:
            text = f"{names[node.args[0]]}[{node.args[1]}]"
        else:
            arguments = [argument(a) for a in node.args] + [f"{k}={argument(a)}" for k, a in node.kwargs.items()]
            callee = str(node.target) if str(node.target).startswith("aten.") and packet not in GW_FUNCTIONS else packet
            text = f"{callee}({', '.join(arguments)})"
        names[node] = name
        lines.append(f"    {name} = {text}")
    return [*lines, f"    return {tuple_text(names[o] for o in outputs)}"]


def gw_functions(nodes: Sequence[Node]) -> list[str]:
    """The functions that the references of `nodes` call."""
    packets = {str(node.target).split(".")[1]: str(node.target).startswith("gw.") for node in nodes}
    missing = [name for name, is_ours in packets.items() if is_ours and name not in GW_FUNCTIONS]
    if missing:
        raise NotFusible(f"no reference for {', '.join(sorted(missing))}")
    return [GW_FUNCTIONS[name] for name in sorted(packets) if name in GW_FUNCTIONS]
