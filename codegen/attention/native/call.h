// What one call computes, as Python hands it over, and how it is cut into pieces.
#pragma once
#include <algorithm>
#include <cstdint>

#include <softmax.h>

namespace {

enum Type : int64_t { kFloat32, kBFloat16, kFloat16 };

// to[rows[b], h, position[b] + i] = from[b, h, i], in a ring slot (position[b] + i) % capacity. All fields are 8 bytes, in the order of `_APPEND` in cached.py; strides in elements.
struct Append {
  int64_t to, from, itemsize;
  int64_t to_row, to_head, to_slot, from_row, from_head, from_slot;
  int64_t position, rows;                          // int64 [batch]
  int64_t batch, heads, slots, depth, cache_rows, capacity, threads, ring;

  bool holds(int64_t position) const { return ring ? slots <= capacity : position <= capacity - slots; }
};

// y [batch, queries, heads, width]. All fields are 8 bytes, in the order of `_CALL` in cached.py; strides in elements.
struct Call {
  int64_t q, k, v, y, type;
  int64_t q_row, q_head, q_query, k_row, k_head, k_slot, v_row, v_head, v_slot;
  int64_t position, rows;                          // int64 [batch]
  int64_t batch, heads, kv_heads, queries, depth, width, cache_rows, capacity;
  int64_t window, threads, ring, scratch;
  double scale, softcap;

  bool holds(int64_t position) const { return position <= capacity - queries || (ring && capacity >= window + queries - 1); }
  // Where a block of positions begins: a ring whose blocks are not whole holds no more positions than slots.
  int64_t slot(int64_t position) const { return ring ? position % capacity : position; }
};

inline const int64_t* integers(int64_t address) { return reinterpret_cast<const int64_t*>(address); }

// The first b whose row or slots lie outside of the cache, or -1.
template <class Operands>
int64_t first_outside(const Operands& c) {
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t row = integers(c.rows)[b], position = integers(c.position)[b];
    if (row < 0 || row >= c.cache_rows || position < 0 || !c.holds(position)) return b;
  }
  return -1;
}

// How a call is cut: a tile is `step` queries of a row and head of the cache, a unit one tile, or one chunk of slots of a tile.
struct Plan : Shape {
  int64_t group, step, tiles;  // query heads a key head; of a row and key head
  bool is_split;               // units are chunks
  int64_t units;
};

struct Slots {
  int64_t first, end;  // that some query of a tile sees
  int64_t chunk() const { return first / kChunk; }
  int64_t chunks() const { return (end - 1) / kChunk - chunk() + 1; }
};

inline Slots slots_of(const Call& c, const Plan& p, int64_t b, int64_t tile) {
  const int64_t first = integers(c.position)[b] + tile * p.step;
  const int64_t end = integers(c.position)[b] + std::min((tile + 1) * p.step, c.queries);
  return {c.window == 0 ? 0 : std::max<int64_t>(0, first - c.window + 1), end};
}

inline Plan plan_of(const Call& c) {
  Plan p{};
  p.group = c.heads / c.kv_heads;
  p.step = std::min(c.queries, std::max<int64_t>(1, kTile / p.group));
  p.tiles = (c.queries + p.step - 1) / p.step;
  p.height = p.step * p.group;
  p.depth = round_up(c.depth, kLanes);
  p.width = round_up(c.width, kLanes);
  p.units = c.batch * c.kv_heads * p.tiles;
  // Either way gives the same bits.
  p.is_split = p.units < 4 * c.threads || p.tiles == 1;
  if (p.is_split) {
    p.units = 0;
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t tile = 0; tile < p.tiles; ++tile) p.units += slots_of(c, p, b, tile).chunks() * c.kv_heads;
  }
  return p;
}

struct Unit {
  int64_t b, head, tile, chunk, first_partial;
};

// The unit that is the `index`th, and the first partial result of its tile.
inline Unit unit_of(const Call& c, const Plan& p, int64_t index) {
  if (!p.is_split) return {index / (c.kv_heads * p.tiles), index / p.tiles % c.kv_heads, index % p.tiles, 0, 0};
  int64_t before = 0;
  for (int64_t b = 0;; ++b)
    for (int64_t tile = 0; tile < p.tiles; ++tile) {
      const int64_t chunks = slots_of(c, p, b, tile).chunks(), rest = index - before;
      if (rest < chunks * c.kv_heads) return {b, rest / chunks, tile, rest % chunks, before + rest / chunks * chunks};
      before += chunks * c.kv_heads;
    }
}

}  // namespace
