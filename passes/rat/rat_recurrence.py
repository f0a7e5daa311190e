"""Chunked recurrence with softmax across chunks in the place of causal attention, whose weights stay.

    attention(rope(q), rope(k), v, causal)  ->  gw.rat_attention(q, k, v, linear(h, W_g, b_g), chunk_bias, cos, sin, chunk, window, ..)

q, k and v are products of h as before. A summary of each chunk behind the window, and what is near, is all that a token sees, so that a
cache keeps T / chunk entries and the window. Sources: RAT (arXiv 2507.04416), RAT+ (2602.18196); specs/rat.md, section 3.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...ir import Program, Rewriter
from ...ir.errors import PassError
from ...ir.pattern import NoMatch
from ..base import LeftAlone, Outcome, Pass
from ..calibration import given
from ..check import Reference
from ..contract import Contract
from ..options import at_least, one_of, option
from ..verdict import Verdict, worst_of
from .emit import Emitter, Form
from .fit import fit
from .gates import Gates, initial
from .judge import with_chunks_of_one, with_window_over_all
from .measure import Watched
from .report import Measured, described
from .sites import RAT, Site, Sites, find_sites, recurrences_of

aten = torch.ops.aten


@dataclass(frozen=True)
class RatRecurrence(Pass):
    """Causal attentions become a gated recurrence inside chunks and softmax across them. This changes the model: it needs training.

    chunk, window, sinks: tokens of a chunk; tokens before each that it sees by themselves; first tokens that all see (with local="raw" up
        to a multiple of the chunk). Everything else is seen as the last state of its chunk.
    local: near tokens as keys and values ("raw", each past token is then seen once, given resets) or as states ("state").
    reset: whether a chunk starts from nothing. Without, closed gates carry nothing into a chunk, and mean ones count the state before it as
        one token more.
    rope: the time that turns a token: its own ("token") or its chunk's number ("chunk").
    init: gates before training: "closed", "mean", "chrono", or "fit", which minimises each layer's error on `calibration`, given what the
        layer reads and gives in the original model; activations of several layers are held at once, up to 1 GiB.
    gate: logits of each channel ("channel") or head ("head") of keys from the layer's input, or constants ("bias").
    output_gate: a gate 2 sigmoid(W_z h), 1 at first, on what each layer gives.
    summary_bias: added to scores of summaries; "log_chunk" is log(chunk), as if each stood for the tokens of its chunk.
    layers, others: which attentions, "all", "even" or a list of places among all of the model, from 0 on; the rest is kept, or sees so many
        tokens before it.
    assume_causal: takes a mask for causal that an input gives. Rows must start at position 0, without padding on the left.
    calibration: batches of tokens i64[B, T], on which the report's errors are measured.

    Raises (on construction): PassError: options out of range or that need others.
    """

    name = "rat-recurrence"
    contract = Contract.SUBSTITUTION
    ensures = frozenset({"chunked-recurrence"})
    before = frozenset({"kv-cache", "layer-skip", "slice-groups"})

    chunk: int = option(16, "a number of tokens, at least 1", at_least(1))
    window: int = option(256, "a number of tokens", at_least(0))
    sinks: int = option(16, "a number of tokens", at_least(0))
    local: str = option("raw", '"raw" or "state"', one_of(("raw", "state")))
    reset: bool = option(True, "true or false", lambda v: isinstance(v, bool))
    rope: str = option("token", '"token" or "chunk"', one_of(("token", "chunk")))
    init: str = option("mean", '"closed", "mean", "chrono" or "fit"', one_of(("closed", "mean", "chrono", "fit")))
    gate: str = option("channel", '"channel", "head" or "bias"', one_of(("channel", "head", "bias")))
    output_gate: bool = option(False, "true or false", lambda v: isinstance(v, bool))
    summary_bias: Any = option(0.0, 'a finite number, or "log_chunk"', lambda v: v == "log_chunk" or _is_number(v))
    layers: Any = option("all", '"all", "even" or a list of layers', lambda v: v in ("all", "even") or _is_layers(v))
    others: Any = option("keep", '"keep" or a number of tokens', lambda v: v == "keep" or at_least(0)(v))
    assume_causal: bool = option(False, "true or false", lambda v: isinstance(v, bool))
    calibration: Any = option(None, "an iterable of tokens [B, T]", lambda v: v is None or isinstance(v, Iterable), spelled=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.calibration, Iterator):  # a program is measured more than once
            object.__setattr__(self, "calibration", tuple(given(self.calibration)))
        if self.init == "fit" and self.calibration is None:
            raise PassError(f"pass {self.name}: init=fit is fitted to tokens: give calibration=, an iterable of tensors [B, T]")
        if self.init == "chrono" and self.chunk == 1:
            raise PassError(f"pass {self.name}: init=chrono spreads memories over a chunk, and chunk=1 has none: take closed or mean")

    @property
    def form(self) -> Form:
        sinks = -(-self.sinks // self.chunk) * self.chunk if self.local == "raw" else self.sinks
        return Form(self.chunk, self.window, sinks, self.local, self.reset, self.rope, self.gate, self.output_gate)

    def run(self, rewriter: Rewriter) -> Outcome:
        if rewriter.function.name != "main":
            return Outcome()
        program = rewriter.program
        if "decode" in program.functions:
            raise PassError("rat-recurrence: the program has functions of one step already, which would keep other caches: start from main")
        sites = self._sites(rewriter)
        chosen, left = self._chosen(sites)
        watched = None if self.calibration is None else self._watched(program.copy())
        gates, fits = self._gates(chosen, watched)
        self._emit(Emitter(rewriter, sites, self.form), sites, dict(zip(chosen, gates, strict=True)))
        if watched is None:
            return Outcome(left, described(self.form, self.init, sites, chosen))
        errors = [min(each.values()) for each in fits] or watched.errors(_twins(watched.sites, chosen), self.form, gates)
        quality = watched.quality(program)
        lines = described(self.form, self.init, sites, chosen, Measured(watched.longest, errors, quality, fits))
        data = {"layer_errors": errors, "kl": quality.kl, "perplexity": [quality.before, quality.after], "fits": fits}
        return Outcome(left, lines, data)

    def _emit(self, emitter: Emitter, sites: Sites, gates: Mapping[Site, Gates]) -> None:
        """In the program's order: sizes and rotary rows stand before the first attention that needs them, for all behind it."""
        narrowed = self._windowed(sites, gates)
        for site in sites.found:
            if site in gates:
                with emitter.rewriter.step("rat-recurrence"):
                    emitter.recurrence(site, gates[site])
            elif site in narrowed:
                with emitter.rewriter.step("window"):
                    emitter.window(site, self.others)

    def check(self, reference: Reference, after: Program) -> Verdict:
        """At its limit points the rewritten program is the original, exactly. Rotary times of chunks and windows of other layers have
        none, so the pass is judged without them."""
        verdict = reference.judge_structure(after)
        if verdict.fails:
            return verdict
        candidate = after
        if self.rope == "chunk" or self.others != "keep":
            candidate = reference.program.copy()
            replace(self, rope="token", others="keep", calibration=None, init="mean").run(Rewriter(candidate, pass_name=self.name))
        sites = find_sites(reference.program, reference.program.main, self.assume_causal)
        if isinstance(sites, NoMatch):
            return Verdict("wrong", f"the original is no decoder: {sites.reason}")
        length = reference.inputs[reference.program.main.placeholders.index(sites.tokens)].shape[1]
        kept = recurrences_of(reference.program.main)
        limits = (with_chunks_of_one(candidate, kept), with_window_over_all(candidate, length, kept))
        return worst_of([reference.judge_exact(limit) for limit in limits])

    # --- sites ---

    def _sites(self, rewriter: Rewriter) -> Sites:
        sites = find_sites(rewriter.program, rewriter.function, self.assume_causal)
        if isinstance(sites, NoMatch):
            raise PassError(_refusal(sites))
        if not sites.found:
            reasons = [reason for _, reason in sites.refused if reason.node is None or reason.node.target is not RAT]
            raise PassError(_refusal(reasons[0]) if reasons else "rat-recurrence: each attention is a chunked recurrence already")
        return sites

    def _chosen(self, sites: Sites) -> tuple[list[Site], tuple[LeftAlone, ...]]:
        """The attentions to replace, in the program's order, and why others stay."""
        found = {site.index: site for site in sites.found}
        known = sorted({*found, *(index for index, _ in sites.refused)})
        wanted = known if self.layers == "all" else [n for n in known if n % 2 == 0] if self.layers == "even" else list(self.layers)
        refused = {index: reason for index, reason in sites.refused}
        for index in wanted:
            if index not in known:
                raise PassError(f"rat-recurrence: layers name attention {index}, and there are {known[0]} to {known[-1]}")
            if not isinstance(self.layers, str) and index in refused:
                raise PassError(f"rat-recurrence: attention {index} is not taken: {_told(refused[index])}")
        reasons = {site.index: self._unfit_window(site) for site in sites.found}
        chosen = [site for site in sites.found if site.index in wanted and not reasons[site.index]]
        left = [LeftAlone.at(reason.node, reason.reason) for _, reason in sites.refused if reason.node is not None]
        left += [LeftAlone.at(found[index].root, reasons[index]) for index in wanted if index in found and reasons[index]]
        if not chosen:
            raise PassError(f"rat-recurrence: no attention is left to replace: {left[0].reason if left else 'layers names none'}")
        return chosen, tuple(left)

    def _unfit_window(self, site: Site) -> str:
        if not site.window or (not isinstance(self.layers, str) and self.window + 1 >= site.window):
            return ""
        return (
            f"it sees {site.window} tokens alone, and a recurrence sees all before: name it in layers=[{site.index}], "
            f"with a window of at least {site.window - 1}, if that is meant"
        )

    def _windowed(self, sites: Sites, chosen: Collection[Site]) -> list[Site]:
        if self.others == "keep":
            return []
        rest = [site for site in sites.found if site not in chosen and not site.window]
        written_out = next((site for site in rest if site.root.target is not aten.scaled_dot_product_attention.default), None)
        if written_out is not None:
            raise PassError(
                f"rat-recurrence: attention {written_out.index} is written out as products and a softmax, and others={self.others} "
                "narrows scaled_dot_product_attention alone: take others=keep"
            )
        return rest

    # --- gates and measures ---

    def _watched(self, before: Program) -> Watched:
        sites = find_sites(before, before.main, self.assume_causal)
        assert isinstance(sites, Sites), "a copy is what it was made from"
        return Watched(before, sites, self.calibration)

    def _gates(self, chosen: Sequence[Site], watched: Watched | None) -> tuple[list[Gates], list[dict[str, float]]]:
        bias = math.log(self.chunk) if self.summary_bias == "log_chunk" else float(self.summary_bias)
        if self.init != "fit":
            return [initial(self.init, self._channels(site), self.chunk, self.reset, bias, site.index) for site in chosen], []
        assert watched is not None, "init=fit has calibration"
        if watched.longest <= self.form.unchanged:
            raise PassError(
                f"rat-recurrence: init=fit needs calibration rows of more than {self.form.unchanged} tokens (window, chunk and sinks): "
                "shorter ones are the same whatever the gates"
            )
        found = []
        for site, seen in zip(chosen, watched.by_layer(_twins(watched.sites, chosen)), strict=True):
            found.append(fit(seen, self.form, site.attention.scale, self._channels(site), bias))
            if not all(map(math.isfinite, found[-1].errors.values())):
                raise PassError(
                    f"rat-recurrence: attention {site.index} is not finite on calibration tokens, so no gates can be fitted to it"
                )
        return [each.gates for each in found], [each.errors for each in found]

    def _channels(self, site: Site) -> int:
        _, heads, _, width = site.k.meta["val"].shape
        return heads if self.gate == "head" else heads * width


def _twins(sites: Sites, chosen: Sequence[Site]) -> list[Site]:
    """Those of a copy of the program."""
    wanted = {site.index for site in chosen}
    return [each for each in sites.found if each.index in wanted]


def _refusal(reason: NoMatch) -> str:
    return f"rat-recurrence needs causal attention of a decoder: {_told(reason)}"


def _told(reason: NoMatch) -> str:
    where = str(reason.node.meta.get("where") or "") if reason.node is not None else ""
    return reason.reason + (f" (at {where})" if where else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_layers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
