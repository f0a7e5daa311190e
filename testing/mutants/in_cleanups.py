"""Mistakes in the exact clean-ups: what changes nothing, what is computed twice or never, constants, and batch norms."""

from functools import partial

from .hunts import Hunt
from .mutant import Mutant

_SEEN = ("float64", "types", "verifier")

_no_op = partial(
    Mutant,
    file="passes/remove_no_ops.py",
    hunt=Hunt("remove-no-ops", ("motifs.what_changes_nothing", "motifs.chain_of_views", "elementwise"), 5),
    catchers=_SEEN,
)
_REMOVED, _PERMUTES = "remove-no-ops/remove-no-op", "remove-no-ops/merge-permutes"
NO_OPS = (
    _no_op("zero-is-neutral-to-products", "constants", old="scalar != _ARITHMETIC[target]:", new="abs(scalar) > 1:", rule=_REMOVED),
    _no_op(
        "type-is-not-compared",
        "bookkeeping",
        old='    if not same_type(source.meta["val"], node.meta["val"]):\n        return False\n',
        new='    if not same_type(source.meta["val"], source.meta["val"]):\n        return False\n',
        rule=_REMOVED,
    ),
    _no_op(
        "dropout-in-training-is-removed",
        "bookkeeping",
        old="        return not draws(node)\n",
        new="        return True\n",
        hunt=Hunt("remove-no-ops", ("random",), 4),
        rule=_REMOVED,
    ),
    _no_op(
        "copy-of-its-destination",
        "operands",
        old="index = 1 if node.target is _aten.copy.default else 0",
        new="index = 0",
        hunt=Hunt("remove-no-ops", ("aten.copy.default", "elementwise"), 4),
        rule=_REMOVED,
    ),
    _no_op(
        "permutations-in-the-other-order",
        "slices",
        old="[first[dim] for dim in second]",
        new="[second[dim] for dim in first]",
        hunt=Hunt("remove-no-ops", ("aten.permute.default", "shapes", "motifs.chain_of_views"), 6),
        equivalent="the rewrite is made where sizes and strides agree, and two views of one memory that agree in these are one tensor",
    ),
    _no_op(
        "output-may-be-the-input",
        "state",
        old="reason = self.outputs.reason_to_keep(node, source)",
        new="reason = None",
        catchers=("aliasing",),
        rule=_REMOVED,
    ),
    _no_op(
        "merged-outputs-are-not-noted",
        "state",
        old="            self.outputs.merged(node, source)\n",
        new="            assert source is not None\n",
        catchers=("aliasing",),
        hunt=Hunt("remove-no-ops", ("outputs",), 6),
        rule=_REMOVED,
    ),
    _no_op(
        "any-second-operand-is-neutral",
        "constants",
        old="    negative = math.copysign(1.0, scalar) < 0\n",
        new="    return True\n",
    ),
)

_sharing = partial(
    Mutant,
    file="passes/share_subexpressions.py",
    hunt=Hunt("share-subexpressions", ("motifs.repeated", "elementwise", "shapes"), 8),
    catchers=_SEEN,
    rule="share-subexpressions/share",
)
SHARING = (
    _sharing(
        "numbers-are-not-compared",
        "bookkeeping",
        old="return (type(value), repr(value)) if isinstance(value, float | complex) else (type(value), value)",
        new="return type(value)",
    ),
    _sharing(
        "attributes-are-not-compared",
        "bookkeeping",
        old="return tuple((name, _key(item)) for name, item in value.items())",
        new="return tuple((name, _key(item)) for name, item in value.items() if isinstance(item, Node))",
    ),
    _sharing(
        "operands-are-not-compared",
        "operands",
        old="        return id(value)\n",
        new="        return 0\n",
    ),
    _sharing(
        "random-calls-are-shared",
        "bookkeeping",
        old="if not is_pure(node):",
        new="if node is None:",
        hunt=Hunt("share-subexpressions", ("random",), 6),
    ),
    _sharing(
        "outputs-come-to-share-memory",
        "state",
        old="if node in outputs and earlier in outputs:",
        new="if node is earlier:",
        catchers=("aliasing",),
        hunt=Hunt("share-subexpressions", ("motifs.repeated",), 6),
    ),
    _sharing(
        "shared-outputs-are-not-noted",
        "state",
        old="                outputs.merged(node, earlier)\n",
        new="                assert earlier is not node\n",
        catchers=("aliasing",),
        hunt=Hunt("share-subexpressions", ("outputs",), 6),
    ),
    _sharing(
        "earlier-call-is-replaced-by-later",
        "operands",
        old="rewriter.replace(node, earlier)",
        new="rewriter.replace(earlier, node)",
        catchers=("verifier", "error"),
    ),
    _sharing(
        "lists-are-not-compared",
        "bookkeeping",
        old="        return tuple(map(_key, value))\n",
        new="        return len(value)\n",
        hunt=Hunt("share-subexpressions", ("aten.flip.default",), 8),
    ),
)

