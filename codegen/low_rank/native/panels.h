// Weights of kCols neighbouring rows, read where the file's layout has them and laid out for products: the columns of a panel.
#pragma once
#include "call.h"

namespace {

constexpr int64_t kSpan = 4 * kLanes;  // codes that a vector holds
constexpr int64_t kAhead = 256;        // bytes: how far memory is asked for before it is read

// kSpan codes of row n from k on, one a byte, each xor `flip`; what `from` points to may be read past the row.
INLINE void span_codes(bool is_packed, const uint8_t* from, uint8_t flip, uint8_t* out) {
  const Words flips = Words{} + flip * 0x01010101u;
  if (!is_packed) return store(out, load<Words>(from) ^ flips);
  typedef uint8_t Packed __attribute__((vector_size(2 * kLanes)));
  typedef uint16_t Wide __attribute__((vector_size(4 * kLanes)));
  const Wide wide = __builtin_convertvector(load<Packed>(from), Wide);
  store(out, (Words(wide | wide << 4) & 0x0f0f0f0f) ^ flips);  // the even column is the low nibble
}

// The same where fewer than kSpan are left; the others are 0.
inline void last_codes(bool is_packed, const uint8_t* from, int64_t count, uint8_t flip, uint8_t* out) {
  uint8_t held[kSpan] = {};
  std::memcpy(held, from, is_packed ? count / 2 : count);
  span_codes(is_packed, held, flip, out);
}

// panel [depth / 4, kCols, 4] of the codes of rows n.. from `begin` on, `depth` a multiple of kSpan; what lies outside the weight is any.
inline void code_panel(const Call& c, int64_t n, int64_t begin, int64_t depth, uint8_t flip, uint8_t* panel) {
  alignas(64) uint8_t square[kLanes][kSpan];
  const bool packed = is_packed(c);
  const int64_t per_byte = packed ? 2 : 1;
  for (int64_t column = 0; column < kCols; column += kLanes) {
    for (int64_t k = 0; k < std::min(depth, c.depth - begin); k += kSpan) {
      const int64_t count = c.depth - begin - k;
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t first = std::min(n + column + i, c.width - 1) * c.depth + begin + k;
        const uint8_t* from = reinterpret_cast<const uint8_t*>(c.codes) + first / per_byte;
        __builtin_prefetch(from + kAhead);
        count >= kSpan ? span_codes(packed, from, flip, square[i]) : last_codes(packed, from, count, flip, square[i]);
      }
      transpose(reinterpret_cast<uint32_t*>(square), kLanes, reinterpret_cast<uint32_t*>(panel) + k / 4 * kCols + column, kCols);
    }
  }
}

// [count, kCols] scales of the groups of columns n..
inline void scale_panel(const Call& c, int64_t n, float* out) {
  const int64_t count = c.depth / c.group;
  for (int64_t column = 0; column < kCols; ++column) {
    const int64_t row = std::min(n + column, c.width - 1);
    const float factor = c.scale2_count == 0 ? 1.0f : reinterpret_cast<const float*>(c.scale2)[c.scale2_count == 1 ? 0 : row];
    for (int64_t g = 0; g < count; ++g) out[g * kCols + column] = element(c.scale, c.scale_type, row * count + g) * factor;
  }
}

// [rank, kCols] of `up`, then bias [kCols].
inline void up_panel(const Call& c, int64_t n, float* out) {
  for (int64_t column = 0; column < kCols; column += kLanes) {
    int64_t j = 0;
    for (; j + kLanes <= c.rank; j += kLanes) {
      alignas(64) float square[kLanes][kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t from = std::min(n + column + i, c.width - 1) * c.rank + j;
        store(square[i], c.up_type == kFloat32 ? load_floats(reinterpret_cast<const float*>(c.up) + from)
                                               : load_floats(reinterpret_cast<const uint16_t*>(c.up) + from));
      }
      transpose(reinterpret_cast<uint32_t*>(square), kLanes, reinterpret_cast<uint32_t*>(out) + j * kCols + column, kCols);
    }
    for (; j < c.rank; ++j)
      for (int64_t i = 0; i < kLanes; ++i)
        out[j * kCols + column + i] = element(c.up, c.up_type, std::min(n + column + i, c.width - 1) * c.rank + j);
  }
  for (int64_t column = 0; column < kCols; ++column)
    out[c.rank * kCols + column] = c.bias == 0 ? 0.0f : element(c.bias, c.bias_type, std::min(n + column, c.width - 1));
}

constexpr float kInt4Values[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
constexpr float kE2M1Values[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6};

// What codes, one in the low bits of each lane, stand for without their scale.
INLINE Floats decoded(const Call& c, Ints code) {
  if (c.code_type == kInt8) return __builtin_convertvector((code ^ 128) - 128, Floats);
  if (c.code_type == kInt4) return __builtin_convertvector((code ^ 8) - 8, Floats);
  if (c.code_type == kCodesE4M3) {
    const Floats magnitude = Floats((code & 127) << 20) * 0x1p120f;
    return Floats(Ints(magnitude) | (code & 128) << 24);
  }
#if defined(__AVX512F__)
  return Floats(_mm512_permutexvar_ps(__m512i(code), _mm512_loadu_ps(kE2M1Values)));
#else
  Floats value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = kE2M1Values[code[lane]];
  return value;
#endif
}

// The numbers behind `codes` [depth / 4, kCols, 4], which lie from `begin` on: float32 [depth, kCols], or bfloat16 [depth / 2, kCols, 2].
inline void value_panel(const Call& c, const uint8_t* codes, const float* scale, int64_t begin, int64_t depth, bool as_bfloat16,
                        void* out) {
  for (int64_t k = 0; k < depth; k += 4) {
    const float* s = scale + (begin + k) / c.group * kCols;
    for (int column = 0; column < kCols; column += kLanes) {
      const Words four = load<Words>(codes + k * kCols + column * 4);
      Words bits[4];
      for (int i = 0; i < 4; ++i) {
        // K of an unpacked format is any number: the four may belong to the last group and to none.
        bits[i] = Words(decoded(c, Ints(four >> (8 * i) & 255)) * load_floats(s + column));
        if (!as_bfloat16) store(static_cast<float*>(out) + (k + i) * kCols + column, bits[i]);
      }
      if (!as_bfloat16) continue;
      for (int i = 0; i < 4; ++i) bits[i] = (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16;
      for (int i = 0; i < 4; i += 2) store(static_cast<float*>(out) + (k + i) / 2 * kCols + column, Words(bits[i] | bits[i + 1] << 16));
    }
  }
}

}  // namespace
