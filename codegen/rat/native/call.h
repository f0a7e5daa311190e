// What one call computes, as Python hands it over, which tokens a query sees and where these lie.
#pragma once
#include <softmax.h>

namespace {

enum Type : int64_t { kFloat32, kBFloat16, kFloat16 };

// x[row, head, token, channel], strides in elements, 0 where one is for all; `data` is 0 where there is none. But for those of the gate
// and its bias, channels lie side by side.
struct Operand {
  int64_t data, row, head, token, channel;
  template <class Element>
  Element* at(int64_t b, int64_t h, int64_t t) const {
    return reinterpret_cast<Element*>(data) + b * row + h * head + t * token;
  }
};

// All fields are 8 bytes, in the order of `_CALL` in kernels.py.
struct Call {
  Operand q, k, v, gate, bias, cos, sin;                      // bias, cos and sin are float32
  Operand key_slots, value_slots, key_state, value_state;     // the states are float32
  int64_t y, type;                                            // y [batch, tokens, heads, depth]
  int64_t position, rows, lengths;                            // int64 [batch], 0 without caches; lengths 0 where all tokens are real
  int64_t batch, heads, kv_heads, tokens, depth, cache_rows, slots;
  int64_t turned, is_interleaved;                             // channels
  int64_t chunk, window, sinks, is_raw, resets;
  int64_t threads, scratch;
  double scale, summary_bias;
};

inline const int64_t* integers(int64_t address) { return reinterpret_cast<const int64_t*>(address); }

// Row b of a call: its tokens are those at times [start, start + tokens), of which the first `count` are real.
struct Row {
  int64_t b, place, start, count;
};

inline Row row_of(const Call& c, int64_t b) {
  if (c.position == 0) return {b, 0, 0, c.tokens};
  return {b, integers(c.rows)[b], integers(c.position)[b], c.lengths == 0 ? c.tokens : integers(c.lengths)[b]};
}

// The first b that lies outside of the caches or has another number of tokens than there are, or -1.
inline int64_t first_outside(const Call& c) {
  for (int64_t b = 0; b < c.batch && c.position != 0; ++b) {
    const Row r = row_of(c, b);
    if (r.place < 0 || r.place >= c.cache_rows || r.start < 0 || r.start > INT64_MAX / 2 || r.count < 0 || r.count > c.tokens) return b;
  }
  return -1;
}

inline int64_t ring(const Call& c) { return c.window + (c.is_raw ? c.chunk : 1); }
inline int64_t summaries(const Call& c) { return c.slots - c.sinks - ring(c); }
// The first chunk that is no summary to a query at t.
inline int64_t open_chunk(const Call& c, int64_t t) { return t < c.window ? 0 : (t - c.window) / c.chunk; }
inline int64_t near_begin(const Call& c, int64_t t) { return std::max(c.sinks, c.is_raw ? open_chunk(c, t) * c.chunk : t - c.window); }

// Keys with consecutive numbers in one place: those of chunks or of times. A query's own token is in none: it is always seen, and all
// sums begin with it.
enum Kind { kSinks, kSummaries, kNear };
struct Range {
  Kind kind;
  bool is_new;                // of the tokens of this call, in scratch; in slots otherwise
  int64_t begin, end, place;  // numbers; where the first lies: a slot, a final state or a token
  int64_t pieces() const { return (end - begin + kChunk - 1) / kChunk; }
};

struct Ranges {
  Range each[7];
  int count = 0;
  void add(Range range) {
    if (range.begin < range.end) each[count++] = range;
  }
  int64_t pieces() const {
    int64_t sum = 0;
    for (int i = 0; i < count; ++i) sum += each[i].pieces();
    return sum;
  }
};

// What queries at times [first, end) of a row see, each of them or some.
inline Ranges ranges_of(const Call& c, const Row& r, int64_t first, int64_t end) {
  const int64_t open = open_chunk(c, end - 1), old_chunks = r.start / c.chunk, low = near_begin(c, first);
  Ranges ranges;
  if (c.key_slots.data != 0) {
    const int64_t chunk = c.sinks / c.chunk, at_ring = c.sinks + summaries(c), begins = low % ring(c);
    const int64_t turn = std::min(r.start, low + ring(c) - begins);  // where the ring begins anew
    ranges.add({kSinks, false, 0, std::min(c.sinks, r.start), 0});
    ranges.add({kSummaries, false, chunk, std::min({old_chunks, open, summaries(c)}), c.sinks + chunk});
    ranges.add({kNear, false, low, turn, at_ring + begins});
    ranges.add({kNear, false, turn, r.start, at_ring});
  }
  ranges.add({kSinks, true, r.start, std::min(c.sinks, end - 1), 0});
  const int64_t chunk = std::max(c.sinks / c.chunk, old_chunks), begin = std::max(low, r.start);
  const bool is_alone = !c.is_raw && c.window == 0;  // nothing is near but a query's own token
  ranges.add({kSummaries, true, chunk, open, c.is_raw ? chunk - old_chunks : (chunk + 1) * c.chunk - 1 - r.start});
  ranges.add({kNear, true, begin, is_alone ? begin : end - 1, begin - r.start});
  return ranges;
}

// The numbers of a range that a query at t sees.
inline Seen seen_of(const Call& c, const Range& range, int64_t t) {
  if (range.kind == kSinks) return {range.begin, std::min(range.end, t)};
  if (range.kind == kSummaries) return {range.begin, std::min(range.end, open_chunk(c, t))};
  return {std::max(range.begin, near_begin(c, t)), std::min(range.end, t)};
}

// How a call is cut. A stream is a row and head of keys; `wave` streams are worked on at once, so that scratch is for these. A tile is
// `step` queries of a stream; a unit one tile, or where that is all there is of a stream, one piece of a range. A segment is tokens whose
// states follow from nothing before them.
struct Plan : Shape {
  int64_t group, step, tiles, segment, segments, finals, tokens, streams, wave;
  bool is_split;
  int64_t units;  // of a wave, the last one may have fewer

  // Floats of scratch, after those of the threads: of each stream of a wave what is near as keys and values, final states of "raw"
  // likewise, and the last state; partial results.
  int64_t near_floats() const { return 2 * wave * tokens * depth; }
  int64_t final_floats() const { return 2 * wave * finals * depth; }
  int64_t last_floats() const { return 2 * wave * depth; }
};

inline Plan plan_of(const Call& c) {
  Plan p{};
  p.group = c.heads / c.kv_heads;
  p.step = std::min(c.tokens, std::max<int64_t>(1, kTile / p.group));
  p.tiles = (c.tokens + p.step - 1) / p.step;
  p.height = p.step * p.group;
  p.depth = p.width = round_up(c.depth, kLanes);
  p.tokens = c.tokens;
  p.segment = c.chunk * std::max<int64_t>(1, 64 / c.chunk);
  p.segments = c.resets ? (c.tokens - 1) / p.segment + 2 : 1;
  p.finals = c.is_raw ? c.tokens / c.chunk + 2 : 0;
  p.is_split = p.tiles == 1;
  p.streams = c.batch * c.kv_heads;
  p.wave = p.is_split ? p.streams : std::min(p.streams, 2 * c.threads);
  p.units = p.wave * p.tiles;
  if (p.is_split) {
    p.units = 0;
    for (int64_t b = 0; b < c.batch; ++b) {
      const Row r = row_of(c, b);
      p.units += ranges_of(c, r, r.start, r.start + c.tokens).pieces() * c.kv_heads;
    }
  }
  return p;
}

}  // namespace
