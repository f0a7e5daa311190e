// gw.rat_attention and gw.rat_cached_attention on a CPU.
//
// 1. States: the recurrence of a chunk, or of a row without resets, runs through its tokens, with channels side by side; what queries
//    will see of it goes to scratch in float32, turned.
// 2. Attention: the tokens that a query sees are a few ranges of slots and of scratch (call.h), and a tile of queries meets these a block
//    at a time (softmax.h). Its own token begins the sums. Few queries have their ranges cut into pieces, joined in order.
// 3. Caches: what they keep is written when all queries have read.
//
// A result depends neither on the other rows nor on the number of threads. Nothing has tokens times tokens.
#include "attend.h"
#include "threads.h"

namespace {

struct Unit {
  Row row;
  int64_t head, tile, piece;
};

// The `index`th unit of a wave. Tiles that see most come first.
inline Unit unit_of(const Call& c, const Plan& p, int64_t wave, int64_t index) {
  const int64_t stream = wave + index / p.tiles;
  if (!p.is_split) return {row_of(c, stream / c.kv_heads), stream % c.kv_heads, p.tiles - 1 - index % p.tiles, 0};
  for (int64_t b = 0;; ++b) {
    const Row r = row_of(c, b);
    const int64_t pieces = ranges_of(c, r, r.start, r.start + c.tokens).pieces();
    if (index < pieces * c.kv_heads) return {r, index / pieces, 0, index % pieces};
    index -= pieces * c.kv_heads;
  }
}

template <class Element>
void attend_piece(const Call& c, const Plan& p, const Unit& u, const Buffers& own, const Partial& part) {
  const Tile tile = tile_of(c, p, 0);
  const Ranges ranges = ranges_of(c, u.row, u.row.start, u.row.start + c.tokens);
  turn_queries<Element>(c, p, u.row, u.head, tile, own);
  part.clear(p);
  int64_t piece = u.piece;
  for (int i = 0; i < ranges.count; piece -= ranges.each[i++].pieces()) {
    const Range& range = ranges.each[i];
    if (piece >= range.pieces()) continue;
    const int64_t first = range.begin + piece * kChunk;
    return attend<Element>(c, p, u.row, u.head, tile, range, first, std::min(first + kChunk, range.end), own, part);
  }
}

template <class Element>
void attend_tile(const Call& c, const Plan& p, const Unit& u, const Buffers& own) {
  const Tile tile = tile_of(c, p, u.tile);
  const int64_t first = u.row.start + tile.first;
  const Ranges ranges = ranges_of(c, u.row, first, first + tile.count);
  turn_queries<Element>(c, p, u.row, u.head, tile, own);
  begin(c, p, u.row, u.head, tile, own);
  for (int i = 0; i < ranges.count; ++i)
    attend<Element>(c, p, u.row, u.head, tile, ranges.each[i], ranges.each[i].begin, ranges.each[i].end, own, own.whole);
  finish<Element>(c, p, u.row, u.head, tile, own.whole);
}

// Joins the pieces of a row and head, of which the first is the partial result number `first`.
template <class Element>
void join_pieces(const Call& c, const Plan& p, const Row& r, int64_t head, const Buffers& own) {
  const Tile tile = tile_of(c, p, 0);
  int64_t first = 0, pieces = 0;
  for (int64_t b = 0; b <= r.b; ++b) {
    const Row other = row_of(c, b);
    pieces = ranges_of(c, other, other.start, other.start + c.tokens).pieces();
    first += pieces * (b < r.b ? c.kv_heads : head);
  }
  turn_queries<Element>(c, p, r, head, tile, own);
  begin(c, p, r, head, tile, own);
  for (int64_t piece = 0; piece < pieces; ++piece) join(p, Partial::at(partials_of(c, p) + (first + piece) * p.partial(), p), own.whole);
  finish<Element>(c, p, r, head, tile, own.whole);
}

// The streams [wave, end), by all threads together.
template <class Element>
void run_wave(const Call& c, const Plan& p, int64_t wave, int64_t end, float* scratch) {
  const Buffers own(scratch, p);
  const int64_t units = p.is_split ? p.units : (end - wave) * p.tiles;
#pragma omp for schedule(dynamic)
  for (int64_t index = 0; index < (end - wave) * p.segments; ++index) {
    const int64_t stream = wave + index / p.segments;
    scan_segment<Element>(c, p, row_of(c, stream / c.kv_heads), stream % c.kv_heads, index % p.segments, scratch);
  }
#pragma omp for schedule(dynamic)
  for (int64_t index = 0; index < units; ++index) {
    const Unit u = unit_of(c, p, wave, index);
    if (p.is_split) attend_piece<Element>(c, p, u, own, Partial::at(partials_of(c, p) + index * p.partial(), p));
    else attend_tile<Element>(c, p, u, own);
  }
#pragma omp for schedule(static)
  for (int64_t stream = wave; stream < end; ++stream) {
    const Row r = row_of(c, stream / c.kv_heads);
    if (p.is_split) join_pieces<Element>(c, p, r, stream % c.kv_heads, own);
    if (c.key_slots.data != 0) keep<Element>(c, p, r, stream % c.kv_heads);
  }
}

template <class Element>
void run(const Call& c) {
  const Plan p = plan_of(c);
#pragma omp parallel num_threads(c.threads)
  for (int64_t wave = 0; wave < p.streams; wave += p.wave)
    run_wave<Element>(c, p, wave, std::min(wave + p.wave, p.streams), reinterpret_cast<float*>(c.scratch) + thread_index() * p.own());
}

}  // namespace

extern "C" {

// Bytes of scratch that a call needs, at an address that is a multiple of 64; -1 - b where row b lies outside of the caches.
int64_t scratch_bytes(const Call* c) {
  const int64_t outside = first_outside(*c);
  if (outside >= 0) return -1 - outside;
  const Plan p = plan_of(*c);
  return 4 * (c->threads * p.own() + p.near_floats() + p.final_floats() + p.last_floats() + (p.is_split ? p.units * p.partial() : 0));
}

// The call was asked for its scratch, and has been found to lie in the caches.
void rat_attention(const Call* c) {
  if (c->type == kFloat32) run<float>(*c);
  else if (c->type == kBFloat16) run<BFloat16>(*c);
  else run<Float16>(*c);
}
}
