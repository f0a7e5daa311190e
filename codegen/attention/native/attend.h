// A tile of queries against a chunk of slots, and how such partial results are joined.
#pragma once
#include "call.h"

namespace {

// For each of `height` queries the largest score, the sum of exp(score - largest), and that of the same times v, [height, width].
struct Partial {
  float *largest, *sum, *value;
  static Partial at(float* from, const Plan& p) { return {from, from + p.height, from + 2 * p.height}; }

  void clear(const Plan& p) const {
    std::fill_n(largest, p.height, -kInfinity);
    std::fill_n(sum, p.height * (p.width + 1), 0.0f);
  }
};

// A thread's scratch.
struct Buffers {
  float *q, *keys, *rows, *scores;  // [height, depth], [depth, kBlock], [kBlock, depth or width], [height, kBlock]
  Partial part, whole;
  Buffers(float* own, const Plan& p)
      : q(own), keys(q + p.height * p.depth), rows(keys + kBlock * p.depth), scores(rows + kBlock * std::max(p.depth, p.width)),
        part(Partial::at(scores + p.height * kBlock, p)), whole(Partial::at(scores + p.height * kBlock + p.partial, p)) {}
};

// What exp is taken relative to: a query that sees no slot yet has a largest score of -infinity.
inline float base_of(float largest) { return largest == -kInfinity ? 0.0f : largest; }

template <class Element>
inline void widen(const Element* from, int64_t count, float* to, int64_t padded) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_floats(from + i));
  for (; i < count; ++i) to[i] = number(from[i]);
  for (; i < padded; ++i) to[i] = 0.0f;
}

// Rows of a tile: query t of head g at t * group + g.
template <class Element>
void widen_queries(const Call& c, const Plan& p, const Unit& u, float* q) {
  const int64_t first = u.tile * p.step, count = std::min(p.step, c.queries - first);
  const Element* from = reinterpret_cast<const Element*>(c.q) + u.b * c.q_row + u.head * p.group * c.q_head + first * c.q_query;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t g = 0; g < p.group; ++g)
      widen(from + t * c.q_query + g * c.q_head, c.depth, q + (t * p.group + g) * p.depth, p.depth);
}

// Rows [begin, end) of a block on their way from memory while others are computed with: rows that are read 16 at a time look like no
// stream to the processor.
template <class Element>
inline void prefetch(const Element* from, int64_t begin, int64_t end, int64_t stride, int64_t count) {
  for (int64_t j = begin; j < end; ++j)
    for (int64_t i = 0; i < count; i += int64_t(64 / sizeof(Element))) __builtin_prefetch(from + j * stride + i);
}

// keys [depth, kBlock] from the rows [begin, end) of a block; in other places lies what some row has.
template <class Element>
void transpose_keys(const Call& c, const Plan& p, const Element* k, int64_t begin, int64_t end, float* rows, float* keys) {
  for (int64_t group = begin / kLanes * kLanes; group < end; group += kLanes) {
    const bool is_whole = group >= begin && group + kLanes <= end;
    const bool is_direct = std::is_same_v<Element, float> && is_whole && p.depth == c.depth;
    const float* from = reinterpret_cast<const float*>(k) + group * c.k_slot;
    if (!is_direct) {
      for (int64_t j = 0; j < kLanes; ++j)
        widen(k + std::clamp(group + j, begin, end - 1) * c.k_slot, c.depth, rows + j * p.depth, p.depth);
      from = rows;
    }
    for (int64_t d = 0; d < p.depth; d += kLanes)
      transpose(reinterpret_cast<const uint32_t*>(from + d), is_direct ? c.k_slot : p.depth,
                reinterpret_cast<uint32_t*>(keys + d * kBlock + group), kBlock);
  }
}

// scores [rows, kBlock] = q . k, each summed in the order of d.
template <int rows>
INLINE void score(const Plan& p, const float* q, const float* keys, float* scores) {
  constexpr int vectors = 4;
  for (int64_t j = 0; j < kBlock; j += vectors * kLanes) {
    Floats sum[rows][vectors] = {};
    for (int64_t d = 0; d < p.depth; ++d) {
      Floats key[vectors];
      for (int n = 0; n < vectors; ++n) key[n] = load_floats(keys + d * kBlock + j + n * kLanes);
      for (int i = 0; i < rows; ++i) {
        const Floats value = all(q[i * p.depth + d]);
        for (int n = 0; n < vectors; ++n) sum[i][n] = fused(value, key[n], sum[i][n]);
      }
    }
    for (int i = 0; i < rows; ++i)
      for (int n = 0; n < vectors; ++n) store(scores + i * kBlock + j + n * kLanes, sum[i][n]);
  }
}

