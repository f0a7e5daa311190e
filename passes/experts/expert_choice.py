"""Experts that choose their tokens, in the place of tokens that choose their experts: each expert takes C tokens of a sequence.

    token_choice_moe(x, topk(softmax(linear(x, Wr)), k))  ->  expert_mlp(x, *expert_choice(linear(x, Wr), valid, C))

Load is even and shapes are static; tokens get 0 to E experts. With a schedule main runs the largest number of experts a token, and the
program has a static function for each other, over the same weights. Sources: Zhou et al. 2022 (arXiv 2202.09368), "Expert-Choice Routing
Enables Adaptive Computation in Diffusion Language Models" (2604.01622); specs/expert_choice.md.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch

from ...ir import Function, Node, Program, Rewriter
from ...ir.errors import PassError
from ...ir.infer import same_size
from ...ir.ops.experts import RULES
from ...ir.pattern import NoMatch
from ...ir.program import copy_graph
from ..base import LeftAlone, Outcome, Pass
from ..check import Reference
from ..contract import Contract
from ..options import at_least, one_of, option
from ..verdict import Verdict
from .capacity import ROUNDINGS, SCHEDULE, Capacity, CapacitySchedule, leaks_future
from .causality import STAYS, Sight, change_of_earlier_outputs, look
from .emit import Choice, emit_choice
from .limit import judge_limit, mixtures
from .report import described, described_schedule, figures
from .router import Routed, routed

gw = torch.ops.gw

_KEYS = (None, "prob", "logit")


@dataclass(frozen=True)
class ExpertChoice(Pass):
    """Mixtures of experts whose experts choose, which changes the model: train its routers (examples/retrofit_experts.py).

    k: experts a token in the mean (None: as many as each chose). schedule: a `CapacitySchedule` in its place, or a list of its fields.
    rule: the weight of an expert in a token, "orig" (its probability), "post" or "sigmoid" (its share among those that took the token);
        "auto" is "post" where the model scaled its weights to a sum of 1, else "orig".
    key: what experts choose by, "prob" or "logit" (None: the rule's own).
    capacity_rounding, min_capacity, capacity_multiple: of S k / E, tokens an expert.
    valid: an input [B, S] that is 0 where a row is padded; "auto": one that is named attention_mask; None: all positions are tokens.
    router_dtype: in which scores are computed, "float32" or "keep".
    layers: numbers of the mixtures to rewrite, "all" of them by default; those whose experts choose already are counted, too.
    allow_noncausal: rewrite a graph that does not look both ways as well. Each position then knows of later ones, the program says so
        (`leaks_future`), and loops that generate token by token refuse it.

    Raises:
        PassError: an option is out of range or does not fit the graph; positions of the graph do not all see one another; sequences have no
            fixed length, or one of 1; the program has functions for a schedule already.
    """

    name = "expert-choice"
    contract = Contract.SUBSTITUTION
    requires = frozenset({"experts-regrouped"})
    ensures = frozenset({"experts-choose"})
    before = frozenset({"slice-groups", "kv-cache"})

    k: int | None = option(None, "a number of experts, at least 1", lambda v: v is None or at_least(1)(v))
    schedule: Any = option(None, "a CapacitySchedule, or [kmin, kmax, shape, ratio]", lambda v: v is None or isinstance(v, tuple))
    rule: str = option("auto", f'"auto", {", ".join(RULES)}', one_of(("auto", *RULES)))
    key: str | None = option(None, '"prob", "logit" or none', one_of(_KEYS))
    capacity_rounding: str = option("floor", f"one of {', '.join(ROUNDINGS)}", one_of(tuple(ROUNDINGS)))
    min_capacity: int = option(1, "a number of tokens", at_least(0))
    capacity_multiple: int = option(1, "a number of tokens, at least 1", at_least(1))
    valid: str | None = option("auto", '"auto", none, or the name of an input', lambda v: v is None or isinstance(v, str))
    router_dtype: str = option("float32", '"float32" or "keep"', one_of(("float32", "keep")))
    layers: Any = option("all", '"all", or a list of mixtures', lambda v: v == "all" or all(at_least(0)(n) for n in v))
    allow_noncausal: bool = option(False, "true or false", lambda v: isinstance(v, bool))

    def __post_init__(self) -> None:
        if isinstance(self.schedule, CapacitySchedule):
            object.__setattr__(self, "schedule", astuple(self.schedule))
        super().__post_init__()
        if self.schedule is not None and self.k is not None:
            raise PassError(f"pass {self.name}: k={self.k} has no effect, since a schedule says how many: leave one of them out")
        _ = self._scheduled  # refuses one that is none

    @property
    def _scheduled(self) -> CapacitySchedule | None:
        try:
            return None if self.schedule is None else CapacitySchedule(*self.schedule)
        except TypeError as error:
            raise PassError(f"pass {self.name}: schedule is a CapacitySchedule, or [kmin, kmax, shape, ratio]: {error}") from None

    def run(self, rewriter: Rewriter) -> Outcome:
        if rewriter.function.name != "main":
            return Outcome()
        program, schedule = rewriter.program, self._scheduled
        sites, left = self._sites(program)
        if not sites:
            return Outcome(left)
        if "kmin" in program.schedules.get(SCHEDULE, {}):
            raise PassError(
                "expert-choice: the program has functions for a schedule of expert-choice already, in which this run would change nothing: "
                "name all mixtures in the one pass that has the schedule"
            )
        first = next(iter(sites.values()))
        padding = _padding_input(rewriter.function, first, self.valid)
        self._check_sizes(program, sites, schedule)
        sights = [(site, self._sight(rewriter, site, padding)) for site in _of_distinct_sequences(sites.values())]
        choices = {number: self._choice(site, schedule.kmax if schedule else self.k or site.k) for number, site in sites.items()}
        made = {number: figures(number, site, choices[number]) for number, site in sites.items()}
        texts = Counter(described(made[number], self.rule == "auto", site.renormalized) for number, site in sites.items())
        functions = self._add_functions(rewriter, schedule) if schedule else {}
        self._rewrite(rewriter, choices)
        lines = [f"{count} mixture{'s' if count > 1 else ''}: {text}" for text, count in texts.items()]
        lines += [described_schedule(schedule)] if schedule else []
        lines += [sight.evidence for _, sight in sights]
        lines.append("all positions are tokens" if padding is None else f"padding is read off the input {padding.target}")
        leak = None
        if self._mark(rewriter, schedule, functions, sights):
            leak, line = _leak(program, *next((site, sight) for site, sight in sights if sight.problem))
            lines.append(line)
        lines.append("this changes the model: expect worse outputs until its routers are trained for it")
        return Outcome(left, tuple(lines), {"expert_choice": [each.data() for each in made.values()], "leak": leak})

    def check(self, reference: Reference, after: Program) -> Verdict:
        """Where each expert takes all tokens, the layers are those in which each token chooses all experts; in float64 to 1e-10."""
        verdict = reference.judge_structure(after)
        if verdict.fails:
            return verdict
        sites, _ = self._sites(reference.program)
        return judge_limit(reference.program, reference.inputs, {number: self._rule(site) for number, site in sites.items()})

    def _sight(self, rewriter: Rewriter, site: Routed, padding: Node | None) -> Sight:
        """Raises PassError where experts may not choose among the positions of a site's sequences."""
        known = {padding, _padding_input(rewriter.function, site, "auto")} - {None}
        sight = look(rewriter.program, site.batch, int(site.length), [node for node in known if node is not None])
        if sight.problem and not sight.may_be_overridden:
            raise PassError(f"expert-choice: {sight.problem}: experts choose among the positions of whole sequences, so capture those")
        if sight.problem and not self.allow_noncausal:
            raise PassError(
                f"expert-choice: {sight.problem}: an expert that chooses among all positions would tell each of the later ones; "
                "allow_noncausal=true rewrites it all the same"
            )
        return sight

    # --- the mixtures ---

    def _sites(self, program: Program) -> tuple[dict[int, Routed], tuple[LeftAlone, ...]]:
        """The mixtures that experts can choose in, by number, and why not in others."""
        found = mixtures(program.main)
        numbers = [n for n, node in enumerate(found) if node.target is not gw.expert_mlp.default] if self.layers == "all" else self.layers
        unknown = [number for number in numbers if number >= len(found)]
        if unknown:
            raise PassError(f"expert-choice: layers names mixture {unknown[0]}, and there are {len(found)}; regroup-experts finds them")
        sites: dict[int, Routed] = {}
        left = []
        for number in numbers:
            site = routed(found[number])
            if isinstance(site, Routed) and site.probability == "sigmoid" and self.rule == "auto":
                site = NoMatch("its experts are chosen by sigmoids, from which no rule of gates follows: say rule=sigmoid", site.scores)
            if isinstance(site, Routed):
                sites[number] = site
            else:
                left.append(LeftAlone.at(site.node or found[number], site.reason))
        return sites, tuple(left)

    def _rule(self, site: Routed) -> str:
        return self.rule if self.rule != "auto" else "post" if site.renormalized else "orig"

    def _choice(self, site: Routed, k: int) -> Choice:
        rule = self._rule(site)
        sizes = Capacity(site.experts, self.capacity_rounding, self.min_capacity, self.capacity_multiple)
        return Choice(k, rule, self.key or RULES[rule], sizes, self.router_dtype == "keep")

    def _check_sizes(self, program: Program, sites: Mapping[int, Routed], schedule: CapacitySchedule | None) -> None:
        for number, site in sites.items():
            least, most = (schedule.kmin, schedule.kmax) if schedule else (self.k or site.k,) * 2
            if not isinstance(site.length, int):
                raise PassError(
                    "expert-choice: the length S of a sequence is known at the call only, and C = S k / E with it: capture with a fixed "
                    "length (the batch may be of any size)"
                )
            if most > site.experts:
                raise PassError(f"expert-choice: k={most} experts a token, and mixture {number} has {site.experts}: k is at most that")
            if self.min_capacity > site.length:
                raise PassError(f"expert-choice: min_capacity={self.min_capacity} tokens, and a sequence has {site.length}")
            if self._choice(site, least).capacity(site.length) == 0:
                raise PassError(
                    f"expert-choice: {site.length} x {least} / {site.experts} tokens an expert are none: raise k or min_capacity"
                )
        if schedule is not None:
            _check_rows(program, next(iter(sites.values())))

    # --- the rewrite ---

    def _rewrite(self, rewriter: Rewriter, choices: Mapping[int, Choice]) -> None:
        """Of the function that `rewriter` edits; numbers are those of its mixtures."""
        found = mixtures(rewriter.function)
        for number, choice in choices.items():
            site = routed(found[number])
            assert isinstance(site, Routed), "it was one in main, of which this function is a copy"
            with rewriter.step("let-experts-choose"):
                emit_choice(rewriter, site, choice, _padding_input(rewriter.function, site, self.valid))

    def _add_functions(self, rewriter: Rewriter, schedule: CapacitySchedule) -> dict[int, str]:
        """A copy of main for each k below the largest, before main is rewritten; k -> the function that runs it."""
        program, main = rewriter.program, rewriter.function
        functions = {k: f"experts_{k}" for k in range(schedule.kmin, schedule.kmax)}
        sites, _ = self._sites(program)
        for k, name in functions.items():
            with rewriter.step("add-capacity"):
                rewriter.add_function(Function(name, copy_graph(main.graph), main.in_tree, main.out_tree))
            inside = Rewriter(program, pass_name=self.name, function=name, fuel=rewriter.fuel, checked=rewriter.checked)
            self._rewrite(inside, {number: self._choice(site, k) for number, site in sites.items()})
            rewriter.records += inside.records
        return functions | {schedule.kmax: main.name}

    def _mark(
        self,
        rewriter: Rewriter,
        schedule: CapacitySchedule | None,
        functions: Mapping[int, str],
        sights: Sequence[tuple[Routed, Sight]],
    ) -> bool:
        """Keeps with the program what a call has to know. Whether positions were told of others that they did not see."""
        leaks = any(sight.problem for _, sight in sights)
        data: dict[str, Any] = {"leaks_future": leaks or leaks_future(rewriter.program)}
        if schedule is not None:
            data |= asdict(schedule) | {"k": list(functions), "functions": list(functions.values()), "length": int(sights[0][0].length)}
        if schedule is not None or leaks:
            with rewriter.step("keep-schedule"):
                rewriter.schedule(SCHEDULE, data)
        return leaks


def _of_distinct_sequences(sites: Iterable[Routed]) -> list[Routed]:
    """One site for each shape [B, S] of sequences."""
    found: list[Routed] = []
    for site in sites:
        if not any(same_size(site.batch, each.batch) and site.length == each.length for each in found):
            found.append(site)
    return found


def _leak(program: Program, site: Routed, sight: Sight) -> tuple[float | None, str]:
    """By how much the last token changes earlier outputs of a rewritten graph that hides it from them, and what to say of that."""
    leak = change_of_earlier_outputs(program, site.batch, int(site.length), sight.padding)
    if leak is None:
        return None, "whether positions know of later ones was not measured, since no probe was run: take it that they do"
    measured = f"the last token changes earlier outputs by {leak:.2g} of the largest, where it was {sight.change or 0.0:.2g} before"
    if leak > max(STAYS[False], sight.change or 0.0):
        return leak, f"{measured}: each position knows of later ones"
    return leak, f"{measured}, on the inputs that were tried: take it that positions know of later ones, since experts compare them all"


def _padding_input(function: Function, site: Routed, wanted: str | None) -> Node | None:
    """The input [B, S] that is 0 where a row is padded.

    Raises:
        PassError: it is named, and there is none of that name and shape.
    """
    if wanted is None:
        return None
    name = "attention_mask" if wanted == "auto" else wanted
    for node in function.placeholders:
        value = node.meta["val"]
        if node.target == name and isinstance(value, torch.Tensor) and value.dim() == 2:
            if all(same_size(a, b) for a, b in zip(value.shape, (site.batch, site.length), strict=True)):
                return node
    if wanted == "auto":
        return None
    raise PassError(f"expert-choice: valid={wanted!r} is no input [batch, length] of the graph: {', '.join(_names(function))}")


def _names(function: Function) -> list[str]:
    return [str(node.target) for node in function.placeholders if isinstance(node.meta["val"], torch.Tensor)]


def _check_rows(program: Program, site: Routed) -> None:
    """Raises PassError where main is no function of rows, each with a k of its own."""
    signature = program.main.signature()
    tensors = [(argument.name, argument.value) for argument in signature.inputs if isinstance(argument.value, torch.Tensor)]
    tensors += [(f"output {number}", value) for number, value in enumerate(signature.outputs) if isinstance(value, torch.Tensor)]
    unfit = [name for name, value in tensors if value.dim() == 0 or not same_size(value.size(0), site.batch)]
    if unfit or signature.states or signature.new_states:
        what = f"{unfit[0]} has no row for each sequence" if unfit else "it keeps a state"
        raise PassError(f"expert-choice: with a schedule each row runs at its own k, and {what}: capture the network alone, or give k=")