_folding = partial(
    Mutant,
    file="passes/fold_constants.py",
    hunt=Hunt("fold-constants", ("motifs.constant_expression", "creation", "elementwise"), 6),
    catchers=_SEEN,
    rule="fold-constants/fold",
)
FOLDING = (
    _folding(
        "constants-change-places",
        "operands",
        old="zip(named.values(), computed_weights(program, named), strict=True)",
        new="zip(reversed(list(named.values())), computed_weights(program, named), strict=True)",
        hunt=Hunt("fold-constants", ("motifs.constant_expression",), 8),
    ),
    _folding(
        "random-calls-are-folded",
        "bookkeeping",
        old='is_pure(node) and "empty" not in name_of(node.target)',
        new='"empty" not in name_of(node.target)',
        hunt=Hunt("fold-constants", ("random", "creation"), 6),
    ),
    _folding(
        "output-may-be-a-weight",
        "state",
        old="            if node in outputs:\n",
        new="            if node is None:\n",
        catchers=("aliasing",),
    ),
    _folding(
        "float64-of-a-constant-is-rounded",
        "constants",
        file="ir/float64.py",
        old="return run(to_float64(part), [])[0]",
        new="return run(part, [])[0]",
    ),
    _folding(
        "constant-of-half-the-digits",
        "constants",
        file="ir/float64.py",
        old="RoundedWeight.computed(name, value, functools.partial(_pick, exact, index))",
        new="RoundedWeight.computed(name, value.bfloat16().to(value.dtype), functools.partial(_pick, exact, index))",
        catchers=("rmse", "float64"),
    ),
    _folding(
        "every-constant-is-the-first",
        "operands",
        file="ir/float64.py",
        old="return values()[index]",
        new="return values()[0]",
        hunt=Hunt("fold-constants", ("motifs.constant_expression",), 8),
    ),
)

_norm = partial(
    Mutant,
    file="passes/fold_batch_norm.py",
    hunt=Hunt("fold-batch-norm", ("motifs.layer_then_batch_norm",), 2),
    catchers=_SEEN,
    rule="fold-batch-norm/fold-batch-norm",
)
BATCH_NORMS = (
    _norm("eps-dropped", "constants", old="torch.rsqrt(variance + eps)", new="torch.rsqrt(variance)"),
    _norm("eps-ten-times", "constants", old="torch.rsqrt(variance + eps)", new="torch.rsqrt(variance + 10 * eps)"),
    _norm("eps-outside-of-the-root", "constants", old="torch.rsqrt(variance + eps)", new="1 / (variance.sqrt() + eps)"),
    _norm("reciprocal-for-root", "constants", old="torch.rsqrt(variance + eps)", new="torch.reciprocal(variance + eps)"),
    _norm("mean-added", "operands", old="bias = (0 if layer_bias is None else layer_bias) - mean", new="bias = mean"),
    _norm("bias-dropped", "operands", old="(0 if layer_bias is None else layer_bias) - mean", new="0 - mean"),
    _norm("shift-dropped", "operands", old="bias * s + (0 if shift is None else shift)", new="bias * s"),
    _norm("scale-dropped", "operands", old="(1 if scale is None else scale)", new="1"),
    _norm(
        "shift-doubled", "operands", old="bias * s + (0 if shift is None else shift)", new="bias * s + (0 if shift is None else 2 * shift)"
    ),
    _norm("bias-not-scaled", "operands", old='"bias": bias * s', new='"bias": bias'),
    _norm(
        "scale-along-inputs",
        "slices",
        old="s.reshape(-1, *[1] * (layer_weight.dim() - 1))",
        new="s.reshape(1, -1, *[1] * (layer_weight.dim() - 2))",
        catchers=(*_SEEN, "error"),
    ),
    _norm("mean-for-variance", "operands", old='"mean": arguments["running_mean"]', new='"mean": arguments["running_var"]'),
    _norm(
        "channels-of-another-dim",
        "slices",
        old='return None if layer.meta["val"].dim() == rank else',
        new="return None if rank else",
        hunt=Hunt("fold-batch-norm", ("motifs.layer_then_norm_of_tokens",), 2),
        catchers=(*_SEEN, "error"),
    ),
    _norm(
        "weights-of-half-the-digits",
        "constants",
        old="exact().to(layer.dtype), exact, layer.kind",
        new="exact().bfloat16().to(layer.dtype), exact, layer.kind",
        catchers=("rmse",),
    ),
    _norm(
        "weight-and-bias-swapped",
        "operands",
        old='arguments["weight"], arguments["bias"] = rewriter.weight(weight)',
        new='arguments["bias"], arguments["weight"] = rewriter.weight(weight)',
        catchers=("verifier",),
    ),
    _norm(
        "norm-stays-behind-the-fold", "operands", old="rewriter.replace(self.result, folded)", new="rewriter.replace(self.layer, folded)"
    ),
    _norm("weight-scaled-twice", "operands", old="weight = layer_weight * s.reshape(", new="weight = layer_weight * s.square().reshape("),
)

DEAD_CODE = (
    Mutant(
        "random-calls-are-dead",
        "bookkeeping",
        "passes/remove_dead_code.py",
        "if not node.users and is_pure(node)]:",
        "if not node.users]:",
        ("float64",),
        Hunt("remove-dead-code", ("random", "elementwise"), 6),
        rule="remove-dead-code/remove-unused",
    ),
)

MUTANTS = (*NO_OPS, *SHARING, *FOLDING, *BATCH_NORMS, *DEAD_CODE)
