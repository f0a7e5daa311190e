// gw.cached_attention and gw.kv_append on a CPU.
//
// Queries that share keys, those of a group of heads and of neighbouring positions, meet a chunk of slots at a time: keys are
// transposed in the cache and scores are computed with a slot a lane; weights and sums follow as in FlashAttention (arXiv 2205.14135,
// algorithm 1). Chunks are partial results, joined in order by their largest scores (Flash-Decoding). Only slots that a query sees are
// read. Chunks and blocks lie at fixed slots and every sum is in the order of slots or of depth, so that the result of a query depends
// neither on the queries and rows beside it nor on the number of threads.
#include "attend.h"
#include "threads.h"

namespace {

template <class Element>
void attention(const Call& c) {
  const Plan p = plan_of(c);
  float* partials = reinterpret_cast<float*>(c.scratch) + c.threads * p.own();
#pragma omp parallel num_threads(c.threads)
  {
    const Buffers own(reinterpret_cast<float*>(c.scratch) + thread_index() * p.own(), p);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < p.units; ++index) {
      const Unit u = unit_of(c, p, index);
      const Slots seen = slots_of(c, p, u.b, u.tile);
      widen_queries<Element>(c, p, u, own.q);
      if (p.is_split) {
        attend<Element>(c, p, u, seen.chunk() + u.chunk, own, Partial::at(partials + index * p.partial(), p));
        continue;
      }
      own.whole.clear(p);
      for (int64_t chunk = 0; chunk < seen.chunks(); ++chunk) {
        attend<Element>(c, p, u, seen.chunk() + chunk, own, own.part);
        join(p, own.part, own.whole);
      }
      finish<Element>(c, p, u, own.whole);
    }
#pragma omp for schedule(static)
    for (int64_t index = 0; index < (p.is_split ? p.units : 0); ++index) {
      const Unit u = unit_of(c, p, index);
      if (u.chunk != 0) continue;  // the first unit of a tile joins all of its
      own.whole.clear(p);
      const int64_t chunks = slots_of(c, p, u.b, u.tile).chunks();
      for (int64_t chunk = 0; chunk < chunks; ++chunk) join(p, Partial::at(partials + (index + chunk) * p.partial(), p), own.whole);
      finish<Element>(c, p, u, own.whole);
    }
  }
}

}  // namespace

extern "C" {

// Bytes of scratch that a call needs, at an address that is a multiple of 64; -1 - b where row b lies outside of the cache.
int64_t scratch_bytes(const Call* c) {
  const int64_t outside = first_outside(*c);
  if (outside >= 0) return -1 - outside;
  const Plan p = plan_of(*c);
  return 4 * (c->threads * p.own() + (p.is_split ? p.units * p.partial() : 0));
}

// The call was asked for its scratch, and has been found to lie in the cache.
void cached_attention(const Call* c) {
  if (c->type == kFloat32) attention<float>(*c);
  else if (c->type == kBFloat16) attention<BFloat16>(*c);
  else attention<Float16>(*c);
}

// 0, or -1 - b and nothing written where row b lies outside of the cache.
int64_t kv_append(const Append* appends, int64_t count) {
  for (int64_t n = 0; n < count; ++n) {
    const int64_t outside = first_outside(appends[n]);
    if (outside >= 0) return -1 - outside;
  }
  for (int64_t n = 0; n < count; ++n) {
    const Append& a = appends[n];
    const int64_t bytes = a.depth * a.itemsize, pieces = a.batch * a.heads;
#pragma omp parallel for num_threads(a.threads) if (pieces * a.slots * bytes > 1 << 20)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t b = piece / a.heads, head = piece % a.heads, row = integers(a.rows)[b];
      const int64_t to = row * a.to_row + head * a.to_head, first = integers(a.position)[b], from = b * a.from_row + head * a.from_head;
      for (int64_t i = 0; i < a.slots; ++i)
        std::memcpy(reinterpret_cast<char*>(a.to) + (to + (a.ring ? (first + i) % a.capacity : first + i) * a.to_slot) * a.itemsize,
                    reinterpret_cast<const char*>(a.from) + (from + i * a.from_slot) * a.itemsize, bytes);
    }
  }
  return 0;
}
}
