"""What the compile report says of a recurrence: where it stands, what it keeps, what it costs on calibration tokens."""

from collections.abc import Sequence

from .emit import Form
from .measure import Quality
from .sites import Site, Sites


def described(
    form: Form,
    init: str,
    sites: Sites,
    chosen: Sequence[Site],
    errors: Sequence[float] = (),
    quality: Quality | None = None,
    fits: Sequence[dict[str, float]] = (),
) -> tuple[str, ...]:
    """Lines for the report."""
    whole = len(sites.found) + len(sites.refused)
    shape = f"chunk {form.chunk}, window {form.window}, sinks {form.sinks}, local {form.local}, rotary by {form.rope}"
    lines = [f"{len(chosen)} of {whole} attentions: {_name(form, init)}, {shape}"]
    if quality is not None:
        lines.append(f"error of a layer, mean square over that of its output: {sum(errors) / len(errors):.3g}, at most {max(errors):.3g}")
        for name in ("closed", "mean", "fitted") if fits else ():
            lines.append(f"with {name} gates: {sum(each[name] for each in fits) / len(fits):.3g} in the mean of layers")
        lines.append(f"logits: KL {quality.kl:.3g} nats a token, perplexity {quality.before:.4g} -> {quality.after:.4g}")
    else:
        lines.append("its quality is unmeasured: give calibration= tokens to see the error of each layer, KL and perplexity")
    lines.append(
        "this changes the model, whose quality needs training: compile with trainable=True; the new weights are those of kind added"
    )
    return tuple(lines)


def _name(form: Form, init: str) -> str:
    """Closed gates keep the last token of a chunk and nothing else, so that is no recurrence."""
    if init == "closed" and form.chunk > 1:
        return "dilated sparse attention (gates are closed, and closed gates do not learn)"
    return f"chunked recurrence with {init} gates"
