"""Functions of Triton that quantize and that read codes and scales, as text. All are exact: they agree with `ir.low_bit` bit by bit.

Numbers of 8 bits are taken apart as bits, which every GPU has: sm_80 knows no e4m3, gfx942 another one.
"""

HELPERS = {
    "nearest": '''@triton.jit
def nearest(y):
    """y rounded half to even, |y| < 2^22: beyond 2^23 float32 has no fractions."""
    return (y + 12582912.0) - 12582912.0
''',
    "magnitude_bits": '''@triton.jit
def magnitude_bits(x):
    """|x| as an integer: larger for larger |x|, and largest for NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
''',
    "bfloat16_scale": '''@triton.jit
def stored(scale):
    """`scale`, positive, as bfloat16 has it, no less than its least."""
    bits = scale.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    rounded = tl.where(scale == scale, rounded, scale)
    return tl.where(rounded < 9.183549615799121e-41, 9.183549615799121e-41, rounded)
''',
    "float16_scale": '''@triton.jit
def stored(scale):
    """`scale`, positive, as float16 has it, no less than its least."""
    rounded = scale.to(tl.float16).to(tl.float32)
    return tl.where(rounded < 5.960464477539063e-08, 5.960464477539063e-08, rounded)
''',
    "float32_scale": '''@triton.jit
def stored(scale):
    """`scale`, positive, no less than float32's least."""
    return tl.where(scale < 1.401298464324817e-45, 1.401298464324817e-45, scale)
''',
    "power_scale": '''@triton.jit
def stored(scale):
    """The least power of two, from 2^-127 on, that is not below `scale`, which is positive."""
    bits = scale.to(tl.int32, bitcast=True)
    exponent, fraction = bits >> 23, bits & 0x7FFFFF
    exponent = tl.where(exponent == 0, (fraction > 0x400000).to(tl.int32), exponent + (fraction != 0).to(tl.int32))
    power = tl.where(exponent == 0, 0x400000, tl.minimum(exponent, 254) << 23).to(tl.float32, bitcast=True)
    return tl.where(scale == scale, power, scale)
''',
    "e4m3_scale": '''@triton.jit
def stored(scale):
    """`scale`, positive, as e4m3 has it, between its least and its largest."""
    return e4m3_nearest(tl.where(scale < 0.001953125, 0.001953125, tl.where(scale > 448.0, 448.0, scale)))
''',
    "e4m3_nearest": '''@triton.jit
def e4m3_nearest(y):
    """The nearest number of e4m3, |y| <= 448: four significant bits, of numbers below 2^-6 multiples of 2^-9."""
    exponent = tl.maximum((y.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 23, 121)
    unit = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    return nearest(tl.div_rn(y, unit)) * unit
''',
    "e2m1_nearest": '''@triton.jit
def e2m1_nearest(y):
    """The nearest number of e2m1, |y| <= 6: two significant bits, of numbers below 1 multiples of 1/2."""
    unit = tl.where(tl.abs(y) < 2.0, 0.5, tl.where(tl.abs(y) < 4.0, 1.0, 2.0))
    return nearest(tl.div_rn(y, unit)) * unit
''',
    "turned": '''@triton.jit
def turned(x, size: tl.constexpr, steps: tl.constexpr, factor: tl.constexpr):
    """Blocks of `size` = 2^`steps` neighbours times Sylvester's Hadamard matrix and `factor`: each step adds and subtracts the pairs that
    differ in the lowest bit of their places, which becomes the highest, so that after all steps each bit is where it was."""
    y = tl.reshape(x, [x.shape[0] * x.shape[1] // size, size])
    for _ in tl.static_range(steps):
        even, odd = tl.split(tl.reshape(y, [x.shape[0] * x.shape[1] // size, size // 2, 2]))
        pairs = tl.permute(tl.join(even + odd, even - odd), (0, 2, 1))
        y = tl.reshape(pairs, [x.shape[0] * x.shape[1] // size, size])
    return tl.reshape(y, [x.shape[0], x.shape[1]]) * factor
''',
    "unpacked": '''@triton.jit
def unpacked(packed, rows: tl.constexpr, columns: tl.constexpr):
    """Bytes [rows, columns / 2] -> codes -8..7 [rows, columns], int8: the low half of a byte is the even column."""
    both = packed.to(tl.int8, bitcast=True)
    return tl.reshape(tl.join((both << 4) >> 4, both >> 4), [rows, columns])
''',
    "halves": '''@triton.jit
def halves(packed, rows: tl.constexpr, columns: tl.constexpr):
    """Bytes [rows, columns / 2] -> codes 0..15 [rows, columns], int32: the low half of a byte is the even column."""
    return tl.reshape(tl.join(packed & 15, packed >> 4), [rows, columns]).to(tl.int32)
''',
    "e2m1": '''@triton.jit
def e2m1(code):
    """Numbers of e2m1: in float16 their bits are those of a number 2^14 times smaller."""
    bits = ((code & 7) << 9) | ((code & 8) << 12)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
''',
    "e4m3": '''@triton.jit
def e4m3(byte):
    """Numbers of e4m3: in float16 their bits are those of a number 2^8 times smaller. Neither infinity nor NaN is expected."""
    bits = ((byte.to(tl.int32) & 127) << 7) | ((byte.to(tl.int32) & 128) << 8)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
''',
    "e8m0": '''@triton.jit
def e8m0(byte):
    """Powers of two: 2^(byte - 127)."""
    exponent = byte.to(tl.int32)
    return tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)
''',
}
NEEDS = {"e4m3_nearest": ("nearest",), "e2m1_nearest": ("nearest",), "e4m3_scale": ("nearest", "e4m3_nearest")}


def with_needed(names: list[str]) -> list[str]:
    """The texts of `names` and of what they call, once each."""
    order = dict.fromkeys(needed for name in names for needed in (*NEEDS.get(name, ()), name))
    return [HELPERS[name] for name in order]
