// The gated recurrence, rotations, and what of both stays in the caches.
#pragma once
#include "call.h"

namespace {

// Where a stream has its part of the scratch.
struct Stream {
  float *near_k, *near_v, *final_k, *final_v, *last_k, *last_v;  // [tokens, depth], [finals, depth], [depth]
  Stream(const Call& c, const Plan& p, int64_t b, int64_t head) {
    const int64_t index = (b * c.kv_heads + head) % p.wave;
    float* scratch = reinterpret_cast<float*>(c.scratch) + c.threads * p.own();
    near_k = scratch + 2 * index * p.tokens * p.depth;
    near_v = near_k + p.tokens * p.depth;
    final_k = scratch + p.near_floats() + 2 * index * p.finals * p.depth;
    final_v = final_k + p.finals * p.depth;
    last_k = scratch + p.near_floats() + p.final_floats() + 2 * index * p.depth;
    last_v = last_k + p.depth;
  }
};

inline float* partials_of(const Call& c, const Plan& p) {
  return reinterpret_cast<float*>(c.scratch) + c.threads * p.own() + p.near_floats() + p.final_floats() + p.last_floats();
}

// to [padded] = x [padded], turned by the rotation of token i.
inline void rotate(const Call& c, int64_t b, int64_t i, const float* x, int64_t padded, float* to) {
  std::copy_n(x, padded, to);
  if (c.cos.data == 0) return;
  const float *cos = c.cos.at<const float>(b, 0, i), *sin = c.sin.at<const float>(b, 0, i);
  const int64_t half = c.turned / 2;
  if (c.is_interleaved) {
    for (int64_t e = 0; e < c.turned; e += 2) {
      to[e] = x[e] * cos[e] - x[e + 1] * sin[e];
      to[e + 1] = x[e + 1] * cos[e + 1] + x[e] * sin[e + 1];
    }
    return;
  }
  for (int64_t e = 0; e < half; ++e) to[e] = x[e] * cos[e] - x[e + half] * sin[e];
  for (int64_t e = half; e < c.turned; ++e) to[e] = x[e] * cos[e] + x[e - half] * sin[e];
}

struct Gates {
  Floats open, shut;  // sigmoid(x) and 1 - sigmoid(x), each with its own digits
};

INLINE Gates gates_of(Floats x) {
  const Floats power = exponential(x < 0.0f ? x : -x), large = 1.0f / (1.0f + power), small = power * large;
  return {x < 0.0f ? small : large, x < 0.0f ? large : small};
}

// Numbers of one token, [padded].
template <class Element>
inline void widen_channels(const Operand& from, const Element* x, int64_t count, float* to, int64_t padded) {
  if (from.channel != 0) return widen(x, count, to, padded);
  std::fill_n(to, padded, number(*x));
}

// The states of tokens [first, end) of a stream, and where they and what they were made of go. `own` has room for 6 rows.
template <class Element>
void scan(const Call& c, const Plan& p, const Row& r, int64_t head, int64_t first, int64_t end, float* own) {
  const Stream stream(c, p, r.b, head);
  float *key = own, *value = own + p.depth, *k = own + 2 * p.depth, *v = own + 3 * p.depth, *gate = own + 4 * p.depth,
        *bias = own + 5 * p.depth;
  std::fill_n(key, 6 * p.depth, 0.0f);
  if (first == r.start && first > 0 && c.key_state.data != 0 && !(c.resets && first % c.chunk == 0)) {
    std::copy_n(c.key_state.at<const float>(r.place, head, 0), c.depth, key);
    std::copy_n(c.value_state.at<const float>(r.place, head, 0), c.depth, value);
  }
  for (int64_t t = first; t < end; ++t) {
    const int64_t i = t - r.start;
    widen(c.k.at<const Element>(r.b, head, i), c.depth, k, p.depth);
    widen(c.v.at<const Element>(r.b, head, i), c.depth, v, p.depth);
    widen_channels(c.gate, c.gate.at<const Element>(r.b, head, i), c.depth, gate, p.depth);
    if (c.bias.data != 0) widen_channels(c.bias, c.bias.at<const float>(0, head, t % c.chunk), c.depth, bias, p.depth);
    const bool goes_on = t > 0 && !(c.resets && t % c.chunk == 0);
    for (int64_t e = 0; e < p.depth; e += kLanes) {
      const Gates g = gates_of(load_floats(gate + e) + load_floats(bias + e));
      const Floats open = goes_on ? g.open : all(0.0f);
      store(key + e, fused(open, load_floats(key + e), g.shut * load_floats(k + e)));
      store(value + e, fused(open, load_floats(value + e), g.shut * load_floats(v + e)));
    }
    rotate(c, r.b, i, c.is_raw ? k : key, p.depth, stream.near_k + i * p.depth);
    std::copy_n(c.is_raw ? v : value, p.depth, stream.near_v + i * p.depth);
    if (c.is_raw && (t + 1) % c.chunk == 0) {
      const int64_t chunk = t / c.chunk - r.start / c.chunk;
      rotate(c, r.b, i, key, p.depth, stream.final_k + chunk * p.depth);
      std::copy_n(value, p.depth, stream.final_v + chunk * p.depth);
    }
    if (i == r.count - 1) {
      std::copy_n(key, p.depth, stream.last_k);
      std::copy_n(value, p.depth, stream.last_v);
    }
  }
}

// Segment `index` of a stream.
template <class Element>
void scan_segment(const Call& c, const Plan& p, const Row& r, int64_t head, int64_t index, float* own) {
  if (!c.resets) return scan<Element>(c, p, r, head, r.start, r.start + c.tokens, own);
  const int64_t begin = (r.start / p.segment + index) * p.segment;
  scan<Element>(c, p, r, head, std::max(begin, r.start), std::min(begin + p.segment, r.start + c.tokens), own);
}

template <class Element>
void put(const Call& c, const Row& r, int64_t head, int64_t slot, const float* k, const float* v) {
  narrow(k, c.depth, c.key_slots.at<Element>(r.place, head, slot));
  narrow(v, c.depth, c.value_slots.at<Element>(r.place, head, slot));
}

// Writes what the caches keep of a stream's real tokens: nobody reads what was there any more.
template <class Element>
void keep(const Call& c, const Plan& p, const Row& r, int64_t head) {
  const Stream stream(c, p, r.b, head);
  const int64_t end = r.start + r.count, at_ring = c.sinks + summaries(c);
  for (int64_t t = r.start; t < end; ++t) {
    const int64_t i = t - r.start, chunk = t / c.chunk;
    const float *k = stream.near_k + i * p.depth, *v = stream.near_v + i * p.depth;
    if (t < c.sinks) put<Element>(c, r, head, t, k, v);
    if (t >= end - ring(c)) put<Element>(c, r, head, at_ring + t % ring(c), k, v);
    if ((t + 1) % c.chunk != 0 || chunk >= summaries(c)) continue;
    const int64_t final = (chunk - r.start / c.chunk) * p.depth;
    put<Element>(c, r, head, c.sinks + chunk, c.is_raw ? stream.final_k + final : k, c.is_raw ? stream.final_v + final : v);
  }
  if (r.count == 0 && r.start > 0) return;
  float *key = c.key_state.at<float>(r.place, head, 0), *value = c.value_state.at<float>(r.place, head, 0);
  if (r.count == 0) {  // a row that has seen nothing
    std::fill_n(key, c.depth, 0.0f);
    std::fill_n(value, c.depth, 0.0f);
    return;
  }
  std::copy_n(stream.last_k, c.depth, key);
  std::copy_n(stream.last_v, c.depth, value);
}

}  // namespace
