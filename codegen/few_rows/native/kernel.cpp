// Products of a few rows with weights [width, depth] that are read once, where they lie and in their own type.
//
// Such a product takes as long as its weights take to arrive, so each thread reads one stretch of memory from end to end: a row of the
// weight, or up to four neighbours, meets the rows of x in registers, while the next ones are asked for. Sums are float32, lanes along the depth
// and in its order, so that a row's result depends neither on the rows beside it nor on the number of threads.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <floats.h>

namespace {

enum Type : int64_t { kFloat32, kBFloat16, kFloat16 };

// y [rows, width] = x [rows, depth] @ weight.T + bias. `type` is that of weight, bias and y; x is float32, or bfloat16 where
// `takes_pairs`. All fields are 8 bytes, in the order of `_CALL` in linear.py; strides in elements, bias 0 where there is none.
struct Call {
  int64_t x, weight, bias, y, type;
  int64_t x_stride, weight_stride;
  int64_t rows, depth, width, threads;
};

constexpr int kMostRows = 4;                         // of x that meet rows of a weight in registers
constexpr int kMostColumns = kLanes == 16 ? 4 : 2;   // rows of a weight, for a few of x; for one of x a single stretch is faster
constexpr int64_t kUnit = 8;                         // rows of a weight that a thread takes at a time
constexpr int64_t kAlone = 1 << 16;                  // bytes of weights up to which a second thread is not worth waking

// Numbers are widened as they are read.
template <class Element>
struct Singles {
  typedef Element Weight;
  typedef float Input;
  static constexpr int64_t kStep = kLanes;
  static INLINE Floats load_weights(const Weight* from) { return load_floats(from); }
  static INLINE Floats dot(Floats sum, Floats weights, const Input* x) { return fused(weights, load_floats(x), sum); }
};

// Two products a lane.
struct Pairs {
  typedef BFloat16 Weight;
  typedef BFloat16 Input;
  static constexpr int64_t kStep = 2 * kLanes;
  static INLINE Ints load_weights(const Weight* from) { return load<Ints>(from); }
  static INLINE Floats dot(Floats sum, Ints weights, const Input* x) { return dot_bfloat16(sum, weights, load<Ints>(x)); }
};

inline void round_to(float* to, float value) { *to = value; }
inline void round_to(BFloat16* to, float value) { to->bits = to_bfloat16(value); }
inline void round_to(Float16* to, float value) { to->bits = to_float16(value); }

// y of `rows` rows from `row` on and `columns` rows of the weight from n on.
template <class Kind, int rows, int columns>
void block(const Call& c, int64_t row, int64_t n) {
  typedef typename Kind::Weight Weight;
  typedef typename Kind::Input Input;
  const Weight* w = reinterpret_cast<const Weight*>(c.weight) + n * c.weight_stride;
  const Input* x = reinterpret_cast<const Input*>(c.x) + row * c.x_stride;
  const char* next = reinterpret_cast<const char*>(w + columns * c.weight_stride);
  Floats sum[columns][rows] = {};
  int64_t k = 0;
  for (; k + Kind::kStep <= c.depth; k += Kind::kStep) {
    decltype(Kind::load_weights(w)) weights[columns];
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) {
      weights[j] = Kind::load_weights(w + j * c.weight_stride + k);
      __builtin_prefetch(next, 0, 2);  // to the second cache: in the first it would take the place of x
      next += Kind::kStep * sizeof(Weight);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) sum[j][i] = Kind::dot(sum[j][i], weights[j], x + i * c.x_stride + k);
  }
  if (k < c.depth) {
    for (int j = 0; j < columns; ++j) {
      Weight last[Kind::kStep] = {};
      std::memcpy(last, w + j * c.weight_stride + k, (c.depth - k) * sizeof(Weight));
      for (int i = 0; i < rows; ++i) {
        Input rest[Kind::kStep] = {};
        std::memcpy(rest, x + i * c.x_stride + k, (c.depth - k) * sizeof(Input));
        sum[j][i] = Kind::dot(sum[j][i], Kind::load_weights(last), rest);
      }
    }
  }
  const Weight* bias = reinterpret_cast<const Weight*>(c.bias);
  for (int j = 0; j < columns; ++j)
    for (int i = 0; i < rows; ++i)
      round_to(reinterpret_cast<Weight*>(c.y) + (row + i) * c.width + n + j,
               lane_sum(sum[j][i]) + (bias == nullptr ? 0.0f : number(bias[n + j])));
}

// Calls body with a constant of 1 .. kMostRows.
template <class Body>
INLINE void with_rows(int64_t rows, Body body) {
  switch (rows) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
  }
}

template <class Kind, int columns>
void rows_by(const Call& c, int64_t n) {
  for (int64_t row = 0; row < c.rows; row += kMostRows)
    with_rows(std::min<int64_t>(kMostRows, c.rows - row), [&](auto rows) { block<Kind, rows, columns>(c, row, n); });
}

template <class Kind>
void unit(const Call& c, int64_t n) {
  const int64_t end = std::min(n + kUnit, c.width), at_once = std::min<int64_t>(c.rows, kMostColumns);
  for (; at_once > 2 && n + kMostColumns <= end; n += kMostColumns) rows_by<Kind, kMostColumns>(c, n);
  for (; at_once > 1 && n + 2 <= end; n += 2) rows_by<Kind, 2>(c, n);
  for (; n < end; ++n) rows_by<Kind, 1>(c, n);
}

}  // namespace

extern "C" {

// Whether x of a bfloat16 weight is bfloat16, not float32.
int64_t takes_pairs() { return kHasBFloat16; }

void few_rows_linear(const Call* c) {
  const int64_t bytes = c->width * c->depth * (c->type == kFloat32 ? 4 : 2);
#pragma omp parallel for num_threads(c->threads) schedule(static) if (bytes > kAlone)
  for (int64_t n = 0; n < c->width; n += kUnit) {
    if (c->type == kFloat32) unit<Singles<float>>(*c, n);
    else if (c->type == kFloat16) unit<Singles<Float16>>(*c, n);
    else if (kHasBFloat16) unit<Pairs>(*c, n);
    else unit<Singles<BFloat16>>(*c, n);
  }
}
}
