// A tile of queries against a block of keys: scores with a key a lane, their softmax and sums of values as in FlashAttention
// (arXiv 2205.14135, algorithm 1), and how partial results are joined. Every sum is in the order of the keys or of the depth.
#pragma once
#include <algorithm>
#include <cstdint>

#include "exponentials.h"

namespace {

constexpr int64_t kBlock = 64;   // keys that are transposed at once: [depth, 64] float32 of depth 64 is 16 KiB
constexpr int64_t kChunk = 256;  // keys after which partial results are joined, whoever computed them
constexpr int64_t kTile = 64;    // queries, of all heads that share keys, that meet a block of them

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Shape {
  int64_t height, depth, width;  // rows of a tile, of a row of keys and of values; the latter two padded to whole vectors
  int64_t partial() const { return height * (width + 2); }  // floats of a partial result
  int64_t own() const {  // floats of a thread's scratch
    return round_up(height * (depth + kBlock) + kBlock * (depth + std::max(depth, width)) + 2 * partial(), 16);
  }
};

// For each of `height` queries the largest score, the sum of exp(score - largest), and that of the same times v, [height, width].
struct Partial {
  float *largest, *sum, *value;
  static Partial at(float* from, const Shape& s) { return {from, from + s.height, from + 2 * s.height}; }

  void clear(const Shape& s) const {
    std::fill_n(largest, s.height, -kInfinity);
    std::fill_n(sum, s.height * (s.width + 1), 0.0f);
  }
};

// A thread's scratch.
struct Buffers {
  float *q, *keys, *rows, *scores;  // [height, depth], [depth, kBlock], [kBlock, depth or width], [height, kBlock]
  Partial part, whole;
  Buffers(float* own, const Shape& s)
      : q(own), keys(q + s.height * s.depth), rows(keys + kBlock * s.depth), scores(rows + kBlock * std::max(s.depth, s.width)),
        part(Partial::at(scores + s.height * kBlock, s)), whole(Partial::at(scores + s.height * kBlock + s.partial(), s)) {}
};

// What becomes of q . k before exp: times `scale`, capped to softcap * tanh(s / softcap) unless that is 0, and with `bias` added.
struct Scoring {
  float scale, softcap, bias;
};

// Keys and values [begin, end) of a block, in rows of `depth` and `width` elements.
template <class Element>
struct Keys {
  const Element *k, *v;
  int64_t k_stride, v_stride, depth, width, begin, end;
};

// What exp is taken relative to: a query that sees no key yet has a largest score of -infinity.
inline float base_of(float largest) { return largest == -kInfinity ? 0.0f : largest; }

template <class Element>
inline void widen(const Element* from, int64_t count, float* to, int64_t padded) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_floats(from + i));
  for (; i < count; ++i) to[i] = number(from[i]);
  for (; i < padded; ++i) to[i] = 0.0f;
}

// The first `count` of padded numbers, rounded.
template <class Element>
inline void narrow(const float* from, int64_t count, Element* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Element rounded[kLanes];
    store_numbers(rounded, load_floats(from + i));
    std::memcpy(to + i, rounded, std::min<int64_t>(kLanes, count - i) * sizeof(Element));
  }
}

// Rows [begin, end) of a block on their way from memory while others are computed with: rows that are read 16 at a time look like no
// stream to the processor.
template <class Element>
inline void prefetch(const Element* from, int64_t begin, int64_t end, int64_t stride, int64_t count) {
  for (int64_t j = begin; j < end; ++j)
    for (int64_t i = 0; i < count; i += int64_t(64 / sizeof(Element))) __builtin_prefetch(from + j * stride + i);
}

// keys [depth, kBlock] from the rows of a block; in other places lies what some row has.
template <class Element>
void transpose_keys(const Shape& s, const Keys<Element>& block, float* rows, float* keys) {
  for (int64_t group = block.begin / kLanes * kLanes; group < block.end; group += kLanes) {
    const bool is_whole = group >= block.begin && group + kLanes <= block.end;
    const bool is_direct = std::is_same_v<Element, float> && is_whole && s.depth == block.depth;
    const float* from = reinterpret_cast<const float*>(block.k) + group * block.k_stride;
    if (!is_direct) {
      for (int64_t j = 0; j < kLanes; ++j)
        widen(block.k + std::clamp(group + j, block.begin, block.end - 1) * block.k_stride, block.depth, rows + j * s.depth, s.depth);
      from = rows;
    }
    for (int64_t d = 0; d < s.depth; d += kLanes)
      transpose(reinterpret_cast<const uint32_t*>(from + d), is_direct ? block.k_stride : s.depth,
                reinterpret_cast<uint32_t*>(keys + d * kBlock + group), kBlock);
  }
}

// scores [rows, kBlock] = q . k, each summed in the order of d.
template <int rows>
INLINE void score(const Shape& s, const float* q, const float* keys, float* scores) {
  constexpr int vectors = 4;
  for (int64_t j = 0; j < kBlock; j += vectors * kLanes) {
    Floats sum[rows][vectors] = {};
    for (int64_t d = 0; d < s.depth; ++d) {
      Floats key[vectors];
      for (int n = 0; n < vectors; ++n) key[n] = load_floats(keys + d * kBlock + j + n * kLanes);
      for (int i = 0; i < rows; ++i) {
        const Floats value = all(q[i * s.depth + d]);
        for (int n = 0; n < vectors; ++n) sum[i][n] = fused(value, key[n], sum[i][n]);
      }
    }
    for (int i = 0; i < rows; ++i)
      for (int n = 0; n < vectors; ++n) store(scores + i * kBlock + j + n * kLanes, sum[i][n]);
  }
}

