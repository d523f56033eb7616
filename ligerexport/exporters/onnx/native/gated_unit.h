// The gate of an MLP on the CPU: activation(gate) * up.
#pragma once

#include "vectors.h"

namespace liger {

enum class Activation : int64_t { kSilu = 0, kGelu = 1 };

// Both are x times a logistic function: of x for SiLU, of twice the argument of tanh for the approximation of GELU.
template <typename T, typename Exp>
T gated(Activation kind, T gate, T up, Exp exp) {
  const T slope = kind == Activation::kSilu ? gate : gate * (gate * gate * 0.0713548163f + 1.5957691216f);
  return gate / (exp(-slope) + 1.0f) * up;
}

inline void gated_unit(Activation kind, float* to, const float* gate, const float* up, int64_t width) {
  int64_t i = 0;
  for (; i + kVector <= width; i += kVector)
    put(to + i, gated(kind, at(gate + i, 0), at(up + i, 0), exponential));
  for (; i < width; ++i) to[i] = gated(kind, gate[i], up[i], [](float x) { return std::exp(x); });
}

}  // namespace liger
