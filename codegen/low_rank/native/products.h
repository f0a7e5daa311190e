// Products of rows with weights: a block of rows by the columns of a panel in registers, or one dot after another for few rows.
#pragma once
#include <blocks.h>

#include "call.h"
#include "panels.h"

namespace {

// out [rows, kCols] = codes by codes, segment by segment: (sum of products) * act_scale * scale. Weights are unsigned, `zero` above
// their codes, which is taken off by the sums of the activations' codes.
template <int rows>
void integer_block(const Plan& p, const char* a, const float* act_scale, const int32_t* code_sum, const char* panel, const float* scale,
                   int64_t scale_step, int32_t zero, float* out) {
  const int64_t steps = (p.segment + 3) / 4;
  for (int64_t s = 0; s < p.segments; ++s) {
    Ints sum[rows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] = all(-zero * code_sum[i * p.segments + s]);
    multiply<Bytes, rows>(a + s * p.segment, p.padded, panel + s * p.segment * kCols, steps, sum);
    const float* of_segment = scale + s * p.segment / scale_step * kCols;
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const float factor = act_scale[i * p.segments + s];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        float* at = out + i * kCols + v * kLanes;
        const Floats before = s == 0 ? Floats{} : load_floats(at);
        store(at, fused(__builtin_convertvector(sum[i][v], Floats) * factor, load_floats(of_segment + v * kLanes), before));
      }
    }
  }
}

// out [rows, kCols] (+)= words by a panel of `steps` words a column.
template <class Kind, int rows>
void float_block(const char* a, int64_t stride, const char* panel, int64_t steps, bool is_first, float* out) {
  Floats sum[rows][kVectors] = {};
  multiply<Kind, rows>(a, stride, panel, steps, sum);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* at = out + i * kCols + v * kLanes;
      store(at, is_first ? sum[i][v] : load_floats(at) + sum[i][v]);
    }
}

// out[i][j] = the sum of products of codes of `rows` rows and `columns` columns, int8 on both sides.
template <int rows, int columns>
INLINE void dots_of_bytes(const int8_t* a, int64_t padded, const uint8_t* w, int64_t depth, const int32_t* code_sum, int32_t* out) {
  Ints sum[rows][columns] = {};
  int64_t k = 0;
  for (; k < depth; k += kSpan) {
    Ints weights[columns];
    for (int j = 0; j < columns; ++j) {
      if (k + kSpan <= depth) {
        weights[j] = load<Ints>(w + j * depth + k);
      } else {
        weights[j] = Ints{};
        std::memcpy(&weights[j], w + j * depth + k, depth - k);
      }
      weights[j] ^= int32_t(0x80808080);
      __builtin_prefetch(w + j * depth + k + 4 * kAhead);
    }
    for (int i = 0; i < rows; ++i) {
      const Ints codes = load<Ints>(a + i * padded + k);
      for (int j = 0; j < columns; ++j) sum[i][j] = dot_bytes(sum[i][j], weights[j], codes);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) out[i * columns + j] = lane_sum(sum[i][j]) - 128 * code_sum[i];
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
// The scales of groups first .. first + count - 1 in as many lanes, 0 in the others; count is at most 8.
INLINE __m512 some_scales(const Call& c, int64_t first, int64_t count) {
  const __mmask16 there = __mmask16((1u << count) - 1);
  if (c.scale_type == kFloat32) return _mm512_maskz_loadu_ps(there, reinterpret_cast<const float*>(c.scale) + first);
  if (c.scale_type == kBFloat16) {
    const __m256i halves = _mm256_maskz_loadu_epi16(there, reinterpret_cast<const uint16_t*>(c.scale) + first);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  Floats scales = {};
  for (int64_t i = 0; i < count; ++i) scales[i] = element(c.scale, c.scale_type, first + i);
  return __m512(scales);
}

// What 4-bit codes stand for, twice, as the instruction that looks them up takes them.
struct Tables {
  Ints pairs;
  Floats singles;
};

INLINE Tables tables_of(const float* values) {
  uint16_t halves[32];
  for (int i = 0; i < 32; ++i) halves[i] = uint16_t(bits_of(values[i % 16]) >> 16);  // exact
  return {load<Ints>(halves), load_floats(values)};
}

// out[i][0] = sum_k a[i][k] value[code[k]] scale[k / group] of column n; a [rows, padded] as `interleave` lays it out. Lane l of a vector
// of 128 codes holds those of 8 l .. 8 l + 7, so its scale is that of group 8 l / group, for groups of 16 to 128.
template <bool as_pairs, int rows>
INLINE void dots_of_tables(const Call& c, const char* a, int64_t stride, int64_t n, const Tables& tables, float* out) {
  constexpr int kNibbles = as_pairs ? 4 : 8;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(c.codes) + n * c.depth / 2;
  const int64_t groups = c.depth / c.group, per_vector = 128 / c.group;
  Ints lane_group;
  for (int lane = 0; lane < kLanes; ++lane) lane_group[lane] = int32_t(8 * lane / c.group);
  Floats sum[rows] = {};
  for (int64_t k = 0, g = 0; k < c.depth; k += 128, g += per_vector) {
    const __mmask64 there = c.depth - k >= 128 ? ~0ull : (1ull << ((c.depth - k) / 2)) - 1;
    const __m512i word = _mm512_maskz_loadu_epi8(there, codes + k / 2);
    _mm_prefetch(reinterpret_cast<const char*>(codes + k / 2 + 4 * kAhead), _MM_HINT_T0);
    Floats part[rows] = {};
#pragma GCC unroll 8
    for (int nibble = 0; nibble < kNibbles; ++nibble) {
      // The look-ups read the low 4 bits of a lane, and of a half of one 5, which the table takes care of.
      const Ints shifted = Ints(as_pairs ? _mm512_srli_epi16(word, 4 * nibble) : _mm512_srli_epi32(word, 4 * nibble));
      const char* at = a + k * (as_pairs ? 2 : 4) + nibble * 64;
      if constexpr (as_pairs) {
        const Ints values = Ints(_mm512_permutexvar_epi16(__m512i(shifted), __m512i(tables.pairs)));
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) part[i] = dot_bfloat16(part[i], values, load<Ints>(at + i * stride));
      } else {
        const Floats values = Floats(_mm512_permutexvar_ps(__m512i(shifted), __m512(tables.singles)));
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) part[i] = fused(values, load<Floats>(at + i * stride), part[i]);
      }
    }
    const __m512 scales = some_scales(c, n * groups + g, std::min(per_vector, groups - g));
    const Floats of_lane = Floats(_mm512_permutexvar_ps(__m512i(lane_group), scales));
    for (int i = 0; i < rows; ++i) sum[i] = fused(part[i], of_lane, sum[i]);
  }
  const float scale2 = c.scale2_count == 0 ? 1.0f : reinterpret_cast<const float*>(c.scale2)[c.scale2_count == 1 ? 0 : n];
  for (int i = 0; i < rows; ++i) out[i * kCols] = lane_sum(sum[i]) * scale2;
}
#endif

}  // namespace
