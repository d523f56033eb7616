// Attention of many queries to the same candidates, as products of matrices. All rows of a tile lie in panels of sixteen
// columns, so that a product reads them in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "stored.h"

namespace liger {

constexpr int64_t kPanel = 2 * kVector;

inline int64_t panelled(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

// Writes M rows of `a` `[M, depth]` times `b` `[depth, width]`, which lies in panels.
template <int M>
void multiply_panels(float* to, int64_t to_row, const float* a, const float* b, int64_t depth, int64_t width) {
  for (int64_t j = 0; j < width; j += kPanel, b += kPanel * depth) {
    Vector low[M] = {}, high[M] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const Vector x = at(b + k * kPanel, 0), y = at(b + k * kPanel, 1);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) low[m] += a[m * depth + k] * x, high[m] += a[m * depth + k] * y;
    }
    for (int m = 0; m < M; ++m) put(to + m * to_row + j, low[m]), put(to + m * to_row + j + kVector, high[m]);
  }
}

inline void product(float* to, int64_t to_row, const float* a, const float* b, int64_t rows, int64_t depth,
                    int64_t width) {
  constexpr int kRows = 6;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) multiply_panels<kRows>(to + i * to_row, to_row, a + i * depth, b, depth, width);
  for (; i < rows; ++i) multiply_panels<1>(to + i * to_row, to_row, a + i * depth, b, depth, width);
}

// A column is a candidate during the tokens that see it at one kind of distance. Those beyond the largest distance come
// first and are read by queries that are not rotated.
struct Dense {
  int64_t tokens, group, d_k, d_v, far, columns;
  std::vector<float> plain, turned, keys, values, weight, mixed;  // queries `[tokens * group, d_k]`
  std::vector<int32_t> since, until;                              // tokens that see a column; none see the padding

  void Reset(int64_t far_columns, int64_t near_columns) {
    far = panelled(far_columns), columns = far + panelled(near_columns);
    plain.resize(tokens * group * d_k), turned.resize(tokens * group * d_k);
    keys.resize(columns * d_k), values.resize(columns * panelled(d_v));
    since.assign(columns, std::numeric_limits<int32_t>::max()), until.assign(columns, 0);
    weight.resize(tokens * group * columns), mixed.resize(tokens * group * panelled(d_v));
    for (int64_t v = 0; v < panelled(d_v); v += kPanel) {  // the padding has weights of about 0
      Pad(v, far_columns, far), Pad(v, far + near_columns, columns);
    }
  }

  void See(int64_t column, int64_t first, int64_t end) {
    since[column] = static_cast<int32_t>(first), until[column] = static_cast<int32_t>(end);
  }

  // Sets the keys of up to kVector columns from `column` on, which is a multiple of it. `rows` has room for all of them.
  void SetKeys(int64_t column, const float* rows, const Vector& scales) {
    float* to = &keys[column / kPanel * kPanel * d_k + column % kPanel];
    int64_t k = 0;
    for (; k + kVector <= d_k; k += kVector) {
      Vector square[kVector];
      for (int c = 0; c < kVector; ++c) square[c] = at(rows + c * d_k + k, 0);
      transpose(square);
      for (int i = 0; i < kVector; ++i) put(to + (k + i) * kPanel, scales * square[i]);
    }
    for (; k < d_k; ++k)
      for (int c = 0; c < kVector; ++c) to[k * kPanel + c] = scales[c] * rows[c * d_k + k];
  }

  template <typename T>
  void SetValue(int64_t column, const T* value, float scale) {
    float* to = &values[column * kPanel];
    int64_t v = 0;
    for (; v + kVector <= d_v; v += kVector) put(to + v / kPanel * columns * kPanel + v % kPanel, scale * load(value + v));
    for (; v < d_v; ++v) to[v / kPanel * columns * kPanel + v % kPanel] = scale * widen(value[v]);
  }

  void Pad(int64_t first, int64_t begin, int64_t end) {
    float* panel = &values[first * columns];
    std::fill(panel + begin * kPanel, panel + end * kPanel, 0.0f);
  }

  // For each query of each token writes the largest logit, the sum of the exponentials, and the weighted sum of values.
  void Attend(float* partial) {
    const int64_t rows = tokens * group, wide = panelled(d_v);
    product(weight.data(), columns, plain.data(), keys.data(), rows, d_k, far);
    product(weight.data() + far, columns, turned.data(), &keys[far * d_k], rows, d_k, columns - far);
    for (int64_t i = 0; i < rows; ++i) {
      const auto token = static_cast<int32_t>(i / group);
      float *row = &weight[i * columns], *to = partial + i * (d_v + 2);
      for (int64_t j = 0; j < columns; ++j) row[j] = since[j] <= token && token < until[j] ? row[j] : -HUGE_VALF;
      to[0] = largest(row, columns);
      to[1] = exponentials(row, columns, std::max(to[0], -std::numeric_limits<float>::max()));
    }
    product(mixed.data(), wide, weight.data(), values.data(), rows, columns, wide);
    for (int64_t i = 0; i < rows; ++i) std::copy_n(&mixed[i * wide], d_v, partial + i * (d_v + 2) + 2);
  }
};

}  // namespace liger
