// Products with block-quantised matrices on the CPU: x W^T + bias, with W in the layout of the file, without a copy.
//
// A row has blocks of 32, 64 or 128 codes of 4 or 8 bits that share a scale and a zero point: the layout of ONNX Runtime's
// `MatMulNBits`. Every 32 inputs are rounded to integers with a scale of their own: to 8 bits for codes of 4 bits, to 16
// bits for codes of 8. On ARM all have 8 bits, and those of codes of 8 bits share a scale in a block, up to 64 of them. A
// block contributes scale * (input scale * sum of code * input - zero point * sum of inputs). For a few tokens, rows are
// read as they are; for more, the codes of a tile of rows are rearranged as they are read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "rounded_inputs.h"

#if defined(__AVX2__)
#include "block_rows_x86.h"
#include "block_tiles_x86.h"
#elif defined(__ARM_NEON)
#include "block_rows_neon.h"
#include "block_tiles_neon.h"
#endif

namespace liger {

#if !defined(__AVX2__) && !defined(__ARM_NEON)

template <int kBits, int T>
void multiply_row(const BlockMatrix& m, int64_t row, const RoundedInputs& in, int64_t token, float* out) {
  const uint8_t *codes = m.codes + row * m.code_row, *zeros = m.zero_point + row * m.zero_row;
  const int64_t units = m.blocks * (m.block / kUnit), stride = in.groups * kGroup;
  for (int t = 0; t < T; ++t) {
    float sum = 0;
    for (int64_t u = 0; u < units; ++u) {
      const int64_t at = (token + t) * stride + u, block = u * kUnit / m.block;
      const int zero = kBits == 8 ? zeros[block] : zeros[block / 2] >> block % 2 * 4 & 15;
      int32_t product = 0;
      if constexpr (kBits == 4) {
        const int8_t* x = &in.narrow[(at - u % 2) * kUnit + u % 2 * (kUnit / 2)];
        for (int i = 0; i < kUnit / 2; ++i) {
          const int both = codes[u * (kUnit / 2) + i];
          product += (both & 15) * x[i] + (both >> 4) * x[kUnit + i];
        }
      } else {
        for (int i = 0; i < kUnit; ++i) product += codes[u * kUnit + i] * in.wide[at * kUnit + i];
      }
      sum += m.scale[row * m.blocks + block] * (in.scale[at] * static_cast<float>(product) - zero * in.sum[at]);
    }
    out[t * m.rows] = sum;
  }
}

#endif

// Multiplies rows `begin` to `end` with all tokens.
template <int kBits>
void multiply_rows(const BlockMatrix& m, const RoundedInputs& in, int64_t tokens, int64_t begin, int64_t end, float* out) {
#ifdef LIGER_TILES
  if constexpr (kTiles<kBits>)
    if (in.tiled) return multiply_tiles<kBits>(m, in, tokens, begin, end, out);
#endif
  for (int64_t first = begin; first < end; first += kRows)
#ifdef __ARM_NEON
    for (int64_t t = 0; t < tokens; ++t)
      multiply_run<kBits>(m, first, std::min(first + kRows, end), in, t, out + t * m.rows);
#else
    for (int64_t t = 0; t < tokens; t += kTile)
      for (int64_t row = first; row < std::min(first + kRows, end); ++row) {
        if (t + kTile <= tokens)
          multiply_row<kBits, kTile>(m, row, in, t, out + t * m.rows + row);
        else
          for (int64_t i = t; i < tokens; ++i) multiply_row<kBits, 1>(m, row, in, i, out + i * m.rows + row);
      }
#endif
}

// Writes the numbers of a row, `blocks * block`, from its codes.
inline void dequantise_row(const BlockMatrix& m, int64_t row, float* out) {
  const uint8_t *from = m.codes + row * m.code_row, *zeros = m.zero_point + row * m.zero_row;
  for (int64_t b = 0; b < m.blocks; ++b, out += m.block) {
    const int zero = m.bits == 8 ? zeros[b] : zeros[b / 2] >> b % 2 * 4 & 15;
    const float scale = m.scale[row * m.blocks + b];
    if (m.bits == 8) {
      for (int64_t i = 0; i < m.block; ++i) out[i] = scale * static_cast<float>(from[i] - zero);
    } else {
      for (int64_t i = 0; i < m.block / 2; ++i) {
        out[2 * i] = scale * static_cast<float>((from[i] & 15) - zero);
        out[2 * i + 1] = scale * static_cast<float>((from[i] >> 4) - zero);
      }
    }
    from += m.block * m.bits / 8;
  }
}

// Multiplies a row of numbers with T tokens: sums of kSpan products are fp32, sums of these fp64.
template <int T>
void multiply_floats(const float* weights, const float* x, int64_t width, int64_t stride, float* out) {
  constexpr int64_t kSpan = kGroup * kUnit;
  double sums[T] = {};
  for (int64_t first = 0; first < width; first += kSpan) {
    const int64_t count = std::min(kSpan, width - first), whole = count / kVector;
    Vector lanes[T] = {};
    for (int64_t i = 0; i < whole; ++i)
      for (int t = 0; t < T; ++t) lanes[t] += at(weights + first, i) * at(x + t * width + first, i);
    for (int t = 0; t < T; ++t) {
      sums[t] += total(lanes[t]);
      for (int64_t i = first + whole * kVector; i < first + count; ++i)
        sums[t] += static_cast<double>(weights[i]) * x[t * width + i];
    }
  }
  for (int t = 0; t < T; ++t) out[t * stride] = static_cast<float>(sums[t]);
}

// `multiply_rows` without rounding inputs, for comparing a graph with the exact meaning of its weights.
inline void multiply_exactly(const BlockMatrix& m, const float* x, int64_t tokens, int64_t begin, int64_t end, float* out) {
  const int64_t row = m.blocks * m.block;
  std::vector<float> weights(kRows * row);
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = std::min(kRows, end - first);
    for (int64_t i = 0; i < rows; ++i) dequantise_row(m, first + i, &weights[i * row]);
    for (int64_t t = 0; t < tokens; t += kTile)
      for (int64_t i = 0; i < rows; ++i) {
        const auto multiply = [&, i](auto count, int64_t token) {
          multiply_floats<count>(&weights[i * row], x + token * m.width, m.width, m.rows, out + token * m.rows + first + i);
        };
        if (t + kTile <= tokens)
          multiply(std::integral_constant<int, kTile>{}, t);
        else
          for (int64_t token = t; token < tokens; ++token) multiply(std::integral_constant<int, 1>{}, token);
      }
  }
}

