// softmax(q k^T scale + mask) v on a CPU, for many queries: a query a lane.
//
// A tile of up to kCols queries, of all heads that share keys, lies transposed. A block of keys meets it as rows meet a panel: scores come
// out with the queries in the lanes, so that largest scores, exponentials and sums need nothing across lanes, and depths that are no
// multiple of a vector waste nothing. Values follow in the same form, out^T = v^T p^T, as in FlashAttention (arXiv 2205.14135,
// algorithm 1).
// Sums are float32, in the order of the keys. Finite results depend neither on the number of threads nor on what other queries there are.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <blocks.h>
#include <exponentials.h>
#include <floats.h>
#include <threads.h>

namespace {

enum Type : int64_t { kFloat32, kBFloat16, kFloat16, kBool, kNoMask };

// y [batch, heads, queries, width]. All fields are 8 bytes, in the order of `_CALL` in attention.py; strides in elements, of the mask 0
// where it is the same along a dim.
struct Call {
  int64_t q, k, v, y, type;
  int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, y_batch, y_head, y_row;
  int64_t mask, mask_type, mask_batch, mask_head, mask_row, mask_key;
  int64_t batch, heads, kv_heads, queries, keys, depth, width, is_causal, threads, scratch;
  double scale;
};

constexpr int64_t kKeys = 96;       // of a block: their scores for a tile of 64 queries are 24 KiB
constexpr int64_t kAlone = 1 << 15; // products up to which a second thread is not worth waking

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Plan {
  int64_t rows, step, tiles, units;  // queries of all heads that share keys; of them in a tile
  // Offsets in floats in the scratch of a thread: queries [depth, lanes], scores [kKeys, lanes], mask [kKeys, lanes], values so far
  // [width, lanes], and keys and values in float32 where they are not.
  int64_t scores, mask, out, keys, values, own;
};

inline Plan plan_of(const Call& c) {
  Plan p{};
  p.rows = c.heads / c.kv_heads * c.queries;
  p.step = kCols;
  while (p.step > kLanes && c.batch * c.kv_heads * p.rows < 2 * c.threads * p.step) p.step /= 2;  // few tiles would leave threads idle
  p.tiles = (p.rows + p.step - 1) / p.step;
  p.units = c.batch * c.kv_heads * p.tiles;
  int64_t end = c.depth * p.step;
  const auto take = [&end](int64_t floats) { return std::exchange(end, end + round_up(floats, 16)); };
  p.scores = take(kKeys * p.step);
  p.mask = take(c.mask_type == kNoMask ? 0 : kKeys * p.step);
  p.out = take(c.width * p.step);
  p.keys = take(c.type == kFloat32 ? 0 : kKeys * c.depth);
  p.values = take(c.type == kFloat32 ? 0 : kKeys * c.width);
  p.own = round_up(end, 16);
  return p;
}

// Where the queries of a tile come from, and where a thread puts what it makes of them; `lanes` is `count` in 1, 2 or 4 vectors.
struct Tile {
  int64_t batch, kv_head, first, count, lanes;
  float *q, *scores, *mask, *out, *keys, *values;

  Tile(const Call& c, const Plan& p, int64_t unit, float* own)
      : batch(unit / (c.kv_heads * p.tiles)), kv_head(unit / p.tiles % c.kv_heads), first(unit % p.tiles * p.step),
        count(std::min(p.step, p.rows - first)), lanes(count > 2 * kLanes ? kCols : round_up(count, kLanes)), q(own),
        scores(own + p.scores), mask(own + p.mask), out(own + p.out), keys(own + p.keys), values(own + p.values) {}

