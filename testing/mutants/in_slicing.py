"""Mistakes in what runs slice by slice: which dims move together, what a body computes, how slices are cut, laid out and merged."""

from functools import partial

from .cut_norms import CutNorms
from .hunts import Hunt
from .mutant import Mutant

_SEEN = ("float64", "types", "verifier", "error")
_OUTLINED, _SPLIT, _ROWS = "slice-groups/outline-region", "slice-groups/split-group-norm", "slice-groups/attention-rows"


def _sliced(*inside: str, max_nodes: int = 4, axes: str = "rows,query", most: int = 64) -> Hunt:
    """Wide values with calls of `inside` between narrow ends, in at most so many slices."""
    return Hunt(f"slice-groups{{memory_budget=1%,axes=[{axes}],max_slices={most}}}", tuple(f"wide.{name}" for name in inside), max_nodes)


_link = partial(Mutant, group="slices", catchers=_SEEN, rule=_OUTLINED)
_view = partial(
    _link, file="ir/links/views.py", hunt=_sliced("shapes_reshape", "shapes_flatten", "shapes_permute", "shapes_squeeze", "shapes_expand")
)
_piece = partial(
    _link, file="ir/links/pieces.py", hunt=_sliced("shapes_slices", "shapes_parts", "shapes_joined", "shapes_padded", "shapes_expand")
)
_reduced = partial(
    _link,
    file="ir/links/reduce.py",
    hunt=_sliced(
        "reductions_sums",
        "reductions_extremes",
        "reductions_spread",
        "reductions_running",
        "reductions_soft",
        "reductions_places",
        "reductions_extremes_and_places",
    ),
)
LINKS = (
    _view("transpose-keeps-dims", old="{a: b, b: a}.get(dim, dim)", new="{}.get(dim, dim)", hunt=_sliced("shapes_permute")),
    _view("permute-keeps-dims", old='call["dims"][dim] % len(call["dims"])', new="dim", hunt=_sliced("shapes_permute")),
    _view("view-keeps-its-first-dim", old="if same(target_outer, outer):", new="if dim == 0:", hunt=_sliced("shapes_reshape")),
    _view("view-at-any-dim-that-divides", old="if same(target_outer, outer):", new="if target_outer:", hunt=_sliced("shapes_reshape")),
    _view(
        "view-keeps-the-whole-size",
        old="    sizes[dim] = -1\n    return sizes\n",
        new="    assert sizes\n    return sizes\n",
        hunt=_sliced("shapes_reshape"),
    ),
    _view("expand-keeps-the-whole-size", old="    sizes[tag.dim] = -1\n", new="    assert sizes\n", hunt=_sliced("shapes_expand")),
    _view("squeeze-of-a-slice-of-one", old="[d for d in asked if same(shape[d], 1)]", new="list(asked)", hunt=_sliced("shapes_squeeze")),
    _view(
        "t-keeps-dims",
        old='{"self": len(call.out_shape()) - 1 - dim}',
        new='{"self": dim}',
        hunt=Hunt("slice-groups{memory_budget=1%}", ("aten.t.default", "shapes", "elementwise"), 6),
    ),
    _piece("cat-along-its-own-dim", old='    if dim == call.dim("dim", rank):\n', new="    if dim < 0:\n", hunt=_sliced("shapes_joined")),
    _piece("stack-keeps-dims", old="dim - (dim > new) for key", new="dim for key", hunt=_sliced("shapes_joined")),
    _piece(
        "split-along-its-own-dim",
        old='    if dim != call.dim("dim", len(call.out_shape(output))):\n',
        new="    if dim >= 0:\n",
        hunt=_sliced("shapes_parts"),
    ),
    _piece(
        "unbind-keeps-dims",
        old='def unbind(call: Call, output: int, dim: int) -> Moves:\n    return Moves({"self": dim + (dim >=',
        new='def unbind(call: Call, output: int, dim: int) -> Moves:\n    return Moves({"self": dim + (dim <',
        hunt=_sliced("shapes_parts"),
    ),
    _piece(
        "select-keeps-dims",
        old='"""d != dim <- x d, shifted."""\n    return Moves({"self": dim + (dim >=',
        new='"""d != dim <- x d, shifted."""\n    return Moves({"self": dim + (dim <',
        hunt=_sliced("shapes_slices"),
    ),
    _piece("cut-begins-anywhere", old="if start not in (None, 0) or step != 1:", new="if step != 1:", hunt=_sliced("shapes_slices")),
    _piece(
        "cut-with-any-step", old="if start not in (None, 0) or step != 1:", new="if start not in (None, 0):", hunt=_sliced("shapes_slices")
    ),
    _piece(
        "cut-ends-anywhere",
        old="return type(end) is int and type(size) is int and end >= size",
        new="return True",
        hunt=_sliced("shapes_slices"),
    ),
    _piece("padding-above-is-ignored", old="if same(low, 0) and same(high, 0):", new="if same(low, 0):", hunt=_sliced("shapes_padded")),
    _piece(
        "padding-of-another-dim", old="place = 2 * (len(call.out_shape()) - 1 - dim)", new="place = 2 * dim", hunt=_sliced("shapes_padded")
    ),
    _piece("repeats-the-other-way", old="Move(dim, over=repeats)", new="Move(dim, times=repeats)", hunt=_sliced("shapes_expand")),
    _reduced("softmax-along-the-slice", old="    if dim not in _named(call):\n", new="    if dim >= 0:\n", hunt=_sliced("reductions_soft")),
    _reduced(
        "reduced-dims-may-be-cut",
        old="    if kept[dim] in reduced:\n",
        new="    if kept[dim] < 0:\n",
        hunt=_sliced("reductions_sums", "reductions_extremes", "reductions_spread"),
    ),
    _reduced(
        "keepdim-is-ignored",
        old='    if call["keepdim"]:\n',
        new="    if call.node is None:\n",
        hunt=_sliced("reductions_sums", "reductions_extremes", "reductions_spread"),
    ),
    _reduced(
        "flip-along-the-slice",
        old='return call.dims("dims", rank) or list(range(rank))',
        new="return []",
        hunt=_sliced("shapes_turned"),
    ),
    _reduced(
        "tril-knows-columns-alone",
        old="return [rank - 2, rank - 1]",
        new="return [rank - 1]",
        hunt=_sliced("shapes_turned"),
    ),
    _link(
        "layer-norm-along-the-slice",
        file="ir/links/norm.py",
        old='< len(call.out_shape()) - len(call.integers("normalized_shape"))',
        new='<= len(call.out_shape()) - len(call.integers("normalized_shape"))',
        hunt=_sliced("norms_layer_norm", "norms_rms_norm"),
    ),
    _link(
        "linear-sums-over-the-slice",
        file="ir/links/matmul.py",
        old="    if dim < len(call.out_shape()) - 1:\n",
        new="    if dim < len(call.out_shape()):\n",
        hunt=_sliced("products_linear", "products_matmul", "products_plain", "products_einsum"),
    ),
    _link(
        "columns-come-from-the-left-operand",
        file="ir/links/matmul.py",
        old="return Moves({b: b_rank - 1, **bias})",
        new="return Moves({a: a_rank - 1, **bias})",
        hunt=_sliced("products_linear", "products_matmul", "products_plain", "products_einsum"),
    ),
    _link(
        "windows-do-not-overlap",
        file="ir/links/conv.py",
        old="if window.clean and window.p == 0 and window.k == window.s == 1:",
        new="if window.clean and window.s == 1 and 2 * window.p == window.dilation * (window.k - 1):",
        hunt=_sliced("convolutions_convolved"),
    ),
    _link(
        "gather-along-its-own-dim",
        file="ir/links/index.py",
        old='        return Moves({"index": dim})\n    size, indexed',
        new='        return Moves({"index": dim, "self": dim})\n    size, indexed',
        hunt=_sliced("indexing_embedding", "indexing_selected", "indexing_gathered", "indexing_indexed"),
    ),
    _link(
        "index-select-cuts-what-it-reads",
        file="ir/links/index.py",
        old='{"index": 0} if dim == call.dim("dim", len(call.out_shape())) else {"self": dim}',
        new='{"index": 0, "self": dim} if dim == call.dim("dim", len(call.out_shape())) else {"self": dim}',
        hunt=_sliced("indexing_embedding", "indexing_selected", "indexing_gathered", "indexing_indexed"),
    ),
    _link(
        "broadcast-dims-are-cut",
        file="ir/links/table.py",
        old="    if same(own, size):\n        return True\n",
        new="    if same(own, own):\n        return True\n",
        hunt=_sliced(
            "shapes_reshape",
            "shapes_flatten",
            "shapes_permute",
            "shapes_squeeze",
            "shapes_expand",
            "shapes_slices",
            "shapes_parts",
            "shapes_joined",
            "shapes_padded",
        ),
    ),
    _link(
        "aligned-from-the-left",
        file="ir/links/table.py",
        old="        place = len(sizes) - back\n",
        new="        place = min(dim, len(sizes) - 1)\n",
        hunt=_sliced("elementwise_arithmetic", "elementwise_choice_by_mask"),
    ),
    _link(
        "heads-of-shared-keys",
        file="ir/links/attention.py",
        old="moves[name] = Move(len(call.shape(name)) - 3, over=group)",
        new="moves[name] = len(call.shape(name)) - 3",
        hunt=_sliced("attention_scaled_dot_product", "attention_causal_by_rows"),
    ),
    _link(
        "mask-of-all-queries",
        file="ir/links/attention.py",
        old='    mask = aligned(call, ["attn_mask"], dim)\n',
        new="    mask = aligned(call, [], dim)\n",
        group="masks",
        hunt=_sliced("attention_scaled_dot_product", "attention_causal_by_rows"),
    ),
    _link(
        "keys-are-cut-as-queries-are",
        file="ir/links/attention.py",
        old="return Moves({query: len(call.shape(query)) - 2, **mask, **rows}",
        new='return Moves({query: len(call.shape(query)) - 2, "key" if query == "query" else "k": dim, **mask, **rows}',
        group="masks",
        hunt=_sliced("attention_scaled_dot_product", "attention_causal_by_rows"),
    ),
    _link(
        "rows-of-all-queries",
        file="ir/links/attention.py",
        old='rows = {"rows": 0} if call.operand("rows") is not None else {}',
        new="rows: dict[str, int] = {}",
        group="masks",
        hunt=_sliced("attention_scaled_dot_product", "attention_causal_by_rows"),
    ),
    _link(
        "statistics-of-the-first-slice",
        file="ir/links/norm.py",
        old="        return Tag(0, 0)\n",
        new="        return Tag(1, tag.unit)\n",
        hunt=_sliced("temporal"),
    ),
)