// Scores of a query to weights exp(score - largest), 0 outside of [first, end); gives the factor of what was summed before.
inline float weigh(const Call& c, int64_t first, int64_t end, float* scores, float& largest, float& sum) {
  constexpr int vectors = kBlock / kLanes;
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Floats value[vectors], most = all(-kInfinity);
  for (int n = 0; n < vectors; ++n) {
    const Ints slot = lane + n * kLanes;
    Floats s = load_floats(scores + n * kLanes) * float(c.scale);
    if (c.softcap != 0) s = hyperbolic_tangent(s / float(c.softcap)) * float(c.softcap);
    value[n] = (slot >= int32_t(first)) & (slot < int32_t(end)) ? s : all(-kInfinity);
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
INLINE void gather(const Plan& p, const float* factor, const float* weights, int64_t count, const float* v, int64_t stride, float* value) {
  Floats sum[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < vectors; ++n) sum[i][n] = load_floats(value + i * p.width + n * kLanes) * factor[i];
  for (int64_t j = 0; j < count; ++j) {
    Floats each[vectors];
    for (int n = 0; n < vectors; ++n) each[n] = load_floats(v + j * stride + n * kLanes);
    for (int i = 0; i < rows; ++i) {
      const Floats weight = all(weights[i * kBlock + j]);
      for (int n = 0; n < vectors; ++n) sum[i][n] = fused(weight, each[n], sum[i][n]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < vectors; ++n) store(value + i * p.width + n * kLanes, sum[i][n]);
}

template <int rows>
INLINE void gather_rows(const Plan& p, const float* factor, const float* weights, int64_t count, const float* v, int64_t stride, float* value) {
  int64_t e = 0;
  for (; e + 4 * kLanes <= p.width; e += 4 * kLanes) gather<rows, 4>(p, factor, weights, count, v + e, stride, value + e);
  for (; e < p.width; e += kLanes) gather<rows, 1>(p, factor, weights, count, v + e, stride, value + e);
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

// The partial result of one chunk of slots.
template <class Element>
void attend(const Call& c, const Plan& p, const Unit& u, int64_t chunk, const Buffers& own, const Partial& part) {
  const int64_t row = integers(c.rows)[u.b], position = integers(c.position)[u.b] + u.tile * p.step;
  const int64_t count = std::min(p.step, c.queries - u.tile * p.step) * p.group;
  const Slots seen = slots_of(c, p, u.b, u.tile);
  const int64_t first = std::max(seen.first, chunk * kChunk), end = std::min(seen.end, (chunk + 1) * kChunk);
  float factor[kTall];
  part.clear(p);
  for (int64_t at = first / kBlock * kBlock; at < end; at += kBlock) {
    const int64_t from = std::max(first - at, int64_t(0)), to = std::min(end - at, kBlock);
    const Element* k = reinterpret_cast<const Element*>(c.k) + row * c.k_row + u.head * c.k_head + c.slot(at) * c.k_slot;
    const Element* v = reinterpret_cast<const Element*>(c.v) + row * c.v_row + u.head * c.v_head + c.slot(at) * c.v_slot;
    prefetch(v, from, to, c.v_slot, c.width);
    transpose_keys(c, p, k, from, to, own.rows, own.keys);
    prefetch(k, kBlock, std::min(end - at, 2 * kBlock), c.k_slot, c.depth);
    by_rows(count, [&](int64_t r, auto rows) { score<rows>(p, own.q + r * p.depth, own.keys, own.scores + r * kBlock); });
    const bool is_direct = std::is_same_v<Element, float> && p.width == c.width;
    if (!is_direct)
      for (int64_t j = from; j < to; ++j) widen(v + j * c.v_slot, c.width, own.rows + j * p.width, p.width);
    const int64_t stride = is_direct ? c.v_slot : p.width;
    const float* values = (is_direct ? reinterpret_cast<const float*>(v) : own.rows) + from * stride;
    by_rows(count, [&](int64_t r, auto rows) {
      for (int i = 0; i < rows; ++i) {
        const int64_t last = position + (r + i) / p.group - at;
        const int64_t begin = c.window == 0 ? from : std::max(from, last - c.window + 1);
        factor[i] = weigh(c, std::min(begin, kBlock), std::clamp(last + 1, int64_t(0), to), own.scores + (r + i) * kBlock,
                          part.largest[r + i], part.sum[r + i]);
      }
      gather_rows<rows>(p, factor, own.scores + r * kBlock + from, to - from, values, stride, part.value + r * p.width);
    });
  }
}

// Adds to a result that of the next chunk.
inline void join(const Plan& p, const Partial& part, const Partial& whole) {
  for (int64_t i = 0; i < p.height; ++i) {
    const float largest = std::max(whole.largest[i], part.largest[i]), base = base_of(largest);
    const float before = exponential(whole.largest[i] - base), here = exponential(part.largest[i] - base);
    whole.largest[i] = largest;
    whole.sum[i] = whole.sum[i] * before + part.sum[i] * here;
    float *to = whole.value + i * p.width, *from = part.value + i * p.width;
    for (int64_t e = 0; e < p.width; e += kLanes)
      store(to + e, fused(load_floats(to + e), all(before), load_floats(from + e) * here));
  }
}

template <class Element>
void finish(const Call& c, const Plan& p, const Unit& u, const Partial& whole) {
  const int64_t first = u.tile * p.step, count = std::min(p.step, c.queries - first);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t g = 0; g < p.group; ++g) {
      const int64_t i = t * p.group + g, at = (u.b * c.queries + first + t) * c.heads + u.head * p.group + g;
      Element* y = reinterpret_cast<Element*>(c.y) + at * c.width;
      for (int64_t e = 0; e < c.width; e += kLanes) {
        Element rounded[kLanes];
        store_numbers(rounded, load_floats(whole.value + i * p.width + e) / whole.sum[i]);
        std::memcpy(y + e, rounded, std::min<int64_t>(kLanes, c.width - e) * sizeof(Element));
      }
    }
}

}  // namespace
