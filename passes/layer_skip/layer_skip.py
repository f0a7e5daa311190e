"""Fewer layers the later a token stands: a schedule from decode steps to sets of layers, one static function for each set.

    decode(h)  ->  decode_1(h), decode_2(h), ..       h_{l+1} = h_l for layers l that are left out
    schedule "layer-skip" = {"levels": .., "level_of_step": .., "functions": ..}

With mode="speculative" the shallow function drafts tokens and `verify` accepts those that all layers would have given. Sources: SkipDecode
(arXiv 2307.02628), LayerSkip (2404.16710), D3 (2503.08524), ShortGPT; specs/layer_skip.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...ir import Program, Rewriter
from ...ir.errors import PassError
from ...ir.pattern import NoMatch
from ..base import Outcome, Pass
from ..calibration import given
from ..check import Reference
from ..contract import Contract
from ..kv_cache import steps
from ..kv_cache.cache_sizes import cache_sizes
from ..kv_cache.decoder import Decoder, find_decoder
from ..kv_cache.steps import Bypass, Skipped
from ..options import at_least, between, one_of, option
from ..progress import progress_bar
from ..verdict import Verdict
from .draft import add_draft, shared_until
from .judge import judge_levels
from .ranking import METRICS, Calibration, Profile, Tell
from .report import described
from .schedule import Schedule, counts, of_counts, ranked_sets, top_sets
from .units import Unit, find_units

SCHEDULE = "layer-skip"
_TABLE = "a list of lists of layers, the first the largest"
_FALL = ("decay", "n_max", "n_min", "horizon", "alpha")  # options that say how many layers run at a step,
_CHOICE = ("rank", "warmup", "effort")  # and which ones they are


@dataclass(frozen=True)
class LayerSkip(Pass):
    """Decode functions with fewer layers, and the schedule that says when they run.

    mode: "schedule" runs them as scheduled, which changes the model; "speculative" drafts with one of them and checks with all layers,
        which leaves greedy output as it was.
    decay, n_max, n_min, horizon, alpha: layers at decode step i, from n_max (None: all) to n_min over `horizon` tokens: "linear", "power"
        (n_max * alpha^i) or "constant" (n_min at once).
    warmup, rank: which layers n are: "top" keeps the `warmup` lowest and the highest others; a metric ("output_kl", "block_influence",
        "relative", "cosine", "causal", "future", "logit_lens") keeps those that matter most on `calibration`; a list is the ranking itself,
        those that matter most first.
    levels, level_of_step: a table of ones own in place of all these.
    clock: what a step's index in the schedule counts: "step" the tokens that were generated, "position" those of the prompt too, so that
        rows of prompts of different lengths are on different levels and run apart.
    prefill: "full" runs the prompt on all layers, "first" on those of the first level (layers are ranked with all in the prompt: which
        level is the first is not known before).
    unit: "layer", or "sublayer" for each attention and MLP by itself.
    calibration: batches of tokens i64[B, T]; with them the KL of each level is measured, and levels beyond `max_kl` nats are left out.
    effort: "greedy" drops the layer that costs least and measures again, about N^2 / 2 passes; "one_shot" sorts N single removals.
    gamma, draft: tokens of a draft (None: chosen as it runs, by what is measured); its layers (None: the first half of the ranking).
    reuse_prefix: all layers judge a draft from the first on that it leaves out, by the hidden states that it has up to there.
    compensation: "scale" multiplies what a unit that is left out reads by the mean growth |h_{l+1}| / |h_l| on `calibration` (AdaSkip).
    merge: "down" lets rows of several levels run together on the smallest, which binds them from then on.

    Raises (on construction): PassError: options out of range, or that need calibration where there is none.
    """

    name = "layer-skip"
    requires = frozenset({"explicit-caches"})
    ensures = frozenset({"layer-schedule"})
    before = frozenset({"slice-groups"})

    mode: str = option("schedule", '"schedule" or "speculative"', one_of(("schedule", "speculative")))
    decay: str = option("linear", '"linear", "power" or "constant"', one_of(("linear", "power", "constant")))
    n_max: int | None = option(None, "a number of layers, at least 1", lambda v: v is None or at_least(1)(v))
    n_min: int | None = option(None, "a number of layers, at least 1", lambda v: v is None or at_least(1)(v))
    horizon: int | None = option(None, "a number of tokens, at least 1", lambda v: v is None or at_least(1)(v))
    alpha: float = option(0.995, "a factor above 0, at most 1", lambda v: between(0.0, 1.0)(v) and v > 0)
    warmup: int = option(1, "a number of layers", at_least(0))
    rank: Any = option(
        "top", f'"top", one of {", ".join(METRICS)}, or a list of layers', lambda v: v == "top" or v in METRICS or _is_layers(v)
    )
    levels: Any = option(None, _TABLE, lambda v: v is None or (len(v) > 0 and all(_is_layers(level) for level in v)))
    level_of_step: Any = option(None, "a list of levels, one for each step", lambda v: v is None or (len(v) > 0 and _is_layers(v)))
    clock: str = option("step", '"step" or "position"', one_of(("step", "position")))
    prefill: str = option("full", '"full" or "first"', one_of(("full", "first")))
    unit: str = option("layer", '"layer" or "sublayer"', one_of(("layer", "sublayer")))
    calibration: Any = option(None, "an iterable of tokens [B, T]", lambda v: v is None or isinstance(v, Iterable), spelled=False)
    max_kl: float | None = option(None, "a number of nats, at least 0", lambda v: v is None or at_least(0.0)(v))
    effort: str = option("greedy", '"greedy" or "one_shot"', one_of(("greedy", "one_shot")))
    gamma: int | None = option(None, "a number of tokens, at least 0", lambda v: v is None or at_least(0)(v))
    draft: Any = option(None, "a list of layers", lambda v: v is None or _is_layers(v))
    reuse_prefix: bool = option(False, "true or false", one_of((True, False)))
    compensation: str | None = option(None, '"scale"', one_of((None, "scale")))
    merge: str = option("never", '"never" or "down"', one_of(("never", "down")))

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.levels, tuple):
            object.__setattr__(self, "levels", tuple(map(tuple, self.levels)))
        if isinstance(self.calibration, Iterator):  # a program is measured more than once
            object.__setattr__(self, "calibration", tuple(given(self.calibration)))
        measured = {
            f"rank={self.rank}": self.rank in METRICS,
            "max_kl": self.max_kl is not None,
            f"compensation={self.compensation}": self.compensation is not None,
        }
        wanted = next((name for name, asked in measured.items() if asked), None)
        if self.calibration is None and wanted is not None:
            raise PassError(f"pass {self.name}: {wanted} is measured on tokens: give calibration=, an iterable of tensors [B, T]")
        if self.n_min is not None and self.n_max is not None and self.n_min > self.n_max:
            raise PassError(f"pass {self.name}: n_min={self.n_min} is above n_max={self.n_max}")
        if self.rank == "top" and self.n_min is not None and self.warmup > self.n_min:
            raise PassError(f"pass {self.name}: warmup={self.warmup} layers run at every step, which n_min={self.n_min} does not hold")
        if self.level_of_step is not None and self.levels is None:
            raise PassError(f"pass {self.name}: level_of_step needs levels, {_TABLE}")
        self._refuse_idle_options()

    def _refuse_idle_options(self) -> None:
        """Raises PassError for an option that the others leave without effect."""
        if self.mode == "speculative":
            scheduled = (*_FALL, "levels", "level_of_step", "clock", "prefill", "max_kl", "merge")
            self._refuse(scheduled, "a draft has the layers draft= throughout")
        else:
            self._refuse(("gamma", "draft", "reuse_prefix"), "only mode=speculative drafts")
        if self.levels is not None:
            self._refuse((*_FALL, *_CHOICE), "levels are a table of their own")
        if self.draft is not None:
            self._refuse(_CHOICE, "draft names the layers")
        if self.decay != "power":
            self._refuse(("alpha",), "only decay=power falls by a factor")

    def _refuse(self, names: Sequence[str], reason: str) -> None:
        defaults = {each.name: each.default for each in fields(self)}
        idle = next((name for name in names if getattr(self, name) != defaults[name]), None)
        if idle is not None:
            raise PassError(f"pass {self.name}: {idle} has no effect, since {reason}: leave it out")

    @property
    def contract(self) -> Contract:
        return Contract.POLICY if self.mode == "speculative" else Contract.SUBSTITUTION

    def run(self, rewriter: Rewriter) -> Outcome:
        if rewriter.function.name != "main":
            return Outcome()
        program = rewriter.program
        if SCHEDULE in program.schedules:
            raise PassError(
                "layer-skip: the program has a schedule of layers already, whose functions would be in the way: start from one without"
            )
        decoder = find_decoder(program, rewriter.function)
        if isinstance(decoder, NoMatch):
            raise PassError(f"layer-skip: main is no decoder any more: {decoder.reason}")
        if self.mode == "speculative" and "verify" not in program.functions:
            raise PassError(
                "layer-skip: a chunked recurrence cannot take drafted tokens back, since it forgets what left its window: "
                "take mode=schedule, or compile without rat-recurrence"
            )
        units = find_units(program, decoder, self.unit)
        with progress_bar("ranking layers") as bar:
            profile = self._profile(program, decoder, units, None if bar is None else lambda done, whole: bar(done, whole, None))
            ranking = self._ranking(units, profile)
        units = units if profile is None else list(profile.units)  # with scales where they compensate
        if self.mode == "speculative":
            return self._speculative(rewriter, decoder, units, ranking, profile)
        schedule, kls = self._within(self._schedule(units, ranking), profile)
        with rewriter.step("schedule-layers"):
            functions = self._add_levels(rewriter, decoder, units, schedule)
            rewriter.schedule(
                SCHEDULE,
                {
                    "mode": "schedule",
                    "levels": [list(level) for level in schedule.levels],
                    "level_of_step": list(schedule.level_of_step),
                    "functions": functions,
                    "clock": self.clock,
                    "prefill": self.prefill,
                    "merge": self.merge,
                    **self._origin(units, kls, profile),
                },
            )
        lines = (*described(program, units, schedule, functions, kls, self.clock), *self._measured(profile))
        return Outcome(lines=lines, data={"kl_of_level": kls})

    def check(self, reference: Reference, after: Program) -> Verdict:
        """`main` stays; the functions of all levels together give what the schedule means, in float64 to 1e-10."""
        verdict = reference.judge_exact(after)
        if verdict.kind != "right":
            return verdict
        return judge_levels(after, reference.inputs, after.schedules[SCHEDULE], self.unit)

    # --- the schedule ---

    def _schedule(self, units: Sequence[Unit], ranking: Sequence[int] | None) -> Schedule:
        total = len(units)
        if self.levels is not None:
            unknown = sorted({index for level in self.levels for index in level} - set(range(total)))
            if unknown:
                raise PassError(f"layer-skip: levels name {self.unit} {unknown[0]}, and there are 0 to {total - 1}")
            levels = tuple(tuple(sorted(set(level))) for level in self.levels)
            return Schedule(levels, self.level_of_step or tuple(range(len(levels))))
        n_max = total if self.n_max is None else self.n_max
        n_min = n_max if self.n_min is None else self.n_min
        if n_max > total or n_min > n_max:
            raise PassError(f"layer-skip: n_min={n_min}, n_max={n_max} do not fit {total} {self.unit}s: 1 <= n_min <= n_max <= {total}")
        if ranking is None and self.warmup > n_min:
            raise PassError(f"layer-skip: warmup={self.warmup} {self.unit}s run at every step, which the {n_min} of the last do not hold")
        if n_min < n_max and self.decay != "constant" and self.horizon is None:
            raise PassError(f"layer-skip: say over how many tokens layers fall from {n_max} to {n_min}: horizon=256")
        numbers = counts(self.decay, n_max, n_min, self.horizon or 1, self.alpha)
        return of_counts(numbers, top_sets(total, self.warmup) if ranking is None else ranked_sets(ranking))

    def _ranking(self, units: Sequence[Unit], profile: Profile | None) -> list[int] | None:
        """Layers by how much they matter, or None for "top"."""
        if self.rank == "top":
            return None
        if self.rank in METRICS:
            assert profile is not None, "construction refused a metric without calibration"
            return profile.ranking(self.rank, self.n_min or 1, self.effort)
        if sorted(self.rank) != list(range(len(units))):
            raise PassError(f"layer-skip: rank must name each of the {len(units)} {self.unit}s once, those that matter most first")
        return list(self.rank)

    def _measured(self, profile: Profile | None) -> list[str]:
        if profile is None:
            return []
        scales = [f"{unit.index}: {unit.scale:.4g}" for unit in profile.units if self.compensation is not None]
        compensated = [f"what a {self.unit} that is left out reads is multiplied by {', '.join(scales)}"] if scales else []
        return compensated + (profile.lines(self.rank) if self.rank in METRICS else [])

    def _profile(self, program: Program, decoder: Decoder, units: Sequence[Unit], tell: Tell | None) -> Profile | None:
        if self.calibration is None:
            return None
        calibration = Calibration.of(self.calibration, program, decoder)
        return Profile(program, decoder, units, calibration, tell, compensates=self.compensation is not None)

    def _within(self, schedule: Schedule, profile: Profile | None) -> tuple[Schedule, list[float]]:
        """The schedule without levels beyond `max_kl`, and the KL of each that stays."""
        if profile is None:
            return schedule, []
        kls = [profile.kl(level, schedule.levels[0] if self.prefill == "first" else None) for level in schedule.levels]
        if self.max_kl is None:
            return schedule, kls
        kept = next((n for n, kl in enumerate(kls) if kl > self.max_kl), len(kls))
        if kept == 0:
            raise PassError(f"layer-skip: the first level already costs {kls[0]:.3g} nats, more than max_kl={self.max_kl:g}: raise n_max")
        steps_of = tuple(min(level, kept - 1) for level in schedule.level_of_step)
        return Schedule(schedule.levels[:kept], steps_of), kls[:kept]

    def _origin(self, units: Sequence[Unit], kls: Sequence[float], profile: Profile | None) -> dict[str, Any]:
        """What the layers were chosen by, for whoever reads the schedule later."""
        rank = list(self.rank) if isinstance(self.rank, tuple) else self.rank
        is_table = self.levels is not None or self.draft is not None
        origin = {"rank": "table" if is_table else rank, "decay": self.decay, "kl": [float(f"{kl:.6g}") for kl in kls]}
        if profile is not None:
            origin["calibration"] = profile.calibration.digest
        scales = {} if self.compensation is None else {"scales": [unit.scale for unit in units]}
        return {"unit": self.unit, "units": len(units), "origin": origin} | scales

    # --- functions ---

    def _add_levels(self, rewriter: Rewriter, decoder: Decoder, units: Sequence[Unit], schedule: Schedule) -> list[str]:
        """The name of each level's function, made where it is none that is there."""
        program, sizes, names = rewriter.program, cache_sizes(rewriter.program.symbols, decoder), []
        for number, level in enumerate(schedule.levels):
            skipped = _skipped(units, level)
            name = "decode" if not skipped else f"decode_{number}"
            if skipped:
                rewriter.add_function(steps.decode(program, decoder, sizes, name=name, skipped=skipped))
            names.append(name)
        first = _skipped(units, schedule.levels[0])
        if self.prefill == "first" and first:
            rewriter.add_function(steps.prefill(program, decoder, sizes, skipped=first))
        return names

    def _speculative(
        self, rewriter: Rewriter, decoder: Decoder, units: Sequence[Unit], ranking: Sequence[int] | None, profile: Profile | None
    ) -> Outcome:
        total = len(units)
        size = max(total // 2, 1)
        if self.draft is None and ranking is None and self.warmup > size:
            raise PassError(f"layer-skip: warmup={self.warmup} layers are more than the {size} of a draft: name its layers with draft=")
        sets = top_sets(total, self.warmup) if ranking is None else ranked_sets(ranking)
        layers = tuple(sorted(set(self.draft))) if self.draft is not None else sets[size - 1]
        if not layers or set(layers) - set(range(total)):
            raise PassError(f"layer-skip: draft={list(layers)} must name some of the {self.unit}s 0 to {total - 1}")
        kls = [] if profile is None else [profile.kl(layers)]
        hidden = shared_until(decoder, units, layers) if self.reuse_prefix else None
        with rewriter.step("draft-layers"):
            add_draft(rewriter, decoder, _skipped(units, layers), hidden)
            rewriter.schedule(
                SCHEDULE,
                {
                    "mode": "speculative",
                    "levels": [list(range(total))],
                    "level_of_step": [0],
                    "functions": ["decode"],
                    "prefill": "full",
                    "merge": "never",
                    "draft": "draft",
                    "draft_layers": list(layers),
                    "gamma": self.gamma,
                    "reuse_prefix": self.reuse_prefix,
                    **self._origin(units, kls, profile),
                },
            )
        count = "as many tokens as gain most" if self.gamma is None else f"{self.gamma} tokens"
        shown = f"drafts {count} with {len(layers)} of {total} {self.unit}s: {', '.join(map(str, layers))}"
        lines = [shown] + [f"KL of the draft: {kl:.3g} nats a token" for kl in kls]
        return Outcome(lines=(*lines, *self._measured(profile)), data={"kl_of_level": kls})


def _skipped(units: Sequence[Unit], level: Sequence[int]) -> Skipped:
    return {unit.result: Bypass(unit.source, unit.scale) for unit in units if unit.index not in level}


def _is_layers(value: Any) -> bool:
    return not isinstance(value, str) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
