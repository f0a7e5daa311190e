// A tile of queries against what it sees.
#pragma once
#include "scan.h"

namespace {

// Queries [first, first + count) of a row, counted from its first token, of all heads that share keys.
struct Tile {
  int64_t first, count;
};

inline Tile tile_of(const Call& c, const Plan& p, int64_t tile) { return {tile * p.step, std::min(p.step, c.tokens - tile * p.step)}; }

// The queries of a tile, turned: that of token t of head g in row t * group + g.
template <class Element>
void turn_queries(const Call& c, const Plan& p, const Row& r, int64_t head, const Tile& tile, const Buffers& own) {
  for (int64_t row = 0; row < tile.count * p.group; ++row) {
    const int64_t i = tile.first + row / p.group;
    widen(c.q.at<const Element>(r.b, head * p.group + row % p.group, i), c.depth, own.rows, p.depth);
    rotate(c, r.b, i, own.rows, p.depth, own.q + row * p.depth);
  }
}

// What the queries of a tile see of their own tokens.
inline void begin(const Call& c, const Plan& p, const Row& r, int64_t head, const Tile& tile, const Buffers& own) {
  const Stream stream(c, p, r.b, head);
  for (int64_t row = 0; row < tile.count * p.group; ++row) {
    const int64_t i = tile.first + row / p.group;
    const float *q = own.q + row * p.depth, *k = stream.near_k + i * p.depth;
    Floats sum = {};
    for (int64_t d = 0; d < p.depth; d += kLanes) sum = fused(load_floats(q + d), load_floats(k + d), sum);
    own.whole.largest[row] = lane_sum(sum) * float(c.scale);
    own.whole.sum[row] = 1.0f;
    std::copy_n(stream.near_v + i * p.depth, p.width, own.whole.value + row * p.width);
  }
}

// Adds to `part` what a tile sees of the numbers [begin, end) of a range, whose first lies at `k` and `v`.
template <class Element>
void attend(const Call& c, const Plan& p, const Row& r, const Tile& tile, const Range& range, int64_t begin, int64_t end, const Element* k,
            const Element* v, int64_t k_stride, int64_t v_stride, int64_t depth, const Buffers& own, const Partial& part) {
  const Scoring scoring = {float(c.scale), 0.0f, range.kind == kSummaries ? float(c.summary_bias) : 0.0f};
  for (int64_t at = begin; at < end; at += kBlock) {
    const Element *block_k = k + (at - begin) * k_stride, *block_v = v + (at - begin) * v_stride;
    const Keys<Element> block = {block_k, block_v, k_stride, v_stride, depth, depth, 0, std::min(kBlock, end - at)};
    const auto seen = [&](int64_t row) {
      const Seen here = seen_of(c, range, r.start + tile.first + row / p.group);
      return Seen{std::clamp(here.first - at, int64_t(0), kBlock), std::clamp(here.end - at, int64_t(0), block.end)};
    };
    meet(p, scoring, block, tile.count * p.group, own, part, seen,
         [&] { prefetch(block_k, kBlock, std::min(end - at, 2 * kBlock), k_stride, depth); });
  }
}

// The same, with the numbers found where the range has them.
template <class Element>
void attend(const Call& c, const Plan& p, const Row& r, int64_t head, const Tile& tile, const Range& range, int64_t begin, int64_t end,
            const Buffers& own, const Partial& part) {
  const int64_t place = begin - range.begin;
  if (!range.is_new) {
    const auto *k = c.key_slots.at<const Element>(r.place, head, range.place + place);
    const auto *v = c.value_slots.at<const Element>(r.place, head, range.place + place);
    return attend(c, p, r, tile, range, begin, end, k, v, c.key_slots.token, c.value_slots.token, c.depth, own, part);
  }
  const Stream stream(c, p, r.b, head);
  const bool is_final = c.is_raw && range.kind == kSummaries;
  const int64_t step = !c.is_raw && range.kind == kSummaries ? c.chunk : 1, first = (range.place + place * step) * p.depth;
  const float *k = (is_final ? stream.final_k : stream.near_k) + first, *v = (is_final ? stream.final_v : stream.near_v) + first;
  attend(c, p, r, tile, range, begin, end, k, v, step * p.depth, step * p.depth, p.depth, own, part);
}

template <class Element>
void finish(const Call& c, const Plan& p, const Row& r, int64_t head, const Tile& tile, const Partial& whole) {
  for (int64_t row = 0; row < tile.count * p.group; ++row) {
    const int64_t at = (r.b * c.tokens + tile.first + row / p.group) * c.heads + head * p.group + row % p.group;
    divide(p, whole, row, c.depth, reinterpret_cast<Element*>(c.y) + at * c.depth);
  }
}

}  // namespace