// Scores of a query to weights exp(score - largest), 0 outside of [first, end); gives the factor of what was summed before.
inline float weigh(const Scoring& f, int64_t first, int64_t end, float* scores, float& largest, float& sum) {
  constexpr int vectors = kBlock / kLanes;
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Floats value[vectors], most = all(-kInfinity);
  for (int n = 0; n < vectors; ++n) {
    const Ints slot = lane + n * kLanes;
    Floats s = load_floats(scores + n * kLanes) * f.scale;
    if (f.softcap != 0) s = hyperbolic_tangent(s / f.softcap) * f.softcap;
    value[n] = (slot >= int32_t(first)) & (slot < int32_t(end)) ? s + f.bias : all(-kInfinity);
    most = value[n] > most ? value[n] : most;
  }
  const float before = largest;
  for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
  const float base = base_of(largest), factor = exponential(before - base);
  Floats total = all(0.0f);
  for (int n = 0; n < vectors; ++n) {
    const Floats weight = exponential(value[n] - base);
    store(scores + n * kLanes, weight);
    total += weight;
  }
  sum = sum * factor + lane_sum(total);
  return factor;
}

// value [rows, vectors * kLanes] = value * factor + weights [rows, count] @ v [count, ..].
template <int rows, int vectors>
INLINE void gather(const Shape& s, const float* factor, const float* weights, int64_t count, const float* v, int64_t stride, float* value) {
  Floats sum[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < vectors; ++n) sum[i][n] = load_floats(value + i * s.width + n * kLanes) * factor[i];
  for (int64_t j = 0; j < count; ++j) {
    Floats each[vectors];
    for (int n = 0; n < vectors; ++n) each[n] = load_floats(v + j * stride + n * kLanes);
    for (int i = 0; i < rows; ++i) {
      const Floats weight = all(weights[i * kBlock + j]);
      for (int n = 0; n < vectors; ++n) sum[i][n] = fused(weight, each[n], sum[i][n]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < vectors; ++n) store(value + i * s.width + n * kLanes, sum[i][n]);
}

template <int rows>
INLINE void gather_rows(const Shape& s, const float* factor, const float* weights, int64_t count, const float* v, int64_t stride, float* value) {
  int64_t e = 0;
  for (; e + 4 * kLanes <= s.width; e += 4 * kLanes) gather<rows, 4>(s, factor, weights, count, v + e, stride, value + e);
  for (; e < s.width; e += kLanes) gather<rows, 1>(s, factor, weights, count, v + e, stride, value + e);
}

constexpr int kTall = kLanes == 16 ? 6 : 2;  // queries at once: sums, keys and a query fit in the registers

// f(row, number of rows as a constant) for all rows.
template <class F>
INLINE void by_rows(int64_t height, F f) {
  int64_t row = 0;
  for (; row + kTall <= height; row += kTall) f(row, std::integral_constant<int, kTall>());
  for (; row + 3 <= height; row += 3) f(row, std::integral_constant<int, 3>());
  for (; row < height; ++row) f(row, std::integral_constant<int, 1>());
}

struct Seen {
  int64_t first, end;  // within a block
};

// Adds to `part` what the first `count` rows of a tile see of a block; `seen` says what that is for each row, and `after_keys` is called
// when the keys have been read.
template <class Element, class OfRow, class F>
INLINE void meet(const Shape& s, const Scoring& f, const Keys<Element>& block, int64_t count, const Buffers& own, const Partial& part,
                 OfRow seen, F after_keys) {
  float factor[kTall];
  prefetch(block.v, block.begin, block.end, block.v_stride, block.width);
  transpose_keys(s, block, own.rows, own.keys);
  after_keys();
  by_rows(count, [&](int64_t r, auto rows) { score<rows>(s, own.q + r * s.depth, own.keys, own.scores + r * kBlock); });
  const bool is_direct = std::is_same_v<Element, float> && s.width == block.width;
  if (!is_direct)
    for (int64_t j = block.begin; j < block.end; ++j) widen(block.v + j * block.v_stride, block.width, own.rows + j * s.width, s.width);
  const int64_t stride = is_direct ? block.v_stride : s.width;
  const float* values = (is_direct ? reinterpret_cast<const float*>(block.v) : own.rows) + block.begin * stride;
  by_rows(count, [&](int64_t r, auto rows) {
    for (int i = 0; i < rows; ++i) {
      const Seen here = seen(r + i);
      factor[i] = weigh(f, here.first, here.end, own.scores + (r + i) * kBlock, part.largest[r + i], part.sum[r + i]);
    }
    gather_rows<rows>(s, factor, own.scores + r * kBlock + block.begin, block.end - block.begin, values, stride, part.value + r * s.width);
  });
}

// Adds to a result that of the next keys.
inline void join(const Shape& s, const Partial& part, const Partial& whole) {
  for (int64_t i = 0; i < s.height; ++i) {
    const float largest = std::max(whole.largest[i], part.largest[i]), base = base_of(largest);
    const float before = exponential(whole.largest[i] - base), here = exponential(part.largest[i] - base);
    whole.largest[i] = largest;
    whole.sum[i] = whole.sum[i] * before + part.sum[i] * here;
    float *to = whole.value + i * s.width, *from = part.value + i * s.width;
    for (int64_t e = 0; e < s.width; e += kLanes)
      store(to + e, fused(load_floats(to + e), all(before), load_floats(from + e) * here));
  }
}

// y [width] = value / sum of row i.
template <class Element>
inline void divide(const Shape& s, const Partial& whole, int64_t i, int64_t width, Element* y) {
  float* value = whole.value + i * s.width;
  for (int64_t e = 0; e < s.width; e += kLanes) store(value + e, load_floats(value + e) / whole.sum[i]);
  narrow(value, width, y);
}

}  // namespace