_TWO = _sliced("reductions_soft", "norms_layer_norm", "elementwise_activation")  # of one shape, at times with two results
_region = partial(
    Mutant,
    group="slices",
    file="ir/region.py",
    catchers=_SEEN,
    rule=_OUTLINED,
    hunt=_sliced("shapes_permute", "shapes_reshape", "products_matmul", "products_linear", "shapes_joined", most=3),
)
REGIONS = (
    _region(
        "tail-is-dropped",
        old="return [(k * units // count, (k + 1) * units // count)",
        new="return [(k * (units // count), (k + 1) * (units // count))",
    ),
    _region(
        "slices-overlap",
        old="return [(k * units // count, (k + 1) * units // count)",
        new="return [(max(k * units // count - 1, 0), (k + 1) * units // count)",
    ),
    _region(
        "slices-begin-late",
        old="return [(k * units // count, (k + 1) * units // count)",
        new="return [(k * units // count + (k > 0), (k + 1) * units // count)",
    ),
    _region("units-are-indices", old="operand.narrow(dim, begin * per_unit,", new="operand.narrow(dim, begin,"),
    _region(
        "parts-in-the-other-order",
        old="torch.cat([part[j] for part in parts], dim)",
        new="torch.cat([part[j] for part in reversed(parts)], dim)",
    ),
    _region(
        "every-output-is-the-first",
        old="torch.cat([part[j] for part in parts], dim)",
        new="torch.cat([part[0] for part in parts], dim)",
        hunt=_TWO,
    ),
    _region(
        "every-slice-is-the-first",
        old="[narrow(x, d, begin, end, total) for x, d in zip(",
        new="[narrow(x, d, 0, end - begin, total) for x, d in zip(",
    ),
    _region(
        "outputs-along-the-first-dim",
        file="ir/rewriter.py",
        old="args = [region, body.in_dims, [dim for _, _, dim in outputs], count",
        new="args = [region, body.in_dims, [0 for _, _, dim in outputs], count",
    ),
    _region(
        "results-are-the-first",
        file="ir/rewriter.py",
        old="self.insert(GETITEM, (call, j), before=anchor",
        new="self.insert(GETITEM, (call, 0), before=anchor",
        catchers=(*_SEEN, "aliasing"),
        hunt=_TWO,
    ),
    _region(
        "operands-along-the-first-dim",
        file="ir/rewriter.py",
        old="            self.in_dims.append(dim)\n",
        new="            self.in_dims.append(min(dim, 0))\n",
    ),
    _region(
        "operand-is-not-cut",
        file="passes/slicing/body.py",
        old="return builder.operand(value, want.dim if want is not None else -1)",
        new="return builder.operand(value, want.dim if want is not None and builder.operands else -1)",
    ),
)

