// Vectors of 32-bit lanes in the compiler's own notation, and the few instructions that it has no notation for.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kLanes = 16, kVectors = 4, kRows = 6;  // 24 sums and 4 vectors of weights in 32 registers
constexpr bool kHasTables = true;
#else
constexpr int kLanes = 8, kVectors = 2, kRows = 4;
constexpr bool kHasTables = false;
#endif
constexpr int kCols = kLanes * kVectors;
constexpr int kBranchRows = 4;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

#define INLINE inline __attribute__((always_inline))

inline float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float number(float value) { return value; }
inline float number(uint16_t bfloat16) { return of_bits(uint32_t(bfloat16) << 16); }

// To the nearest, half to even; a NaN stays one.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE Floats all(float value) { return value - Floats{}; }
INLINE Ints all(int32_t value) { return value - Ints{}; }

template <class Vector>
INLINE Vector load(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class Vector>
INLINE void store(void* to, Vector value) {
  std::memcpy(to, &value, sizeof value);
}

INLINE Floats load_floats(const float* from) { return load<Floats>(from); }
INLINE Floats load_floats(const uint16_t* from) { return Floats(__builtin_convertvector(load<Halves>(from), Words) << 16); }

// The sum of all lanes, halves added to halves.
template <class Vector>
INLINE auto lane_sum(Vector value) {
  typedef std::remove_reference_t<decltype(value[0])> Lane;
  if constexpr (sizeof(Vector) == 2 * sizeof(Lane)) {
    return value[0] + value[1];
  } else {
    typedef Lane Half __attribute__((vector_size(sizeof(Vector) / 2)));
    Half halves[2];
    std::memcpy(halves, &value, sizeof value);
    return lane_sum<Half>(halves[0] + halves[1]);
  }
}

// a * b + c rounded once where the machine does so. Left to itself, a compiler takes this form in one loop and not in the next.
INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__) && defined(__AVX2__)
  return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__FP_FAST_FMAF)
  for (int lane = 0; lane < kLanes; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
#else
  return a * b + c;
#endif
}

// sum + in each lane the four products of the unsigned bytes of `weights` with the signed ones of `activations`.
INLINE Ints dot_bytes(Ints sum, Ints weights, Ints activations) {
#if defined(__AVX512VNNI__)
  return Ints(_mm512_dpbusd_epi32(__m512i(sum), __m512i(weights), __m512i(activations)));
#elif defined(__AVX512F__) && defined(__AVX512BW__)
  const __m512i w = __m512i(weights), a = __m512i(activations);
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
  return sum + Ints(even) + Ints(_mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(a, 8)));
#elif defined(__AVXVNNI__)
  return Ints(_mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(weights), __m256i(activations)));
#elif defined(__AVX2__)
  const __m256i w = __m256i(weights), a = __m256i(activations);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
  return sum + Ints(even) + Ints(_mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8)));
#else
  for (int byte = 0; byte < 32; byte += 8) sum += (weights >> byte & 255) * (activations << (24 - byte) >> 24);
  return sum;
#endif
}

#if defined(__AVX512BF16__)
constexpr bool kHasBFloat16 = true;
INLINE Floats dot_bfloat16(Floats sum, Ints a, Ints b) { return Floats(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b))); }
#else
constexpr bool kHasBFloat16 = false;
INLINE Floats dot_bfloat16(Floats sum, Ints, Ints) { return sum; }
#endif

// to[i][j] = from[j][i] for kLanes x kLanes words; strides in words.
INLINE void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // a[i + n]: column n of each quarter, of rows i to i + 3
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int n = 0; n < 4; ++n) {
    const __m512i low = _mm512_shuffle_i32x4(a[n], a[n + 4], 0x88), high = _mm512_shuffle_i32x4(a[n + 8], a[n + 12], 0x88);
    const __m512i low2 = _mm512_shuffle_i32x4(a[n], a[n + 4], 0xdd), high2 = _mm512_shuffle_i32x4(a[n + 8], a[n + 12], 0xdd);
    _mm512_storeu_si512(to + n * to_stride, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(to + (n + 8) * to_stride, _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_storeu_si512(to + (n + 4) * to_stride, _mm512_shuffle_i32x4(low2, high2, 0x88));
    _mm512_storeu_si512(to + (n + 12) * to_stride, _mm512_shuffle_i32x4(low2, high2, 0xdd));
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) to[i * to_stride + j] = from[j * from_stride + i];
#endif
}

}  // namespace
