// What is applied to results before they are stored.
#pragma once
#include <exponentials.h>

namespace {

enum Activation : int64_t { kNone, kSilu, kSigmoid, kTanh, kGelu, kGeluTanh };
enum Binary : int64_t { kNoOperand, kAdd, kMultiply };

// 1 / (1 + exp(-x)) without what overflows.
INLINE Floats sigmoid(Floats x) {
  const Floats e = exponential(Floats(Words(x) | 0x80000000u)), share = 1.0f / (1.0f + e);
  return x < 0.0f ? e * share : share;
}

// erfc(z) = exp(-q(z)) for z >= 0, q a polynomial up to 4 that was fitted to -log erfc: erf is within 5e-9 of itself. Beyond 4, where erfc
// is below 2e-8, q goes on as the square does.
INLINE Floats complement_of_erf(Floats z) {
  const Floats inside = z < 4.0f ? z : all(4.0f);
  Floats sum = all(-9.250625e-06f);
  for (const float c : {1.1758871e-04f, -6.3264027e-04f, 1.6666478e-03f, -1.5999028e-04f, -1.9153303e-02f, 1.02777906e-01f, 6.366194e-01f,
                        1.1283792f})
    sum = fused(sum, inside, all(c));
  const Floats beyond = z < 4.0f ? all(0.0f) : z * z - 16.0f;
  return exponential(-(sum * inside) - beyond);
}

// x Phi(x) with Phi(x) = erfc(-x / sqrt 2) / 2, which takes nothing off 1 where x is below 0.
INLINE Floats gelu(Floats x) {
  const Floats e = complement_of_erf(Floats(Words(x) & 0x7fffffffu) * 0.70710678f);
  return 0.5f * x * (x < 0.0f ? e : 2.0f - e);
}

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
INLINE Floats gelu_by_tanh(Floats x) {
  const Floats inner = 0.79788456f * x * fused(0.044715f * x, x, all(1.0f));
  return 0.5f * x * (1.0f + hyperbolic_tangent(inner));
}

INLINE Floats activated(int64_t activation, Floats x) {
  switch (activation) {
    case kSilu: return x * sigmoid(x);
    case kSigmoid: return sigmoid(x);
    case kTanh: return hyperbolic_tangent(x);
    case kGelu: return gelu(x);
    case kGeluTanh: return gelu_by_tanh(x);
  }
  return x;
}

}  // namespace
