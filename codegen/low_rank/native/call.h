// What one call computes, as Python hands it over, and where its scratch lies.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>

#include <vectors.h>

namespace {

enum Type : int64_t { kFloat32, kBFloat16, kE8M0, kE4M3 };
enum Codes : int64_t { kInt8, kInt4, kE2M1, kCodesE4M3 };

// y[rows, width] = activations @ weight.T + (x @ down.T) @ up.T + bias, every tensor row-major. Addresses are 0 where there is no
// such tensor. All fields are 8 bytes, in the order of `_CALL` in linear.py.
struct Call {
  int64_t x, x_type, x_stride;                  // [rows, depth]: what the branch reads; elements between rows
  int64_t smooth, smooth_type;                  // [depth]
  int64_t prepared;                             // float32 [rows, depth]: shifted, smoothed and rotated already
  int64_t rows, depth, width, y;                // y as x is typed
  int64_t codes, code_type;                     // [width, depth], of 4 bits two a byte
  int64_t scale, scale_type, group;             // [width, depth / group]
  int64_t scale2, scale2_count;                 // float32: 0, 1 or `width` factors of the scales
  int64_t down, down_type, up, up_type, rank;   // [rank, depth], [width, rank]
  int64_t bias, bias_type;                      // [width]
  int64_t qmax, is_unsigned, act_group, act_scale_type;  // of the activations' codes; qmax 0: they stay floats
  int64_t threads, scratch;
  double shift;
};

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline float element(int64_t base, int64_t type, int64_t index) {
  if (type == kFloat32) return reinterpret_cast<const float*>(base)[index];
  if (type == kBFloat16) return number(reinterpret_cast<const uint16_t*>(base)[index]);
  const uint32_t code = reinterpret_cast<const uint8_t*>(base)[index];
  if (type == kE8M0) return of_bits(code == 0 ? 1u << 22 : code << 23);
  // An e4m3 shifted to where float32 has its mantissa is 2^120 too small, subnormals too.
  return (code & 128 ? -1.0f : 1.0f) * of_bits((code & 127) << 20) * 0x1p120f;
}

// How a call is gone about, and the parts of its scratch by their offsets in bytes.
struct Plan {
  bool is_integer;         // codes by codes, summed in int32; floats by decoded weights else
  bool is_bfloat16;        // of the latter, both as bfloat16
  bool is_direct;          // x is what is multiplied as it lies
  bool by_dots;            // few rows: each dot along the depth, the weight read where it lies
  int64_t padded;          // depth in elements, as activations lie in scratch
  int64_t segment;         // depth over which one scale holds on either side
  int64_t segments;
  int64_t block;           // depth of a panel of weights
  int64_t chunk, chunks;   // rows to which one panel is applied
  int64_t panels;
  int64_t activations, act_scale, code_sum, branch, threads;
  int64_t bytes_per_thread;
};

constexpr int64_t kPad = 128;        // elements: what one vector of 4-bit codes holds
constexpr int64_t kBlock = 256;      // depth of a float panel: [256, 64] float32 is 64 KiB
constexpr int64_t kFewRows = 16, kFewRowsOfPairs = 12, kFewRowsOfSingles = 8;  // up to which a panel is not worth its making
constexpr int kTableRows = 2;        // more rows of float32 fall out of the first cache
constexpr int64_t kMinChunk = 96, kFloatChunk = 256, kIntegerChunk = 2048;  // rows

inline bool is_packed(const Call& c) { return c.code_type == kInt4 || c.code_type == kE2M1; }

inline Plan plan_of(const Call& c) {
  Plan p{};
  p.is_integer = c.qmax != 0;
  p.is_bfloat16 = kHasBFloat16 && !p.is_integer && c.x_type == kBFloat16 && c.prepared == 0;
  const int64_t few = p.is_integer ? kFewRows : p.is_bfloat16 ? kFewRowsOfPairs : kFewRowsOfSingles;
  p.by_dots = c.rows <= few && (p.is_integer ? c.code_type == kInt8 && c.group == c.depth && c.act_group == c.depth
                                                  : kHasTables && is_packed(c));
  const bool is_plain = c.smooth == 0 && c.shift == 0 && c.prepared == 0;
  const bool is_whole = c.x_type == kFloat32 || (p.is_bfloat16 && c.depth % 2 == 0);
  p.is_direct = !p.is_integer && !p.by_dots && is_plain && is_whole;
  p.padded = round_up(c.depth, kPad);
  p.segment = p.is_integer ? std::gcd(c.group, c.act_group) : c.depth;
  p.segments = c.depth / p.segment;
  p.block = p.is_integer ? p.padded : kBlock;
  p.panels = (c.width + kCols - 1) / kCols;
  const int64_t most = p.is_integer ? kIntegerChunk : kFloatChunk;
  const int64_t wanted = std::max((4 * c.threads + p.panels - 1) / p.panels, (c.rows + most - 1) / most);
  p.chunk = round_up((c.rows + wanted - 1) / wanted, kRows);
  p.chunk = std::max(p.chunk, std::min(kMinChunk, round_up(c.rows, kRows)));
  p.chunks = (c.rows + p.chunk - 1) / p.chunk;
  int64_t end = 0;
  const auto take = [&end](int64_t bytes) { return std::exchange(end, end + round_up(bytes, 64)); };
  const int64_t element_size = p.is_integer ? 1 : p.is_bfloat16 ? 2 : 4;
  p.activations = take(p.is_direct ? 0 : c.rows * p.padded * element_size);
  p.act_scale = take(p.is_integer ? c.rows * p.segments * 4 : 0);
  p.code_sum = take(p.is_integer ? c.rows * p.segments * 4 : 0);
  p.branch = take(c.rows * c.rank * 4);
  p.threads = end;
  const int64_t row_buffers = 2 * p.padded * 4;
  const int64_t panel = p.by_dots ? 0 : p.block * kCols;
  const int64_t values = p.is_integer || p.by_dots ? 0 : p.block * kCols * 4;
  const int64_t scales = p.by_dots ? 0 : c.depth / std::min(p.segment, c.group) * kCols * 4;
  const int64_t tile = p.is_integer || p.by_dots ? 0 : p.chunk * kCols * 4;
  p.bytes_per_thread = round_up(std::max(row_buffers, panel + values + scales + tile + (c.rank + 1) * kCols * 4), 64);
  return p;
}

}  // namespace
