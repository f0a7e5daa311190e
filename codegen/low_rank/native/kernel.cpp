// gw.lowrank_linear on a CPU, from its operands as they lie: no weight is held in another layout between calls.
//
// 1. Rows: x in float32 once, through `down`, and shifted, smoothed and quantized (activations.h).
// 2. Products: the weight of kCols columns at a time is laid out in the cache (panels.h) and meets all rows there, in registers; few
//    rows meet it where it lies (products.h). Each block of results takes its share of the branch and the bias before it is stored.
//
// Sums of codes are exact. The result of a row depends neither on the rows beside it nor on the number of threads; where activations
// are floats it does depend on whether there are more than kFewRows.
#include <type_traits>

#include "activations.h"
#include "call.h"
#include "panels.h"
#include "products.h"
#include "threads.h"

namespace {

// y = value + branch @ up + bias for `rows` rows from `row` on, columns n .. n + kCols.
template <int rows>
void finish(const Call& c, const Plan& p, int64_t row, int64_t n, const float* value, const float* up) {
  const float* branch = reinterpret_cast<const float*>(c.scratch + p.branch) + row * c.rank;
  const int64_t columns = std::min<int64_t>(kCols, c.width - n);
  Floats sum[rows][kVectors];
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < kVectors; ++v) sum[i][v] = load_floats(value + i * kCols + v * kLanes);
  multiply<Singles, rows>(reinterpret_cast<const char*>(branch), c.rank * 4, reinterpret_cast<const char*>(up), c.rank, sum);
  for (int v = 0; v < kVectors && v * kLanes < columns; ++v) {
    const int64_t here = std::min<int64_t>(kLanes, columns - v * kLanes);
    for (int i = 0; i < rows; ++i) {
      const Floats result = sum[i][v] + load_floats(up + c.rank * kCols + v * kLanes);
      const int64_t at = (row + i) * c.width + n + v * kLanes;
      if (c.x_type == kFloat32) {
        std::memcpy(reinterpret_cast<float*>(c.y) + at, &result, here == kLanes ? 4 * kLanes : here * 4);
      } else {
        const Words bits = Words(result);
        const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 64;
        const Words chosen = (bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
        const Halves halves = __builtin_convertvector(chosen, Halves);
        std::memcpy(reinterpret_cast<uint16_t*>(c.y) + at, &halves, here == kLanes ? 2 * kLanes : here * 2);
      }
    }
  }
}

// Columns n .. of rows [begin, end) by panels of weights; `own` is the thread's scratch.
void by_panels(const Call& c, const Plan& p, int64_t begin, int64_t end, int64_t n, char* own) {
  char* scratch = reinterpret_cast<char*>(c.scratch);
  const int64_t word = p.is_integer ? 4 : p.is_bfloat16 ? 2 : 1;  // elements of an activation in a word
  const char* a = p.is_direct ? reinterpret_cast<const char*>(c.x) : scratch + p.activations;
  const int64_t stride = (p.is_direct ? c.x_stride : p.padded) * 4 / word;
  uint8_t* codes = reinterpret_cast<uint8_t*>(own);
  float* scale = reinterpret_cast<float*>(own + p.block * kCols);
  float* up = scale + c.depth / c.group * kCols;
  float* tile = up + (c.rank + 1) * kCols;
  float* values = tile + (p.is_integer ? 0 : p.chunk * kCols);
  alignas(64) float block_tile[kRows * kCols];
  scale_panel(c, n, scale);
  up_panel(c, n, up);
  for (int64_t k = 0; k < c.depth; k += p.block) {
    const int64_t depth = std::min(p.block, round_up(c.depth - k, kSpan));
    const int64_t steps = (std::min(p.block, c.depth - k) + word - 1) / word;
    const bool is_last = k + p.block >= c.depth;
    code_panel(c, n, k, depth, !p.is_integer ? 0 : c.code_type == kInt8 ? 0x80 : 0x08, codes);
    if (!p.is_integer) value_panel(c, codes, scale, k, round_up(std::min(p.block, c.depth - k), 4), p.is_bfloat16, values);
    const char* panel = p.is_integer ? reinterpret_cast<char*>(codes) : reinterpret_cast<char*>(values);
    for (int64_t row = begin; row < end; row += kRows) {
      with_rows(std::min<int64_t>(kRows, end - row), [&](auto count) {
        constexpr int rows = decltype(count)::value;
        const char* from = a + row * stride + k * 4 / word;
        float* out = p.is_integer ? block_tile : tile + (row - begin) * kCols;
        if (p.is_integer) {
          const float* act_scale = reinterpret_cast<float*>(scratch + p.act_scale) + row * p.segments;
          const int32_t* code_sum = reinterpret_cast<int32_t*>(scratch + p.code_sum) + row * p.segments;
          integer_block<rows>(p, from, act_scale, code_sum, panel, scale, c.group, c.code_type == kInt8 ? 128 : 8, out);
        } else if (p.is_bfloat16) {
          float_block<Pairs, rows>(from, stride, panel, steps, k == 0, out);
        } else {
          float_block<Singles, rows>(from, stride, panel, steps, k == 0, out);
        }
        if (is_last) finish<rows>(c, p, row, n, out, up);
      });
    }
  }
}

// Columns n .. of all rows, few, each dot by itself.
void by_dots(const Call& c, const Plan& p, int64_t n, char* own) {
  char* scratch = reinterpret_cast<char*>(c.scratch);
  float* up = reinterpret_cast<float*>(own);
  alignas(64) float tile[kFewRows * kCols];
  const int64_t columns = std::min<int64_t>(kCols, c.width - n);
  up_panel(c, n, up);
  std::memset(tile, 0, sizeof tile);
  if (p.is_integer) {
    const int8_t* a = reinterpret_cast<int8_t*>(scratch + p.activations);
    const float* act_scale = reinterpret_cast<float*>(scratch + p.act_scale);
    const int32_t* code_sum = reinterpret_cast<int32_t*>(scratch + p.code_sum);
    const auto block = [&](int64_t row, int64_t column, auto rows, auto width) {
      int32_t sums[decltype(rows)::value * decltype(width)::value];
      const uint8_t* w = reinterpret_cast<const uint8_t*>(c.codes) + (n + column) * c.depth;
      dots_of_bytes<decltype(rows)::value, decltype(width)::value>(a + row * p.padded, p.padded, w, c.depth, code_sum + row, sums);
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < width; ++j)
          tile[(row + i) * kCols + column + j] =
              float(sums[i * width + j]) * act_scale[row + i] * element(c.scale, c.scale_type, n + column + j);
    };
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 4> four;
    for (int64_t column = 0; column < columns; column += columns - column >= 4 ? 4 : 1) {
      for (int64_t row = 0; row < c.rows; row += c.rows - row >= 4 ? 4 : 1) {
        const bool wide = columns - column >= 4, tall = c.rows - row >= 4;
        if (wide) tall ? block(row, column, four, four) : block(row, column, one, four);
        else tall ? block(row, column, four, one) : block(row, column, one, one);
      }
    }
  } else {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const Tables tables = tables_of(c.code_type == kInt4 ? kInt4Values : kE2M1Values);
    const int64_t stride = p.padded * (p.is_bfloat16 ? 2 : 4);
    const auto block = [&](int64_t row, auto as_pairs, auto rows) {
      for (int64_t column = 0; column < columns; ++column)
        dots_of_tables<as_pairs, rows>(c, scratch + p.activations + row * stride, stride, n + column, tables, tile + row * kCols + column);
    };
    const std::true_type pairs;
    const std::false_type singles;
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, kTableRows> more;
    for (int64_t row = 0; row < c.rows; row += c.rows - row >= kTableRows ? kTableRows : 1) {
      const bool is_full = c.rows - row >= kTableRows;
      if (p.is_bfloat16) is_full ? block(row, pairs, more) : block(row, pairs, one);
      else is_full ? block(row, singles, more) : block(row, singles, one);
    }
#endif
  }
  for (int64_t row = 0; row < c.rows; ++row) finish<1>(c, p, row, n, tile + row * kCols, up);
}

