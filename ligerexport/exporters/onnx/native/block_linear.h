// Products with block-quantised matrices on the CPU: x W^T + bias, with W in the layout of the file, without a copy.
//
// A row has blocks of 32, 64 or 128 codes of 4 or 8 bits that share a scale and a zero point: the layout of ONNX Runtime's
// `MatMulNBits`. Every 32 inputs are rounded to integers with a scale of their own: to 8 bits for codes of 4 bits, to 16
// bits for codes of 8. On ARM all have 8 bits, and those of codes of 8 bits share a scale in a block, up to 64 of them. A
// block contributes scale * (input scale * sum of code * input - zero point * sum of inputs). For a few tokens, rows are
// read as they are; for many, the codes of a tile of rows are rearranged first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "block_tiles.h"

namespace liger {

#ifdef __AVX2__
// Prefetches the codes and scales of `units` units, kAhead bytes ahead.
template <int kBits>
inline void fetch_ahead(const uint8_t* codes, const float* scale, int64_t units, int shift) {
  constexpr int64_t kBytes = kUnit * kBits / 8;
  for (int64_t i = 0; i < units * kBytes; i += 64) _mm_prefetch(codes + kAhead + i, _MM_HINT_T0);
  _mm_prefetch(scale + (kAhead / kBytes >> shift), _MM_HINT_T0);
}
#endif

#if defined(__AVX512VNNI__)

// Multiplies one row with T tokens from `token` on.
template <int kBits, int T>
void multiply_row(const BlockMatrix& m, int64_t row, const RoundedInputs& in, int64_t token, float* out) {
  constexpr int64_t kBytes = kUnit * kBits / 8, kStep = kRun<kBits>;
  const auto first_of = [](int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; };
  const int64_t units = m.blocks * (m.block / kUnit), stride = in.groups * kGroup;
  const int shift = m.block == kUnit ? 0 : m.block == 2 * kUnit ? 1 : 2;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i block = _mm512_srli_epi32(lane, shift), unit = _mm512_srli_epi32(lane, kBits == 4 ? 2 : 3);
  __m512 sums[T], other = _mm512_setzero_ps();  // for one token a second chain of additions, to hide their latency
  for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
  for (int64_t g = 0; g < in.groups; ++g) {
    const int64_t first = g * kGroup, left = std::min(units - first, kGroup);
    const int64_t at = row * m.blocks + (first >> shift), blocks = (left + (1 << shift) - 1) >> shift;
    const uint8_t* zeros = m.zero_point + row * m.zero_row + (first >> shift) * kBits / 8;
    const __m512 scale = _mm512_permutexvar_ps(block, _mm512_maskz_loadu_ps(first_of(blocks), m.scale + at));
    __m512i zero = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_of((blocks * kBits + 7) / 8), zeros));
    if constexpr (kBits == 4) {
      const __m512i high = _mm512_slli_epi32(_mm512_and_si512(block, _mm512_set1_epi32(1)), 2);
      zero = _mm512_srlv_epi32(_mm512_permutexvar_epi32(_mm512_srli_epi32(block, 1), zero), high);
      zero = _mm512_and_si512(zero, _mm512_set1_epi32(15));
    } else {
      zero = _mm512_permutexvar_epi32(block, zero);
    }
    const __m512 offset = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(zero));
    __m512 factor[T];
    for (int t = 0; t < T; ++t) {
      const int64_t from = (token + t) * stride + first;
      factor[t] = _mm512_mul_ps(scale, _mm512_loadu_ps(&in.scale[from]));
      __m512& sum = T == 1 ? other : sums[t];
      sum = _mm512_fnmadd_ps(offset, _mm512_loadu_ps(&in.sum[from]), sum);
    }
    const uint8_t* codes = m.codes + row * m.code_row + first * kBytes;
    if constexpr (T == 1) fetch_ahead<kBits>(codes, m.scale + at, left, shift);
    const auto step = [&](int64_t u, __m512i some) {
      const __m512i which = _mm512_add_epi32(unit, _mm512_set1_epi32(u)), mask = _mm512_set1_epi8(15);
      const __m512i low = _mm512_and_si512(some, mask), high = _mm512_and_si512(_mm512_srli_epi16(some, 4), mask);
      for (int t = 0; t < T; ++t) {
        const int8_t* x = &in.narrow[((token + t) * stride + first + u) * 2 * kBytes];
        const __m512i one = _mm512_loadu_si512(x), two = _mm512_loadu_si512(x + 64);
        __m512i product = _mm512_dpbusd_epi32(_mm512_setzero_si512(), kBits == 4 ? low : some, one);
        if constexpr (kBits == 8) product = _mm512_slli_epi32(product, 8);
        product = _mm512_dpbusd_epi32(product, kBits == 4 ? high : some, two);
        __m512& sum = T == 1 && u / kStep % 2 ? other : sums[t];
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), _mm512_permutexvar_ps(which, factor[t]), sum);
      }
    };
    if (left == kGroup) {
#pragma GCC unroll 8
      for (int64_t u = 0; u < kGroup; u += kStep) step(u, _mm512_loadu_si512(codes + u * kBytes));
    } else {
      for (int64_t u = 0; u < left; u += kStep)
        step(u, _mm512_maskz_loadu_epi8(first_of((left - u) * kBytes), codes + u * kBytes));
    }
  }
  for (int t = 0; t < T; ++t) out[t * m.rows] = _mm512_reduce_add_ps(_mm512_add_ps(sums[t], other));
}

#elif defined(__AVX2__)

