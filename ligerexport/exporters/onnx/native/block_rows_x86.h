// Products of a row of block-quantised codes with a few tokens on x86, with AVX-512 and VNNI or with AVX2; see
// `block_linear.h`.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "rounded_inputs.h"

namespace liger {

// Prefetches the codes and scales of `units` units, kAhead bytes ahead.
template <int kBits>
inline void fetch_ahead(const uint8_t* codes, const float* scale, int64_t units, int shift) {
  constexpr int64_t kBytes = kUnit * kBits / 8;
  for (int64_t i = 0; i < units * kBytes; i += 64) _mm_prefetch(codes + kAhead + i, _MM_HINT_T0);
  _mm_prefetch(scale + (kAhead / kBytes >> shift), _MM_HINT_T0);
}
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

#else

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

#endif

}  // namespace liger