// The tile that is the `index`th of all calls: its call, and its place in it.
inline const Call& of_tile(const Call* calls, int64_t& index) {
  for (;; ++calls) {
    const Plan p = plan_of(*calls);
    if (index < p.panels * p.chunks) return *calls;
    index -= p.panels * p.chunks;
  }
}

}  // namespace

extern "C" {

// Bytes of scratch that calls need together, at an address that is a multiple of 64.
int64_t scratch_bytes(const Call* calls, int64_t count) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Plan p = plan_of(calls[i]);
    bytes = std::max(bytes, p.threads + p.bytes_per_thread * calls[i].threads);
  }
  return bytes;
}

// Calls that differ in what has columns alone (weight, up, bias, y): rows are made ready once, for the first.
void lowrank_linear(const Call* calls, int64_t count) {
  const Plan first = plan_of(*calls);
  int64_t tiles = 0, bytes_per_thread = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Plan p = plan_of(calls[i]);
    tiles += p.panels * p.chunks;
    bytes_per_thread = std::max(bytes_per_thread, p.bytes_per_thread);
  }
#pragma omp parallel num_threads(calls->threads)
  {
    char* own = reinterpret_cast<char*>(calls->scratch) + first.threads + thread_index() * bytes_per_thread;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < calls->rows; row += kBranchRows)
      if (!first.is_direct || calls->rank > 0)
        prepare(*calls, first, row, std::min(row + kBranchRows, calls->rows), reinterpret_cast<float*>(own));
    // Neighbouring tiles stay with one thread: two that write side by side take lines of y from each other, 20% of the time for float32.
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      int64_t index = tile;
      const Call& c = of_tile(calls, index);
      const Plan p = plan_of(c);
      const int64_t n = index % p.panels * kCols, begin = index / p.panels * p.chunk;
      p.by_dots ? by_dots(c, p, n, own) : by_panels(c, p, begin, std::min(begin + p.chunk, c.rows), n, own);
    }
  }
}
}
