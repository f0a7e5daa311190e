// The functions of a softmax, kLanes at a time.
#pragma once
#include "floats.h"

namespace {

constexpr float kInfinity = __builtin_inff();

struct Powers {
  Floats rest, power;  // exp(x) = power * (1 + rest), power a power of two
};

// exp(r) - 1 for |r| <= ln 2 / 2 by its series: what is left out is below 1e-8 of it.
INLINE Floats less_one(Floats r) {
  Floats sum = all(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f}) sum = fused(sum, r, all(c));
  return fused(sum * r, r, r);
}

// For |x| <= 87. x = n ln 2 + r.
INLINE Powers powers(Floats x) {
  const float shift = 0x1.8p23f;  // a float32 of this size has no fraction: adding it rounds
  const Floats shifted = fused(x, all(1.44269504f), all(shift));
  const Floats n = shifted - shift;
  // The upper part of ln 2 has 9 bits, so that n times it is exact.
  const Floats r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));
  const Words exponent = (Words(shifted) - bits_of(shift) + 127) << 23;
  return {less_one(r), Floats(exponent)};
}

// exp(x) for x <= 0; NaN for NaN. Without an instruction that scales by powers of two, 0 below -87.
INLINE Floats exponential(Floats x) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-104.0f), __m512(x));  // exp(-104) rounds to 0; a NaN is the second operand
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  const Floats r = fused(Floats(n), all(2.12194440e-4f), fused(Floats(n), all(-0.693359375f), Floats(bounded)));
  return Floats(_mm512_scalef_ps(__m512(1.0f + less_one(r)), n));
#else
  const Powers p = powers(x < -87.0f ? all(-87.0f) : x);
  return x < -87.0f ? all(0.0f) : fused(p.power, p.rest, p.power);
#endif
}

inline float exponential(float x) { return exponential(all(x))[0]; }

// (e - 1) / (e + 1) with e = exp(2 |y|), from e - 1, which is exact for small y too.
INLINE Floats hyperbolic_tangent(Floats y) {
  const Words sign = Words(y) & 0x80000000u;
  const Floats magnitude = Floats(Words(y) & 0x7fffffffu), twice = magnitude > 10.0f ? all(20.0f) : magnitude + magnitude;
  const Powers p = powers(twice);
  const Floats less_one = fused(p.power, p.rest, p.power - 1.0f);
  return Floats(Words(less_one / (less_one + 2.0f)) | sign);
}

}  // namespace
