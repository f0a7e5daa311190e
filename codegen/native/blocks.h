// A block of results in registers: rows, a word at a time, by the columns of a panel of weights.
#pragma once
#include "vectors.h"

namespace {

// What a word of a row meets in each lane of a vector of weights.
struct Bytes {
  typedef Ints Sum;
  static INLINE Sum dot(Sum sum, Ints weights, int32_t word) { return dot_bytes(sum, weights, all(word)); }
};

struct Pairs {
  typedef Floats Sum;
  static INLINE Sum dot(Sum sum, Ints weights, int32_t word) { return dot_bfloat16(sum, weights, all(word)); }
};

struct Singles {
  typedef Floats Sum;
  static INLINE Sum dot(Sum sum, Ints weights, int32_t word) { return fused(Floats(weights), all(of_bits(uint32_t(word))), sum); }
};

// sum [rows, vectors] += rows of words, `stride` bytes apart and their words `word_stride`, by a panel of `steps` words a column. The
// processor foresees what is read of a panel; asking for more of it ahead made products of 16 rows a quarter slower.
template <class Kind, int rows, int vectors>
INLINE void multiply(const char* a, int64_t stride, const char* panel, int64_t steps, typename Kind::Sum (&sum)[rows][vectors],
                     int64_t word_stride = 4) {
  for (int64_t step = 0; step < steps; ++step) {
    const char* at = panel + step * vectors * sizeof(Ints);
    Ints weights[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) weights[v] = load<Ints>(at + v * sizeof(Ints));
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const int32_t word = load<int32_t>(a + i * stride + step * word_stride);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[i][v] = Kind::dot(sum[i][v], weights[v], word);
    }
  }
}

// Calls body with a constant of 1 .. kRows.
template <class Body>
INLINE void with_rows(int64_t rows, Body body) {
  switch (rows) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
#if defined(__AVX512F__) && defined(__AVX512BW__)
    case 5: return body(std::integral_constant<int, 5>());
    case 6: return body(std::integral_constant<int, 6>());
#endif
  }
}

// f(from, number as a constant) for 0 .. count - 1, kRows or less at a time and about as many each: a low block takes nearly as long as a
// high one.
template <class F>
INLINE void in_blocks(int64_t count, F f) {
  const int64_t blocks = (count + kRows - 1) / kRows;
  for (int64_t at = 0, index = 0; at < count; ++index) {
    const int64_t left = blocks - index, height = (count - at + left - 1) / left;
    with_rows(height, [&](auto rows) { f(at, rows); });
    at += height;
  }
}

}  // namespace
