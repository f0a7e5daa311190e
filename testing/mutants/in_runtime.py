"""Mistakes in what runs: slots that are freed and reused, regions in place, kernels, caches of keys and values, and what is kept between
processes."""

from functools import partial

from .hunts import Hunt
from .mutant import Mutant

_ANY = ("elementwise", "shapes", "reductions", "products", "indexing")
_run = partial(Mutant, group="state", file="runtime/flat.py", catchers=("running",), hunt=Hunt("", _ANY, 10, question="running"))
_REGIONS = Hunt("slice-groups{memory_budget=1%}", ("elementwise", "products", "norms"), 8, question="running")
_NORMS = Hunt("slice-groups{memory_budget=1%}", ("norms.group_norm", "elementwise"), 4, question="running")
RUNS = (
    _run(
        "freed-at-the-first-use",
        file="ir/liveness.py",
        old="            last[operand] = node\n",
        new="            last.setdefault(operand, node)\n",
        catchers=("running", "refusal"),
    ),
    _run(
        "returned-value-is-freed",
        file="ir/liveness.py",
        old='        if user.op != "output":\n            dying',
        new='        if user.op != "placeholder":\n            dying',
        equivalent="the output is no instruction of the flat graph, so that nothing dies there",
    ),
    _run(
        "constants-share-a-slot",
        group="operands",
        old="(type(value), repr(value)) if is_plain else None",
        new="type(value) if is_plain else None",
    ),
    _run(
        "operands-swapped", group="operands", old="first, second = (*operands, None)[:2]", new="first, second = (*operands[::-1], None)[:2]"
    ),
    _run("result-in-a-slot-that-lives", old="        self._free += dead\n", new="        self._free += dead or self._inputs[:1]\n"),
    _run(
        "last-operand-is-lost",
        group="operands",
        old="return _Nested([self._pick_one(argument) for argument in arguments])",
        new="return _Nested([self._pick_one(argument) for argument in arguments[::-1]][::-1][:-1] or [])",
    ),
    _run(
        "states-change-places",
        file="runtime/executor.py",
        old="dict(zip(self._new_states, leaves[split:], strict=True))",
        new="dict(zip(self._new_states, leaves[split:][::-1], strict=True))",
        hunt=Hunt("", ("state",), 8, question="running"),
    ),
    _run(
        "states-are-those-of-the-first-call",
        file="runtime/executor.py",
        old="held = {**self._states, **(states or {})}",
        new="held = {name: state * 0 for name, state in self._states.items()}",
        hunt=Hunt("", ("state",), 6, question="running"),
    ),
    _run(
        "partials-overwrite-each-other",
        file="runtime/sliced.py",
        old="whole.narrow(self.dim, cut.index, 1)",
        new="whole.narrow(self.dim, 0, 1)",
        hunt=_NORMS,
    ),
    _run(
        "slice-is-stored-at-the-begin",
        file="runtime/sliced.py",
        group="slices",
        old="return narrow(operand, dim, self.begin, self.begin + self.length, self.units)",
        new="return narrow(operand, dim, 0, self.length, self.units)",
        hunt=_REGIONS,
    ),
    _run(
        "last-slice-is-not-run",
        file="runtime/sliced.py",
        group="slices",
        old="for index, (begin, end) in enumerate(slice_bounds(total, count)):",
        new="for index, (begin, end) in enumerate(slice_bounds(total, count)[: count - 1 or 1]):",
        hunt=_REGIONS,
    ),
    _run(
        "destinations-change-places",
        file="runtime/sliced.py",
        group="operands",
        old="return [output.destination(whole, cut) for output, whole in chosen]",
        new="return [output.destination(whole, cut) for output, whole in chosen[::-1]]",
        hunt=Hunt("slice-groups{memory_budget=1%}", ("wide.shapes_parts", "wide.shapes_joined"), 4, question="running"),
    ),
    _run(
        "written-while-it-is-read",
        file="runtime/sliced.py",
        old="return donor is None or _reads_are_over(region, part, region.placeholders[donor])",
        new="return True",
        hunt=Hunt(
            "slice-groups{memory_budget=1%}", ("elementwise", "motifs.gated_layers", "motifs.norm_spelled_out"), 10, question="running"
        ),
    ),
    _run(
        "donor-that-is-read-later",
        file="ir/donation.py",
        old="all(uses.last_reader[key] is node for key in storages)",
        new="all(uses.last_reader[key] is not None for key in storages)",
        hunt=Hunt("slice-groups{memory_budget=1%}", ("elementwise", "motifs.norm_spelled_out"), 10, question="running"),
        equivalent="when the region runs, the donor's storage is counted once more for its later reader, and another is taken instead",
    ),
    _run(
        "users-tensor-is-taken",
        file="ir/donation.py",
        old="is_dead = not storages & uses.pinned and",
        new="is_dead =",
        hunt=Hunt("slice-groups{memory_budget=1%}", ("elementwise",), 6, question="running"),
    ),
)

