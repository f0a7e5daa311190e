"""Mistakes in what every pass stands on: edits, records, fuel, weights, text, and the keys of what is kept."""

from functools import partial

from .hunts import Hunt
from .mutant import Mutant

_CLEAN = Hunt("remove-no-ops,share-subexpressions,fold-constants", ("motifs", "elementwise", "shapes"), 8)
_edit = partial(Mutant, group="bookkeeping", file="ir/rewriter.py", catchers=("verifier", "types", "float64", "aliasing"), hunt=_CLEAN)
EDITS = (
    _edit(
        "views-keep-the-old-storage",
        old="        self._refresh_aliases(old, users)\n",
        new="        assert isinstance(users, list)\n",
    ),
    _edit(
        "first-user-alone-is-redirected",
        old="        old.replace_all_uses_with(new)\n",
        new="        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is users[0]) if users else None\n",
    ),
    _edit(
        "random-operand-dies-too",
        old='            if node is not root and node.op == "call_function" and not is_pure(node):\n',
        new='            if node is not root and node.op == "placeholder" and not is_pure(node):\n',
        hunt=Hunt("remove-dead-code", ("random", "elementwise"), 8),
        catchers=("float64",),
        rule="remove-dead-code/remove-unused",
    ),
    _edit(
        "stale-sizes",
        file="ir/build.py",
        old="    value = infer(symbols, target, args, kwargs)\n",
        new='    value = infer(symbols, target, args, kwargs) if len(origin) < 2 or target is sliced else args[0].meta["val"]\n',
        catchers=("verifier", "error", "text"),
        hunt=Hunt("remove-no-ops", ("motifs.permutation_of_a_permutation",), 4),
    ),
    _edit(
        "dtype-of-sizes-alone",
        file="ir/infer.py",
        old="        a.dtype == b.dtype\n        and (a.is_conj()",
        new="        a.layout == b.layout\n        and (a.is_conj()",
        hunt=Hunt("remove-no-ops", ("motifs.what_changes_nothing", "elementwise"), 5),
    ),
    _edit(
        "strides-are-not-compared",
        file="ir/infer.py",
        old="return same_tensor_type(a, b) and same_strides(a, b, of_all=True)",
        new="return same_tensor_type(a, b)",
        hunt=Hunt("remove-no-ops", ("aten.contiguous.default", "shapes.permute"), 5),
    ),
    _edit(
        "sizes-of-another-rank",
        file="ir/infer.py",
        old="and all(same_size(x, y, exact=True) for x, y in zip(a.shape, b.shape, strict=True))",
        new="and a.numel() == b.numel()",
        hunt=Hunt("remove-no-ops", ("motifs.chain_of_views", "shapes"), 6),
    ),
    _edit(
        "states-leave-the-table",
        file="passes/manager.py",
        old='not in used and weight.kind not in ("state", "record")]:',
        new="not in used]:",
        hunt=Hunt("remove-dead-code", ("state",), 4),
        catchers=("verifier", "error", "text"),
    ),
    _edit(
        "weights-by-their-first-name",
        old="        if weight.name not in self._weight_nodes:\n            first",
        new="        if not self._weight_nodes:\n            first",
        hunt=Hunt("fold-constants", ("motifs.constant_expression", "elementwise"), 8),
        catchers=("error", "verifier"),
    ),
)

_FUEL = Hunt("remove-no-ops,share-subexpressions", ("motifs",), 8, question="fuel")
_fuel = partial(Mutant, group="infrastructure", file="ir/rewriter.py", catchers=("fuel",), hunt=_FUEL)
FUEL = (
    _fuel("fuel-is-not-spent", old="        self.spent += 1\n", new="        self.spent += 0\n"),
    _fuel("fuel-ends-one-early", old="self.spent >= self.left:", new="self.spent >= self.left - 1:"),
    _fuel("fuel-ends-one-late", old="self.spent >= self.left:", new="self.spent > self.left:"),
    _fuel(
        "records-of-the-last-step-alone",
        old="        self.records.append(RewriteRecord(",
        new="        self.records[:] = []; self.records.append(RewriteRecord(",
        catchers=("fuel", "verifier", "error"),
    ),
    _fuel(
        "fuel-is-of-each-pass",
        file="passes/manager.py",
        old="function=name, fuel=fuel, checked=self.checked)",
        new="function=name, fuel=Fuel(fuel.left), checked=self.checked)",
    ),
)

_text = partial(Mutant, group="bookkeeping", catchers=("text",), hunt=Hunt("remove-dead-code", ("elementwise", "shapes", "motifs"), 6))
TEXT = (
    _text(
        "numbers-of-six-digits",
        file="ir/printer.py",
        old="return repr(value) if math.isfinite(value)",
        new='return f"{value:.4g}" if math.isfinite(value)',
    ),
    _text(
        "minus-infinity-is-infinity",
        file="ir/printer.py",
        old='{"inf": "inf", "-inf": "-inf"',
        new='{"inf": "inf", "-inf": "inf"',
        hunt=Hunt("remove-dead-code", ("attention.spelled_out",), 4),
    ),
    _text(
        "new-states-are-not-printed",
        file="ir/printer.py",
        old='return f"{text} state {',
        new='return f"{text} output {',
        hunt=Hunt("remove-dead-code", ("state",), 4),
    ),
    _text("strides-are-not-printed", file="ir/types.py", old="    if not _row_major(shape, stride):\n", new="    if stride is None:\n"),
    _text(
        "orders-are-not-printed",
        file="ir/printer.py",
        old='for name in ("units", "orders"):',
        new='for name in ("orders",):',
        hunt=Hunt("slice-groups{memory_budget=1%}", ("shapes", "elementwise", "attention"), 6),
    ),
)

_KEYS = Hunt("remove-no-ops,fold-constants", ("motifs.constant_expression", "elementwise", "norms"), 5, question="keys")
_key = partial(Mutant, group="infrastructure", file="runtime/pass_cache.py", catchers=("key",), hunt=_KEYS)
KEYS = (
    _key("passes-not-in-the-key", old='"passes": spell(passes)', new='"passes": ""'),
    _key("weights-not-in-the-key", old='"weights": _weights_digest(program)', new='"weights": ""'),
    _key("program-not-in-the-key", old='"program": digest(text)', new='"program": ""'),
    _key(
        "first-weight-alone-in-the-key",
        old="return digest(*(text for name, tensor in tensors.items()",
        new="return digest(*(text for name, tensor in list(tensors.items())[:1]",
    ),
    _key(
        "options-not-in-the-spelling",
        file="passes/base.py",
        old="return f\"{self.name}{{{','.join(given)}}}\" if given else self.name",
        new="return self.name",
        hunt=Hunt("slice-groups{memory_budget=1%}", ("wide.elementwise_activation", "wide.products_linear"), 4, question="keys"),
    ),
    _key(
        "numbers-not-in-the-key",
        file="ir/snapshot.py",
        old='return value if math.isfinite(value) else ["float", repr(value)]',
        new='return ["float", "0.0"]',
    ),
)

MUTANTS = (*EDITS, *FUEL, *TEXT, *KEYS)