_MERGED = Hunt((CutNorms(),), ("norms.group_norm",), 3)
_half = partial(Mutant, group="constants", file="ir/ops/norm.py", catchers=("float64", "rmse"), rule="cut-norms/cut-norm", hunt=_MERGED)
_halves = partial(_half, file="passes/slicing/prepare.py", group="operands", catchers=_SEEN, rule=_SPLIT, hunt=_sliced("norms_group_norm"))
GROUP_NORMS = (
    _half("variance-within-slices-alone", old="m2 = m2 + m2_b + delta.square() * (count * count_b / total)", new="m2 = m2 + m2_b"),
    _half("mean-of-slices-unweighted", old="mean = mean + delta * (count_b / total)", new="mean = mean + delta * 0.5"),
    _half("variance-by-n-less-one", old="torch.rsqrt(m2 / count + eps)", new="torch.rsqrt(m2 / (count - 1) + eps)"),
    _half("group-eps-dropped", old="torch.rsqrt(m2 / count + eps)", new="torch.rsqrt(m2 / count)"),
    _half("group-eps-outside", old="torch.rsqrt(m2 / count + eps)", new="1 / ((m2 / count).sqrt() + eps)"),
    _half(
        "variance-in-one-pass",
        old="m2 = (grouped - mean.unsqueeze(-1)).square().sum(-1)",
        new="m2 = grouped.square().sum(-1) - grouped.size(-1) * mean.square()",
        catchers=("rmse", "float64"),
    ),
    _half(
        "statistics-in-bfloat16",
        old="wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)\n    grouped",
        new="wide = x if x.dtype == torch.float64 else x.bfloat16().to(torch.float32)\n    grouped",
        catchers=("rmse", "verifier"),
    ),
    _half(
        "group-bias-dropped", group="operands", old="        y = y + bias.to(stats.dtype).reshape(channels)\n", new="        y = y + 0\n"
    ),
    _half("count-of-the-last-slice", group="state", old="        count = total\n", new="        count = count_b\n"),
    _halves(
        "group-weight-and-bias-swapped",
        old='(a["input"], stats, a["weight"], a["bias"], a["num_groups"], a["eps"])',
        new='(a["input"], stats, a["bias"], a["weight"], a["num_groups"], a["eps"])',
    ),
    _halves(
        "group-weight-lost",
        old='(a["input"], stats, a["weight"], a["bias"], a["num_groups"], a["eps"])',
        new='(a["input"], stats, None, a["bias"], a["num_groups"], a["eps"])',
    ),
    _halves("statistics-of-one-group", old='(a["input"], a["num_groups"]), before=node', new='(a["input"], 1), before=node'),
)