_DIALECT = ("dialect.token_choice", "dialect.expert_choice", "dialect.grouped_product")
_kernel = partial(Mutant, group="kernels", catchers=("running",))
KERNELS = (
    _kernel(
        "ties-to-the-last",
        file="codegen/experts/expert_choice.py",
        old="torch.arange(keys.size(-1) - 1, -1, -1)",
        new="torch.arange(keys.size(-1))",
        hunt=Hunt("", ("dialect.expert_choice",), 1, question="running"),
    ),
    _kernel(
        "empty-slots-count",
        file="codegen/experts/expert_choice.py",
        old="            y.masked_fill_(void[some], 0.0)\n",
        new="            assert has_voids\n",
        hunt=Hunt("", ("dialect.expert_choice",), 1, question="running"),
    ),
    _kernel(
        "tokens-of-other-sequences",
        file="codegen/experts/expert_choice.py",
        old="torch.arange(batch).reshape(-1, 1, 1) * length)",
        new="torch.arange(batch).reshape(-1, 1, 1) * 0)",
        hunt=Hunt("", ("dialect.expert_choice",), 1, question="running"),
    ),
    _kernel(
        "sorted-by-the-wrong-token",
        file="codegen/experts/token_choice.py",
        old='order.div(k, rounding_mode="floor")',
        new="order.remainder(tokens)",
        hunt=Hunt("", ("dialect.token_choice",), 1, question="running"),
    ),
    _kernel(
        "runs-of-the-next-expert",
        file="codegen/experts/token_choice.py",
        old="runs = [(expert, count) for expert, count in",
        new="runs = [((expert + 1) % (int(chosen.max()) + 1), count) for expert, count in",
        hunt=Hunt("", ("dialect.token_choice",), 1, question="running"),
    ),
    _kernel(
        "order-is-not-undone",
        file="codegen/experts/token_choice.py",
        old="torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k))",
        new="order",
        hunt=Hunt("", ("dialect.token_choice",), 1, question="running"),
    ),
    _kernel(
        "rows-behind-the-last-group",
        file="codegen/experts/grouped.py",
        old="    y[start:] = 0\n",
        new="    y[start:] = 1\n",
        hunt=Hunt("", ("dialect.grouped_product",), 1, question="running"),
    ),
    _kernel(
        "groups-begin-at-zero",
        file="codegen/experts/grouped.py",
        old="            start = end\n",
        new="            start = 0\n",
        hunt=Hunt("", ("dialect.grouped_product",), 1, question="running"),
    ),
    _kernel(
        "shift-without-the-mean",
        file="codegen/cpu_kernels.py",
        old="shift = -mean.repeat_interleave(per_channel, 1) * scale",
        new="shift = -mean.repeat_interleave(per_channel, 1)",
        hunt=Hunt("", ("dialect.group_norm_in_halves",), 1, question="running"),
    ),
    _kernel(
        "kernel-eps-outside",
        file="codegen/cpu_kernels.py",
        old="scale = torch.rsqrt(m2 / count + eps).repeat_interleave",
        new="scale = torch.rsqrt(m2 / count).add(eps).repeat_interleave",
        hunt=Hunt("", ("dialect.group_norm_in_halves",), 1, question="running"),
    ),
    _kernel(
        "groups-are-interleaved",
        file="codegen/cpu_kernels.py",
        old="scale = torch.rsqrt(m2 / count + eps).repeat_interleave(per_channel, 1)",
        new="scale = torch.rsqrt(m2 / count + eps).repeat(1, per_channel)",
        hunt=Hunt("", ("dialect.group_norm_in_halves",), 1, question="running"),
    ),
)

_DECODER = Hunt("kv-cache", network="dynamic decoder")
_cache = partial(
    Mutant, group="state", catchers=("float64", "rmse", "verifier", "refusal", "error"), hunt=_DECODER, rule="kv-cache/explicit-caches"
)
DECODING = (
    _cache(
        "written-a-slot-late",
        file="ir/ops/kv_cache.py",
        old="slots = position.unsqueeze(1) + torch.arange(k.size(2), device=k.device)",
        new="slots = position.unsqueeze(1) + 1 + torch.arange(k.size(2), device=k.device)",
    ),
    _cache("keys-for-values", file="ir/ops/kv_cache.py", old="cache_v.index_put(at, v)", new="cache_v.index_put(at, k)", group="operands"),
    _cache(
        "last-token-is-hidden",
        file="ir/ops/kv_cache.py",
        old="(keys >= 0) & (keys <= last)",
        new="(keys >= 0) & (keys < last)",
        group="masks",
    ),
    _cache(
        "next-token-is-seen",
        file="ir/ops/kv_cache.py",
        old="(keys >= 0) & (keys <= last)",
        new="(keys >= 0) & (keys <= last + 1)",
        group="masks",
    ),
    _cache(
        "cache-is-not-scaled",
        file="ir/ops/kv_cache.py",
        old="k.flatten(0, 1).transpose(1, 2)) * scale)",
        new="k.flatten(0, 1).transpose(1, 2)) / scale)",
        group="constants",
    ),
    _cache(
        "positions-of-the-first-token",
        file="passes/kv_cache/steps.py",
        old="places = self.call(aten.add.Tensor, places, self.call(aten.arange.default, size, device=self.device))",
        new="places = self.call(aten.mul.Tensor, places, self.call(aten.ones.default, [1, size], dtype=torch.int64, device=self.device))",
        group="masks",
    ),
    _cache(
        "logits-of-the-token-before",
        file="passes/kv_cache/steps.py",
        old="last = step.call(aten.sub.Tensor, lengths, 1)",
        new="last = step.call(aten.sub.Tensor, lengths, 2)",
    ),
    _cache(
        "values-in-the-cache-of-keys",
        file="passes/kv_cache/steps.py",
        old='f"input:cache_k_{index}": keys, f"input:cache_v_{index}": values',
        new='f"input:cache_k_{index}": values, f"input:cache_v_{index}": keys',
        group="operands",
    ),
    _cache(
        "scale-of-steps-lost", file="passes/kv_cache/steps.py", old='{"scale": attention.scale}', new='{"scale": 1.0}', group="constants"
    ),
)

MUTANTS = (*RUNS, *KERNELS, *DECODING)
