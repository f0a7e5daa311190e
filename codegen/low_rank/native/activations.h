// The rows of x made ready for the products: float32, shifted and smoothed, as codes with their scales, and through `down`.
#pragma once
#include "call.h"

namespace {

constexpr float kRoundingShift = 0x1.8p23f;  // a float32 of this size has no fraction: adding it rounds half to even

inline void widen(const Call& c, int64_t row, float* f) {
  const int64_t begin = row * c.x_stride;
  if (c.x_type == kFloat32) {
    std::memcpy(f, reinterpret_cast<const float*>(c.x) + begin, c.depth * 4);
    return;
  }
  const uint16_t* x = reinterpret_cast<const uint16_t*>(c.x) + begin;
  for (int64_t k = 0; k < c.depth; ++k) f[k] = number(x[k]);
}

// (f + shift) * smooth, or what was prepared.
inline void smooth(const Call& c, int64_t row, const float* f, float* v) {
  if (c.prepared != 0) {
    std::memcpy(v, reinterpret_cast<const float*>(c.prepared) + row * c.depth, c.depth * 4);
    return;
  }
  const float shift = float(c.shift);
  if (c.smooth == 0) {
    for (int64_t k = 0; k < c.depth; ++k) v[k] = f[k] + shift;
  } else if (c.smooth_type == kFloat32) {
    const float* a = reinterpret_cast<const float*>(c.smooth);
    for (int64_t k = 0; k < c.depth; ++k) v[k] = (f[k] + shift) * a[k];
  } else {
    const uint16_t* a = reinterpret_cast<const uint16_t*>(c.smooth);
    for (int64_t k = 0; k < c.depth; ++k) v[k] = (f[k] + shift) * number(a[k]);
  }
}

// The largest |v|, or v >= 0, as its bits: as integers they are ordered as the numbers are, and a NaN is above all of them.
inline float largest(const float* v, int64_t count, bool is_unsigned) {
  int32_t most = 0;
  if (is_unsigned) {
    for (int64_t k = 0; k < count; ++k) most = std::max(most, int32_t(bits_of(v[k] < 0 ? 0.0f : v[k]) & 0x7fffffff));
  } else {
    for (int64_t k = 0; k < count; ++k) most = std::max(most, int32_t(bits_of(v[k]) & 0x7fffffff));
  }
  return of_bits(uint32_t(most));
}

// amax / qmax as it is stored; 1 for a block of zeros, never 0. Of rows with infinities nothing is promised but that they stay apart.
inline float stored_scale(const Call& c, float amax) {
  if (amax == 0) return 1.0f;
  float s = amax / float(c.qmax);
  if (c.act_scale_type == kBFloat16) s = number(to_bfloat16(s));
  const float smallest = c.act_scale_type == kBFloat16 ? 0x1p-133f : 0x1p-149f;
  if (s < smallest) return smallest;
  return s <= 0x1.fffffep127f ? s : of_bits(0x7fc00000);
}

inline void encode(const float* __restrict v, int64_t count, float s, float bottom, float top, int8_t* __restrict codes) {
  for (int64_t k = 0; k < count; ++k) {
    float y = v[k] / s;
    y = y > bottom ? y : bottom;
    y = y < top ? y : top;
    codes[k] = int8_t(bits_of(y + kRoundingShift) & 255);
  }
}

inline int32_t total(const int8_t* codes, int64_t count) {
  int32_t sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += codes[k];
  return sum;
}

// Codes of a row [padded], and for each segment its scale and the sum of its codes.
inline void quantize(const Call& c, const Plan& p, const float* v, int8_t* codes, float* scale, int32_t* sum) {
  const float top = float(c.qmax), bottom = c.is_unsigned ? 0.0f : -top;
  for (int64_t begin = 0; begin < c.depth; begin += c.act_group) {
    const float s = stored_scale(c, largest(v + begin, c.act_group, c.is_unsigned));
    encode(v + begin, c.act_group, s, bottom, top, codes + begin);
    for (int64_t k = begin; k < begin + c.act_group; k += p.segment) {
      scale[k / p.segment] = s;
      sum[k / p.segment] = total(codes + k, p.segment);
    }
  }
  std::memset(codes + c.depth, 0, p.padded - c.depth);
}

// A row [padded] for `dots_of_tables`. A vector of 4-bit codes holds 128, word l of it those of 8 l .. 8 l + 7; what one nibble of all
// words meets lies side by side: float32 [8 nibbles, 16 words], or bfloat16 [4, 16, 2], where nibbles 4 apart meet pairs.
inline void interleave(const Call& c, const Plan& p, const float* v, char* out) {
  std::memset(out, 0, p.padded * (p.is_bfloat16 ? 2 : 4));
  for (int64_t k = 0; k < c.depth; ++k) {
    const int64_t block = k / 128 * 128, word = k % 128 / 8, nibble = k % 8;
    if (p.is_bfloat16) {
      reinterpret_cast<uint16_t*>(out)[block + nibble % 4 * 32 + word * 2 + nibble / 4] = to_bfloat16(v[k]);
    } else {
      reinterpret_cast<float*>(out)[block + nibble * 16 + word] = v[k];
    }
  }
}

// out [rows, columns] = x @ down.T, lanes along the depth. Both as bfloat16 are multiplied in pairs.
template <int rows, int columns, class X, class Down>
INLINE void down_block(const X* x, int64_t stride, const Down* down, int64_t depth, float* out, int64_t rank) {
  constexpr bool as_pairs = kHasBFloat16 && sizeof(X) == 2 && sizeof(Down) == 2;
  constexpr int64_t step = as_pairs ? 2 * kLanes : kLanes;
  Floats sum[rows][columns] = {};
  int64_t k = 0;
  for (; k + step <= depth; k += step) {
    if constexpr (as_pairs) {
      Ints d[columns];
      for (int j = 0; j < columns; ++j) d[j] = load<Ints>(down + j * depth + k);
      for (int i = 0; i < rows; ++i) {
        const Ints value = load<Ints>(x + i * stride + k);
        for (int j = 0; j < columns; ++j) sum[i][j] = dot_bfloat16(sum[i][j], value, d[j]);
      }
    } else {
      Floats d[columns];
      for (int j = 0; j < columns; ++j) d[j] = load_floats(down + j * depth + k);
      for (int i = 0; i < rows; ++i) {
        const Floats value = load_floats(x + i * stride + k);
        for (int j = 0; j < columns; ++j) sum[i][j] = fused(value, d[j], sum[i][j]);
      }
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      float result = lane_sum(sum[i][j]);
      for (int64_t rest = k; rest < depth; ++rest) result += number(x[i * stride + rest]) * number(down[j * depth + rest]);
      out[i * rank + j] = result;
    }
  }
}

template <int rows, class X, class Down>
inline void down_rows(const Call& c, const X* x, const Down* down, float* out) {
  int64_t j = 0;
  for (; j + 4 <= c.rank; j += 4) down_block<rows, 4>(x, c.x_stride, down + j * c.depth, c.depth, out + j, c.rank);
  for (; j < c.rank; ++j) down_block<rows, 1>(x, c.x_stride, down + j * c.depth, c.depth, out + j, c.rank);
}

// branch[begin .. end, rank] = x @ down.T. The sum of an element is the same whatever rows there are beside its own.
template <class X, class Down>
inline void through_down(const Call& c, int64_t begin, int64_t end, float* branch) {
  const X* x = reinterpret_cast<const X*>(c.x);
  const Down* down = reinterpret_cast<const Down*>(c.down);
  for (int64_t row = begin; row < end; row += end - row >= kBranchRows ? kBranchRows : 1) {
    const X* from = x + row * c.x_stride;
    float* to = branch + row * c.rank;
    end - row >= kBranchRows ? down_rows<kBranchRows>(c, from, down, to) : down_rows<1>(c, from, down, to);
  }
}

// Rows [begin, end), with a `buffer` of 2 * padded floats.
inline void prepare(const Call& c, const Plan& p, int64_t begin, int64_t end, float* buffer) {
  char* scratch = reinterpret_cast<char*>(c.scratch);
  float* v = buffer + p.padded;
  for (int64_t row = begin; row < end && !p.is_direct; ++row) {
    if (c.prepared == 0) widen(c, row, buffer);
    smooth(c, row, buffer, v);
    if (p.is_integer) {
      int8_t* codes = reinterpret_cast<int8_t*>(scratch + p.activations) + row * p.padded;
      float* scale = reinterpret_cast<float*>(scratch + p.act_scale) + row * p.segments;
      quantize(c, p, v, codes, scale, reinterpret_cast<int32_t*>(scratch + p.code_sum) + row * p.segments);
    } else if (p.by_dots) {
      interleave(c, p, v, scratch + p.activations + row * p.padded * (p.is_bfloat16 ? 2 : 4));
    } else if (p.is_bfloat16) {
      uint16_t* out = reinterpret_cast<uint16_t*>(scratch + p.activations) + row * p.padded;
      for (int64_t k = 0; k < c.depth; ++k) out[k] = to_bfloat16(v[k]);
      std::memset(out + c.depth, 0, (p.padded - c.depth) * 2);
    } else {
      std::memcpy(reinterpret_cast<float*>(scratch + p.activations) + row * p.padded, v, c.depth * 4);
    }
  }
  if (c.rank == 0) return;
  float* branch = reinterpret_cast<float*>(scratch + p.branch);
  const bool is_wide = c.down_type == kFloat32;
  if (c.x_type == kFloat32) {
    is_wide ? through_down<float, float>(c, begin, end, branch) : through_down<float, uint16_t>(c, begin, end, branch);
  } else {
    is_wide ? through_down<uint16_t, float>(c, begin, end, branch) : through_down<uint16_t, uint16_t>(c, begin, end, branch);
  }
}

}  // namespace
