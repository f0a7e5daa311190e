"""What the compile report says of a recurrence: where it stands, what it keeps, what it costs on calibration tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from .emit import Form
from .fit import kept
from .measure import Quality
from .sites import Site, Sites


@dataclass(frozen=True)
class Measured:
    """On calibration tokens, of which the longest row has `longest`: the error of each replaced layer, the quality end to end, and with
    init="fit" the errors of the gates that each layer could choose among."""

    longest: int
    errors: Sequence[float]
    quality: Quality
    fits: Sequence[dict[str, float]]


def described(form: Form, init: str, sites: Sites, chosen: Sequence[Site], measured: Measured | None = None) -> tuple[str, ...]:
    """Lines for the report."""
    whole, fits = len(sites.found) + len(sites.refused), () if measured is None else measured.fits
    rotary = f"rotary by {form.rope}" if any(site.cos is not None for site in chosen) else "no rotary positions"
    resets = "" if form.reset else ", no resets"
    shape = f"chunk {form.chunk}, window {form.window}, sinks {form.sinks}, local {form.local}{resets}, {rotary}"
    return (
        f"{len(chosen)} of {whole} attentions: {_name(form, init, len(chosen), fits)}, {shape}",
        *_cost(form, measured),
        f"this changes the model, whose quality needs training{_on_rows(form)}: compile with trainable=True; the new weights are those of "
        "kind added",
    )


def _cost(form: Form, measured: Measured | None) -> list[str]:
    if measured is None:
        return ["its quality is unmeasured: give calibration= tokens to see the error of each layer, KL and perplexity"]
    errors, quality, fits = measured.errors, measured.quality, measured.fits
    lines = [f"error of a layer, mean square over that of its output: {sum(errors) / len(errors):.3g}, at most {max(errors):.3g}"]
    for name in ("closed", "mean", "fitted") if fits else ():
        lines.append(f"with {name} gates: {sum(each[name] for each in fits) / len(fits):.3g} in the mean of layers")
    lines.append(f"logits: KL {quality.kl:.3g} nats a token, perplexity {quality.before:.4g} -> {quality.after:.4g}")
    if measured.longest <= form.unchanged:
        lines.append(
            f"these figures say nothing: rows of up to {form.unchanged} tokens are the original's, and calibration has no longer ones"
        )
    return lines


def _on_rows(form: Form) -> str:
    """Shorter rows give gates no gradient."""
    return f" on rows of more than {form.unchanged} tokens" if form.unchanged else ""


def _name(form: Form, init: str, count: int, fits: Sequence[dict[str, float]]) -> str:
    """Closed gates keep the last token of a chunk and nothing else, so that is no recurrence."""
    closed = count if init == "closed" else sum(kept(each) == "closed" for each in fits)
    recurrence = f"chunked recurrence with {'fitted' if init == 'fit' else init} gates"
    if form.chunk == 1 or not closed:
        return recurrence
    sparse = "dilated sparse attention (gates are closed, and closed gates do not learn)"
    return sparse if closed == count else f"{recurrence}, {closed} of them {sparse}"