_causal = partial(
    Mutant,
    group="masks",
    file="ir/ops/attention.py",
    catchers=("float64", "verifier", "error"),
    rule=_ROWS,
    hunt=_sliced("attention_scaled_dot_product"),
)
ATTENTION = (
    _causal("causal-less-one", old="keys.unsqueeze(0) <= rows.unsqueeze(1)", new="keys.unsqueeze(0) < rows.unsqueeze(1)"),
    _causal("causal-and-one", old="keys.unsqueeze(0) <= rows.unsqueeze(1)", new="keys.unsqueeze(0) <= rows.unsqueeze(1) + 1"),
    _causal("causal-inverted", old="keys.unsqueeze(0) <= rows.unsqueeze(1)", new="keys.unsqueeze(0) >= rows.unsqueeze(1)"),
    _causal("scale-of-queries-dropped", old="attn_mask=mask, scale=scale", new="attn_mask=mask, scale=None", group="constants"),
    _causal("mask-is-additive", old="attn_mask=mask, scale", new="attn_mask=mask.to(q.dtype), scale"),
    _causal(
        "keys-and-values-swapped",
        file="passes/slicing/prepare.py",
        group="operands",
        old='(query, a["key"], a["value"], rows, a["scale"]',
        new='(query, a["value"], a["key"], rows, a["scale"]',
    ),
    _causal(
        "scale-of-attention-lost",
        file="passes/slicing/prepare.py",
        group="constants",
        old='rows, a["scale"], a["enable_gqa"])',
        new='rows, None, a["enable_gqa"])',
    ),
)

MUTANTS = (*LINKS, *REGIONS, *GROUP_NORMS, *ATTENTION)
