// Products of rows with weights that lie in panels, float32, or bfloat16 with sums in float32.
//
// A panel is kCols columns of the result: a word of each of them, then the next word of each, to the end of the depth. A block of kRows
// rows meets a panel in registers, from the first word to the last; the panel stays in the second cache while all rows of a thread
// meet it. Bias, activation and a further operand are applied before a block is stored. Results depend neither on the number of
// threads nor on what rows there are beside a row.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <blocks.h>
#include <floats.h>

#include "activations.h"

namespace {

// y [rows, width] = activation(x @ weight.T + bias), or x @ weight.T + bias with `other` added or multiplied in. Rows of x are `x_stride`
// bytes apart, all else is row-major; bias and other are 0 where there is none. All fields are 8 bytes, in the order of `_CALL` in
// linear.py.
struct Call {
  int64_t x, x_stride, panels, bias, other, y, is_bfloat16;
  int64_t rows, words, width;  // words: the depth, a word being a float32 or two bfloat16
  int64_t activation, binary, threads;
};

constexpr int64_t kSum = 128;            // words after which a sum is put aside: longer ones lose digits
constexpr int64_t kDeep = 2048;          // words of a panel that the second cache holds
constexpr int64_t kMostRows = 192;       // that meet a deep panel part by part: their results wait on the stack
constexpr int64_t kLeastRows = 48;       // that are worth a tile of their own
constexpr int64_t kAlone = 1 << 18;      // products up to which a second thread is not worth waking

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// result [rows, vectors] (+)= rows from `x` on by `words` of a panel, partial sums of kSum words added up.
template <class Kind, int rows, int vectors>
INLINE void block(const char* x, int64_t stride, const char* panel, int64_t words, bool is_first, Floats (&result)[rows][vectors]) {
  for (int64_t k = 0; k < words; k += kSum) {
    Floats sum[rows][vectors] = {};
    multiply<Kind, rows>(x + k * 4, stride, panel + k * vectors * sizeof(Floats), std::min(kSum, words - k), sum);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) result[i][v] = is_first && k == 0 ? sum[i][v] : result[i][v] + sum[i][v];
  }
}

// `count` numbers, the other lanes 0.
template <class Element>
INLINE Floats some_numbers(const Element* from, int64_t count) {
  if (count >= kLanes) return load_floats(from);
  Element held[kLanes] = {};
  std::memcpy(held, from, count * sizeof(Element));
  return load_floats(held);
}

// Stores `vectors` of row `row` from column n on, with what follows the product applied.
template <class Element>
void finish(const Call& c, int64_t row, int64_t n, int vectors, const Floats* result) {
  const Element* bias = reinterpret_cast<const Element*>(c.bias);
  const Element* other = reinterpret_cast<const Element*>(c.other);
  Element* y = reinterpret_cast<Element*>(c.y);
  for (int v = 0; v < vectors && n < c.width; ++v, n += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, c.width - n), at = row * c.width + n;
    Floats value = bias == nullptr ? result[v] : result[v] + some_numbers(bias + n, count);
    value = activated(c.activation, value);
    if (c.binary == kAdd) value = value + some_numbers(other + at, count);
    if (c.binary == kMultiply) value = value * some_numbers(other + at, count);
    if (count == kLanes) {
      store_numbers(y + at, value);
    } else {
      Element held[kLanes];
      store_numbers(held, value);
      std::memcpy(y + at, held, count * sizeof(Element));
    }
  }
}

// Rows [begin, end) by the panel of `vectors` vectors from column n on.
template <class Kind, class Element, int vectors>
void by_panel(const Call& c, int64_t begin, int64_t end, int64_t n) {
  const char* x = reinterpret_cast<const char*>(c.x);
  const char* panel = reinterpret_cast<const char*>(c.panels) + n * c.words * 4;
  const bool is_deep = c.words > kDeep;
  alignas(64) Floats waiting[kMostRows * vectors];
  for (int64_t k = 0; k < c.words; k += kDeep) {
    const int64_t words = std::min(kDeep, c.words - k);
    const bool is_last = k + kDeep >= c.words;
    in_blocks(end - begin, [&](int64_t at, auto count) {
      constexpr int rows = decltype(count)::value;
      const int64_t row = begin + at;
      Floats result[rows][vectors];
      Floats* held = waiting + (is_deep ? at : 0) * vectors;
      if (k != 0) std::memcpy(result, held, sizeof result);
      block<Kind, rows>(x + row * c.x_stride + k * 4, c.x_stride, panel + k * vectors * sizeof(Floats), words, k == 0, result);
      if (!is_last) std::memcpy(held, result, sizeof result);
      else
        for (int i = 0; i < rows; ++i) finish<Element>(c, row + i, n, vectors, result[i]);
    });
  }
}

template <class Kind, class Element>
void tile(const Call& c, int64_t begin, int64_t end, int64_t n) {
  if (c.width - n > kCols / 2) by_panel<Kind, Element, kVectors>(c, begin, end, n);
  else by_panel<Kind, Element, kVectors / 2>(c, begin, end, n);
}

}  // namespace

extern "C" {

// Whether bfloat16 is multiplied in pairs here; else there is no form for it.
int64_t takes_pairs() { return kHasBFloat16; }

// Columns of a panel, and the step to which the width of the last one is rounded up.
int64_t panel_width() { return kCols; }
int64_t panel_step() { return kCols / 2; }

void panel_linear(const Call* given) {
  const Call& c = *given;
  const int64_t panels = (c.width + kCols - 1) / kCols;
  const int64_t for_threads = (4 * c.threads + panels - 1) / panels, for_depth = c.words > kDeep ? (c.rows + kMostRows - 1) / kMostRows : 1;
  const int64_t wanted = std::max(std::min(for_threads, (c.rows + kLeastRows - 1) / kLeastRows), for_depth);
  const int64_t chunk = std::min(round_up((c.rows + wanted - 1) / wanted, kRows), c.words > kDeep ? kMostRows : c.rows);
  const int64_t chunks = (c.rows + chunk - 1) / chunk;
#pragma omp parallel for num_threads(c.threads) schedule(static) if (c.rows * c.words * c.width > kAlone)
  for (int64_t index = 0; index < panels * chunks; ++index) {  // a panel meets all its rows before the next one comes
    const int64_t n = index / chunks * kCols, begin = index % chunks * chunk, end = std::min(begin + chunk, c.rows);
    if (!c.is_bfloat16) tile<Singles, float>(c, begin, end, n);
    else if (kHasBFloat16) tile<Pairs, BFloat16>(c, begin, end, n);
  }
}
}
