// A tile of queries against a chunk of slots.
#pragma once
#include "call.h"

namespace {

// Rows of a tile: query t of head g at t * group + g.
template <class Element>
void widen_queries(const Call& c, const Plan& p, const Unit& u, float* q) {
  const int64_t first = u.tile * p.step, count = std::min(p.step, c.queries - first);
  const Element* from = reinterpret_cast<const Element*>(c.q) + u.b * c.q_row + u.head * p.group * c.q_head + first * c.q_query;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t g = 0; g < p.group; ++g)
      widen(from + t * c.q_query + g * c.q_head, c.depth, q + (t * p.group + g) * p.depth, p.depth);
}

// The partial result of one chunk of slots.
template <class Element>
void attend(const Call& c, const Plan& p, const Unit& u, int64_t chunk, const Buffers& own, const Partial& part) {
  const int64_t row = integers(c.rows)[u.b], position = integers(c.position)[u.b] + u.tile * p.step;
  const int64_t count = std::min(p.step, c.queries - u.tile * p.step) * p.group;
  const Slots seen = slots_of(c, p, u.b, u.tile);
  const int64_t first = std::max(seen.first, chunk * kChunk), end = std::min(seen.end, (chunk + 1) * kChunk);
  const Scoring scoring = {float(c.scale), float(c.softcap), 0.0f};
  part.clear(p);
  for (int64_t at = first / kBlock * kBlock; at < end; at += kBlock) {
    const int64_t from = std::max(first - at, int64_t(0)), to = std::min(end - at, kBlock);
    const Element* k = reinterpret_cast<const Element*>(c.k) + row * c.k_row + u.head * c.k_head + c.slot(at) * c.k_slot;
    const Element* v = reinterpret_cast<const Element*>(c.v) + row * c.v_row + u.head * c.v_head + c.slot(at) * c.v_slot;
    const Keys<Element> block = {k, v, c.k_slot, c.v_slot, c.depth, c.width, from, to};
    const auto visible = [&](int64_t r) {
      const int64_t last = position + r / p.group - at;
      const int64_t begin = c.window == 0 ? from : std::max(from, last - c.window + 1);
      return Seen{std::min(begin, kBlock), std::clamp(last + 1, int64_t(0), to)};
    };
    meet(p, scoring, block, count, own, part, visible,
         [&] { prefetch(k, kBlock, std::min(end - at, 2 * kBlock), c.k_slot, c.depth); });
  }
}

template <class Element>
void finish(const Call& c, const Plan& p, const Unit& u, const Partial& whole) {
  const int64_t first = u.tile * p.step, count = std::min(p.step, c.queries - first);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t g = 0; g < p.group; ++g) {
      const int64_t at = (u.b * c.queries + first + t) * c.heads + u.head * p.group + g;
      divide(p, whole, t * p.group + g, c.width, reinterpret_cast<Element*>(c.y) + at * c.width);
    }
}

}  // namespace
