"""The formats that passes offer: all but those for analysis, which no kernel runs, and the unsigned one, which a shift brings."""

from ...ir.low_bit import FORMATS

WEIGHTS = tuple(name for name, form in FORMATS.items() if form.weight and form.bits != 6)
ACTIVATIONS = ("none", *(name for name, form in FORMATS.items() if form.activation and form.bits != 6 and name != "uint4-g64"))