// `parallel(n, work)` calls work(0) to work(n - 1) on any number of threads.
template <typename Parallel>
void block_linear(const BlockMatrix& m, const float* x, const float* bias, int64_t tokens, bool exact, float* out,
                  const Parallel& parallel) {
  constexpr int64_t kPiece = 1 << 16;  // fewest products for a thread
  thread_local RoundedInputs shared;
  RoundedInputs& in = shared;
  if (!exact) m.bits == 4 ? in.Round<4>(m, x, tokens, parallel) : in.Round<8>(m, x, tokens, parallel);
  const int64_t work = m.rows * m.width * tokens, most = (m.rows + kRows - 1) / kRows;
  const int64_t pieces = std::min<int64_t>({std::max<int64_t>(work / kPiece, 1), most, 32});
  const int64_t rows = ((m.rows + pieces - 1) / pieces + kRows - 1) / kRows * kRows;
  const auto piece = [&, rows](int64_t i) {
    const int64_t begin = i * rows, end = std::min(begin + rows, m.rows);
    if (exact)
      multiply_exactly(m, x, tokens, begin, end, out);
    else if (m.bits == 4)
      multiply_rows<4>(m, in, tokens, begin, end, out);
    else
      multiply_rows<8>(m, in, tokens, begin, end, out);
    if (bias != nullptr)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t row = begin; row < end; ++row) out[t * m.rows + row] += bias[row];
  };
  if (pieces == 1)
    piece(0);
  else
    parallel((m.rows + rows - 1) / rows, piece);
}

}  // namespace liger