  int64_t head(const Call& c, int64_t i) const { return kv_head * (c.heads / c.kv_heads) + (first + i) / c.queries; }
  int64_t query(const Call& c, int64_t i) const { return (first + i) % c.queries; }
};

template <class Element>
void load_queries(const Call& c, const Tile& t) {
  for (int64_t i = 0; i < t.lanes; ++i) {
    if (i >= t.count) {
      for (int64_t d = 0; d < c.depth; ++d) t.q[d * t.lanes + i] = 0.0f;
      continue;
    }
    const Element* from = reinterpret_cast<const Element*>(c.q) + t.batch * c.q_batch + t.head(c, i) * c.q_head + t.query(c, i) * c.q_row;
    for (int64_t d = 0; d < c.depth; ++d) t.q[d * t.lanes + i] = number(from[d]);
  }
}

template <class Element>
INLINE float mask_number(const Element* mask) { return number(*mask); }
INLINE float mask_number(const uint8_t* mask) { return *mask ? 0.0f : -kInfinity; }

template <class Element>
INLINE Floats mask_numbers(const Element* mask) { return load_floats(mask); }
INLINE Floats mask_numbers(const uint8_t* mask) {
  typedef uint8_t Lanes __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(load<Lanes>(mask), Ints) != 0 ? all(0.0f) : all(-kInfinity);
}

// mask [count, lanes] of keys first .. first + count - 1, a number that is added to a score. Queries mostly have their keys side by side.
template <class Element>
void load_mask(const Call& c, const Tile& t, int64_t first, int64_t count) {
  const auto row = [&](int64_t i) {
    const int64_t of = std::min(i, t.count - 1);
    const int64_t at = t.batch * c.mask_batch + t.head(c, of) * c.mask_head + t.query(c, of) * c.mask_row + first * c.mask_key;
    return reinterpret_cast<const Element*>(c.mask) + at;
  };
  for (int64_t i = 0; i < t.lanes; i += kLanes) {
    int64_t j = 0;
    for (; c.mask_key == 1 && j + kLanes <= count; j += kLanes) {
      alignas(64) float square[kLanes][kLanes];
      for (int64_t n = 0; n < kLanes; ++n) store(square[n], mask_numbers(row(i + n) + j));
      transpose(reinterpret_cast<uint32_t*>(square), kLanes, reinterpret_cast<uint32_t*>(t.mask) + j * t.lanes + i, t.lanes);
    }
    for (; j < count; ++j)
      for (int64_t n = 0; n < kLanes; ++n) t.mask[j * t.lanes + i + n] = mask_number(row(i + n) + j * c.mask_key);
  }
}

void load_mask(const Call& c, const Tile& t, int64_t first, int64_t count) {
  switch (c.mask_type) {
    case kFloat32: return load_mask<float>(c, t, first, count);
    case kBFloat16: return load_mask<BFloat16>(c, t, first, count);
    case kFloat16: return load_mask<Float16>(c, t, first, count);
    case kBool: return load_mask<uint8_t>(c, t, first, count);
  }
}

// Rows of keys or values as float32, where they lie or in `to`; `stride` becomes that of what is returned.
template <class Element>
INLINE const float* widened(const Element* from, int64_t& stride, int64_t count, int64_t width, float* to) {
  if constexpr (std::is_same_v<Element, float>) return from;
  for (int64_t j = 0; j < count; ++j) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(to + j * width + i, load_floats(from + j * stride + i));
    for (; i < width; ++i) to[j * width + i] = number(from[j * stride + i]);
  }
  stride = width;
  return to;
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// What a query lane has seen.
template <int vectors>
struct Seen {
  Floats largest[vectors], sum[vectors];
  Ints last[vectors];  // the last key that it sees, where that is causal
};

// Scores of keys first .. first + count - 1, scaled and masked; `most` becomes the largest of each query.
template <int vectors>
void score(const Call& c, const Tile& t, const float* keys, int64_t stride, int64_t first, int64_t count, bool is_cut,
           const Seen<vectors>& seen, Floats (&most)[vectors]) {
  constexpr int64_t step = vectors * kLanes;
  const float scale = float(c.scale);
  in_blocks(count, [&](int64_t j, auto height) {
    constexpr int rows = decltype(height)::value;
    Floats sum[rows][vectors] = {};
    multiply<Singles, rows>(reinterpret_cast<const char*>(keys + j * stride), stride * 4, reinterpret_cast<const char*>(t.q), c.depth, sum);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = (j + i) * step + v * kLanes;
        Floats s = sum[i][v] * scale;
        if (c.mask_type != kNoMask) s += load_floats(t.mask + at);
        if (is_cut) s = all(int32_t(first + j + i)) > seen.last[v] ? all(-kInfinity) : s;
        most[v] = larger(s, most[v]);
        store(t.scores + at, s);
      }
  });
}

// Scores to exp(score - largest), and what was summed before to what it is relative to the new largest.
template <int vectors>
void weigh(const Tile& t, int64_t count, const Floats (&most)[vectors], Seen<vectors>& seen, Floats (&factor)[vectors]) {
  Floats base[vectors], total[vectors] = {};
  for (int v = 0; v < vectors; ++v) {
    base[v] = most[v] == -kInfinity ? all(0.0f) : most[v];  // a query that sees no key yet
    factor[v] = exponential(seen.largest[v] - base[v]);
    seen.largest[v] = most[v];
  }
  for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      float* at = t.scores + (j * vectors + v) * kLanes;
      const Floats weight = exponential(load_floats(at) - base[v]);
      total[v] += weight;
      store(at, weight);
    }
  for (int v = 0; v < vectors; ++v) seen.sum[v] = fused(seen.sum[v], factor[v], total[v]);
}

