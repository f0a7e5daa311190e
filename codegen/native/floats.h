// float32, bfloat16 and float16 as they lie in memory, kLanes at a time.
#pragma once
#include "vectors.h"

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// 2^112 too small as a float32 that has its mantissa in the same place, subnormals too; infinities and NaNs need an exponent of ones.
inline float number(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7fff, sign = uint32_t(value.bits & 0x8000) << 16;
  if (magnitude >= 0x7c00) return of_bits(sign | 0x7f800000 | magnitude << 13);
  return of_bits(sign | bits_of(of_bits(magnitude << 13) * 0x1p112f));
}
inline float number(BFloat16 value) { return number(value.bits); }

// To the nearest, half to even; a NaN stays one.
inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7f800000) {
    return uint16_t(sign | 0x7e00);
  }
  if (magnitude >= 0x477ff000) {  // from half a unit above the largest on
    return uint16_t(sign | 0x7c00);
  }
  if (magnitude < 0x38800000) {  // subnormal: the sum rounds to a multiple of 2^-24
    return uint16_t(sign | (bits_of(of_bits(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  return uint16_t(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

INLINE Floats load_floats(const BFloat16* from) { return load_floats(&from->bits); }
INLINE Floats load_floats(const Float16* from) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return Floats(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__) && defined(__AVX2__)
  return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Floats result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = number(from[lane]);
  return result;
#endif
}

INLINE void store_numbers(float* to, Floats value) { store(to, value); }

INLINE void store_numbers(BFloat16* to, Floats value) {
  const Words bits = Words(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 64;
  store(to, __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded, Halves));
}

INLINE void store_numbers(Float16* to, Floats value) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(__m512(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(__m256(value), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane].bits = to_float16(value[lane]);
#endif
}

}  // namespace
