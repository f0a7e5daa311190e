"""The table of formats: what an element is, how large its blocks are, and what their scales are.

A value is `code * scale` with one scale for each block of `group` neighbours along K. Error figures are root mean squares of
v - Q(v) over those of v for normal v (512 x 4096).
"""

from dataclasses import dataclass

ROW = 0  # the group of a format with one scale a row


@dataclass(frozen=True)
class Format:
    """One low-bit format.

    element: "int" (two's complement), "uint", "e2m1", "e2m3" or "e4m3". bits: of a code. qmax: the largest value of a code.
    group: elements that share a scale, `ROW` for all of a row. scale: "model" (in the model's dtype), "f32", "e8m0" (a power of
    two, rounded up) or "nv" (e4m3 under one f32 for the tensor). half_step: |v - Q(v)| <= half_step * scale.
    gaussian_error: relative RMS error on normal data. weight, activation: what it may be used for.
    """

    name: str
    element: str
    bits: int
    qmax: float
    group: int
    scale: str
    half_step: float
    gaussian_error: float
    weight: bool = True
    activation: bool = True

    @property
    def is_packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.bits == 4

    def group_of(self, k: int) -> int:
        """The elements that share a scale in rows of `k`."""
        return self.group or k

    def bits_per_weight(self, k: int, scale_bits: int = 16) -> float:
        """Bits of a weight with its share of the scale, `scale_bits` those of a scale in the model's dtype."""
        bits = {"model": scale_bits, "f32": 32, "e8m0": 8, "nv": 8}[self.scale]
        return (self.bits if self.bits in (4, 8) else 8) + bits / self.group_of(k)


def _int4(group: int, error: float) -> Format:
    return Format(f"int4-g{group}", "int", 4, 7, group, "model", 0.5, error)


_ALL = (
    _int4(16, 0.086),
    _int4(32, 0.097),
    _int4(64, 0.108),
    _int4(128, 0.118),
    Format("uint4-g64", "uint", 4, 15, 64, "model", 0.5, 0.108, weight=False),
    Format("int8-channel", "int", 8, 127, ROW, "f32", 0.5, 0.0087, activation=False),
    Format("int8-token", "int", 8, 127, ROW, "f32", 0.5, 0.0087, weight=False),
    Format("u8-tensor", "uint", 8, 255, ROW, "f32", 0.5, 0.0112, weight=False),
    Format("mxint8", "int", 8, 127, 32, "e8m0", 0.5, 0.0083),
    Format("mxint6", "int", 6, 31, 32, "e8m0", 0.5, 0.034),
    Format("mxint4", "int", 4, 7, 32, "e8m0", 0.5, 0.144),
    Format("mxfp8", "e4m3", 8, 448, 32, "e8m0", 16, 0.027),
    Format("mxfp6", "e2m3", 6, 7.5, 32, "e8m0", 0.25, 0.028),
    Format("mxfp4", "e2m1", 4, 6, 32, "e8m0", 1, 0.116),
    Format("nvint4", "int", 4, 7, 16, "nv", 0.5, 0.086),
    Format("nvfp4", "e2m1", 4, 6, 16, "nv", 1, 0.095),
)
FORMATS = {each.name: each for each in _ALL}


def longest_sum(first: float, second: float) -> int:
    """How many products of integers, of sizes up to `first` and `second`, have a sum that 32 bits hold whatever their signs."""
    return (2**31 - 1) // int(first * second)


def format_of(name: str) -> Format:
    """The format of that name. Raises ValueError, which lists all, for another."""
    if name not in FORMATS:
        raise ValueError(f"there is no format {name!r}: it is one of {', '.join(FORMATS)}")
    return FORMATS[name]