// out [width, step] = out * factor + v^T @ weights.
template <int vectors>
void gather(const Call& c, const Tile& t, const float* values, int64_t stride, int64_t count, const Floats (&factor)[vectors]) {
  constexpr int64_t step = vectors * kLanes;
  in_blocks(c.width, [&](int64_t e, auto height) {
    constexpr int rows = decltype(height)::value;
    Floats sum[rows][vectors];
    float* out = t.out + e * step;
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[i][v] = load_floats(out + i * step + v * kLanes) * factor[v];
    multiply<Singles, rows>(reinterpret_cast<const char*>(values + e), 4, reinterpret_cast<const char*>(t.scores), count, sum,
                            stride * 4);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) store(out + i * step + v * kLanes, sum[i][v]);
  });
}

template <class Element, int vectors>
void finish(const Call& c, const Tile& t, const Seen<vectors>& seen) {
  constexpr int64_t step = vectors * kLanes;
  for (int64_t e = 0; e < c.width; ++e)
    for (int v = 0; v < vectors; ++v) {
      float* at = t.out + e * step + v * kLanes;
      store(at, seen.sum[v] == 0.0f ? all(0.0f) : load_floats(at) / seen.sum[v]);
    }
  Element rounded[kLanes];
  for (int64_t i = 0; i < t.count; ++i) {
    Element* y = reinterpret_cast<Element*>(c.y) + t.batch * c.y_batch + t.head(c, i) * c.y_head + t.query(c, i) * c.y_row;
    for (int64_t e = 0; e < c.width; e += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, c.width - e);
      Floats lane = {};
      for (int64_t n = 0; n < count; ++n) lane[n] = t.out[(e + n) * step + i];
      store_numbers(rounded, lane);
      std::memcpy(y + e, rounded, count * sizeof(Element));
    }
  }
}

template <class Element, int vectors>
void attend(const Call& c, const Tile& t) {
  Seen<vectors> seen;
  int64_t end = c.is_causal ? 0 : c.keys, whole = c.keys;  // keys that some query sees, and that all do
  for (int v = 0; v < vectors; ++v) {
    seen.largest[v] = all(-kInfinity);
    seen.sum[v] = all(0.0f);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t last = t.query(c, std::min<int64_t>(v * kLanes + lane, t.count - 1));
      seen.last[v][lane] = int32_t(last);
      if (c.is_causal) end = std::max(end, std::min(last + 1, c.keys)), whole = std::min(whole, last + 1);
    }
  }
  load_queries<Element>(c, t);
  std::fill_n(t.out, c.width * t.lanes, 0.0f);
  const Element* k = reinterpret_cast<const Element*>(c.k) + t.batch * c.k_batch + t.kv_head * c.k_head;
  const Element* v = reinterpret_cast<const Element*>(c.v) + t.batch * c.v_batch + t.kv_head * c.v_head;
  for (int64_t first = 0; first < end; first += kKeys) {
    const int64_t count = std::min(kKeys, end - first);
    int64_t k_stride = c.k_row, v_stride = c.v_row;
    const float* keys = widened(k + first * c.k_row, k_stride, count, c.depth, t.keys);
    const float* values = widened(v + first * c.v_row, v_stride, count, c.width, t.values);
    if (c.mask_type != kNoMask) load_mask(c, t, first, count);
    Floats most[vectors], factor[vectors];
    for (int n = 0; n < vectors; ++n) most[n] = seen.largest[n];
    score(c, t, keys, k_stride, first, count, c.is_causal && first + count > whole, seen, most);
    weigh(t, count, most, seen, factor);
    gather(c, t, values, v_stride, count, factor);
  }
  finish<Element>(c, t, seen);
}

template <class Element>
void attention(const Call& c) {
  const Plan p = plan_of(c);
#pragma omp parallel num_threads(c.threads) if (p.units > 1 && c.batch * c.heads * c.queries * c.keys * (c.depth + c.width) > kAlone)
  {
    float* own = reinterpret_cast<float*>(c.scratch) + thread_index() * p.own;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < p.units; ++unit) {
      const Tile t(c, p, unit, own);
      switch (t.lanes / kLanes) {
        case 1: attend<Element, 1>(c, t); break;
        case 2: attend<Element, 2>(c, t); break;
#if defined(__AVX512F__) && defined(__AVX512BW__)
        case 4: attend<Element, 4>(c, t); break;
#endif
      }
    }
  }
}

}  // namespace

extern "C" {

// Bytes of scratch that a call needs, at an address that is a multiple of 64.
int64_t scratch_bytes(const Call* c) { return 4 * c->threads * plan_of(*c).own; }

void attention(const Call* c) {
  if (c->type == kFloat32) attention<float>(*c);
  else if (c->type == kBFloat16) attention<BFloat16>(*c);
  else attention<Float16>(*c);
}
}