// Scale and zero point of each unit of a group; `which` is the block of each unit. Values beyond the row belong to the
// next row and meet inputs of scale 0; values beyond the last row are not read.
template <int kBits>
inline __attribute__((always_inline)) void block_values(
    const BlockMatrix& m, int64_t row, int64_t first, __m256i which, __m256& scale, __m256& zero) {
  const int64_t block = row * m.blocks + first, byte = row * m.zero_row + first * kBits / 8;
  const float* scales = m.scale + block;
  const uint8_t* zeros = m.zero_point + byte;
  float some[kGroup];
  uint8_t few[kGroup];
  if (__builtin_expect(row + kGroup >= m.rows, 0)) {
    std::fill(std::copy_n(scales, std::min(m.rows * m.blocks - block, kGroup), some), some + kGroup, 0.0f);
    std::fill(std::copy_n(zeros, std::min(m.rows * m.zero_row - byte, kGroup), few), few + kGroup, uint8_t{0});
    scales = some, zeros = few;
  }
  scale = _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales), which);
  if constexpr (kBits == 4) {
    const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(load_from<int32_t>(zeros)), _mm256_slli_epi32(which, 2));
    zero = _mm256_cvtepi32_ps(_mm256_and_si256(nibbles, _mm256_set1_epi32(15)));
  } else {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
    zero = _mm256_cvtepi32_ps(_mm256_permutevar8x32_epi32(bytes, which));
  }
}

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// Sums of eight products each of codes of 4 bits and signed bytes; four of them are below 2^13.
inline __m256i products(__m256i low, const int8_t* even, __m256i high, const int8_t* odd) {
  const __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(low, load(even)), _mm256_maddubs_epi16(high, load(odd)));
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

// Multiplies one row with T tokens from `token` on.
template <int kBits, int T>
void multiply_row(const BlockMatrix& m, int64_t row, const RoundedInputs& in, int64_t token, float* out) {
  const uint8_t* codes = m.codes + row * m.code_row;
  const int64_t units = m.blocks * (m.block / kUnit), stride = in.groups * kGroup;
  const int shift = m.block == kUnit ? 0 : m.block == 2 * kUnit ? 1 : 2;
  const __m256i blocks = _mm256_srli_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), shift);
  __m256 sums[T], other = _mm256_setzero_ps();  // for one token a second chain of additions, to hide their latency
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_ps();
  for (int64_t g = 0; g < in.groups; ++g) {
    __m256 scale, zero, factor[T];
    block_values<kBits>(m, row, g * kGroup >> shift, blocks, scale, zero);
    zero = _mm256_mul_ps(scale, zero);
    for (int t = 0; t < T; ++t) {
      const int64_t at = (token + t) * stride + g * kGroup;
      factor[t] = _mm256_mul_ps(scale, _mm256_loadu_ps(&in.scale[at]));
      __m256& sum = T == 1 ? other : sums[t];
      sum = _mm256_fnmadd_ps(zero, _mm256_loadu_ps(&in.sum[at]), sum);
    }
    const int64_t first = g * kGroup, left = units - first;
    if constexpr (T == 1)
      fetch_ahead<kBits>(codes + first * (kUnit * kBits / 8), m.scale + row * m.blocks + (first >> shift),
                         std::min(left, kGroup), shift);
    const auto step = [&](int u, const uint8_t* from) {
      if constexpr (kBits == 4) {  // two units
        const __m256i mask = _mm256_set1_epi8(15), both = load(from);
        const __m256i low = _mm256_and_si256(both, mask), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        const __m256i which = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), _mm256_set1_epi32(u));
        for (int t = 0; t < T; ++t) {
          const int8_t* x = &in.narrow[((token + t) * stride + first + u) * kUnit];
          const __m256 product = _mm256_cvtepi32_ps(products(low, x, high, x + kUnit));
          sums[t] = _mm256_fmadd_ps(product, _mm256_permutevar8x32_ps(factor[t], which), sums[t]);
        }
      } else {
        const auto* halves = reinterpret_cast<const __m128i*>(from);
        const __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128(halves));
        const __m256i high = _mm256_cvtepu8_epi16(_mm_loadu_si128(halves + 1));
        const __m256i which = _mm256_set1_epi32(u);
        for (int t = 0; t < T; ++t) {
          const int16_t* x = &in.wide[((token + t) * stride + first + u) * kUnit];
          const __m256i product = _mm256_add_epi32(_mm256_madd_epi16(low, load(x)), _mm256_madd_epi16(high, load(x + 16)));
          __m256& sum = T == 1 && u % 2 ? other : sums[t];
          sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), _mm256_permutevar8x32_ps(factor[t], which), sum);
        }
      }
    };
    constexpr int kStep = kBits == 4 ? 2 : 1;
    const uint8_t* from = codes + first * (kUnit * kBits / 8);
    if (left >= kGroup) {
#pragma GCC unroll 8
      for (int u = 0; u < kGroup; u += kStep) step(u, from + u * (kUnit * kBits / 8));
      continue;
    }
    for (int u = 0; u < left; u += kStep, from += kUnit) {
      const bool single = u + kStep > left && row + 1 == m.rows;  // the second unit does not exist
      uint8_t last[kUnit] = {};
      if (single) std::copy_n(from, kUnit / 2, last);
      step(u, single ? last : from);
    }
  }
  for (int t = 0; t < T; ++t) out[t * m.rows] = total(_mm256_add_ps(sums[t], other));
}

#elif !defined(__ARM_NEON)

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
  if (!exact) m.bits == 4 ? in.Round<4>(m, x, tokens) : in.Round<8>(m, x, tokens);
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
