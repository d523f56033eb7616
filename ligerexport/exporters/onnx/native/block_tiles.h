// Products of tiles of rows of a block-quantised matrix with many tokens; see `block_linear.h`.
//
// The codes of a tile are rearranged, so that a vector has four codes of each row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "rounded_inputs.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include "block_rows_neon.h"
#endif

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
#define LIGER_TILES

namespace liger {

using Lanes = float __attribute__((vector_size(4 * kLanes)));
using Words = int32_t __attribute__((vector_size(4 * kLanes)));  // four codes of each row

// Adds a unit's products in each row of a tile; all rows use the same four inputs at a time.
template <int kBits>
inline Words add_tile_products(Words to, const int32_t* codes, const int8_t* x) {
  [[maybe_unused]] const auto four = [x](int i) { return load_from<int32_t>(x + 4 * i); };
  [[maybe_unused]] const auto word = [codes](int i) { return load_from<Words>(codes + i * kLanes); };
#if defined(__AVX512VNNI__)
  __m512i sums = __m512i(to);
  for (int i = 0; i < kUnit / 4; ++i) sums = _mm512_dpbusd_epi32(sums, __m512i(word(i)), _mm512_set1_epi32(four(i)));
#elif defined(__AVXVNNI__)
  __m256i sums = __m256i(to);
  for (int i = 0; i < kUnit / 4; ++i) sums = _mm256_dpbusd_avx_epi32(sums, __m256i(word(i)), _mm256_set1_epi32(four(i)));
#elif defined(__ARM_FEATURE_DOTPROD)
  int32x4_t sums = int32x4_t(to);
  const int8x16_t low = vld1q_s8(x), high = vld1q_s8(x + 16);
  const auto add = [&](auto i) {
    sums = add_lane_products<kBits, i & 3>(sums, load_from<uint8x16_t>(codes + i * kLanes), i < 4 ? low : high);
  };
  each_of(add, std::make_integer_sequence<int, kUnit / 4>{});
#else
  __m256i sums = _mm256_setzero_si256();  // 16 bits hold 8 sums of two products of at most 15 * 127
  for (int i = 0; i < kUnit / 4; ++i)
    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(__m256i(word(i)), _mm256_set1_epi32(four(i))));
  sums = _mm256_add_epi32(__m256i(to), _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
#endif
  return Words(sums);
}

// Reads four words of each row.
inline void read_words(const uint8_t* const* from, Words* to) {
#ifdef __ARM_NEON
  read_turned(from, to);
#else
  for (int i = 0; i < 4; ++i)
    for (int r = 0; r < kLanes; ++r) to[i][r] = load_from<int32_t>(from[r] + 4 * i);
#endif
}

// A tile of rows: codes as bytes, in the order of rounded inputs, and values of blocks. The last row stands for those
// beyond it.
struct Tile {
  std::vector<int32_t> codes;      // [units, kUnit / 4, kLanes]
  std::vector<float> scale, zero;  // [blocks, kLanes], the zero point times the scale

  template <int kBits>
  void Read(const BlockMatrix& m, int64_t row) {
    const int64_t units = m.blocks * (m.block / kUnit);
    codes.resize(units * (kUnit / 4) * kLanes);
    scale.resize(m.blocks * kLanes);
    zero.resize(m.blocks * kLanes);
    int32_t* words = codes.data();
    const auto put_words = [&](int i, Words word) { std::memcpy(words + i * kLanes, &word, sizeof(word)); };
    const uint8_t *from[kLanes], *zeros[kLanes];
    const float* scales[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      const int64_t at = std::min(row + r, m.rows - 1);
      from[r] = m.codes + at * m.code_row, zeros[r] = m.zero_point + at * m.zero_row, scales[r] = m.scale + at * m.blocks;
    }
    for (int64_t u = 0; u < units; ++u, words += kUnit / 4 * kLanes)
      for (int i = 0; i < kUnit * kBits / 32; i += 4) {
        Words some[4];
        read_words(from, some);
        for (auto& x : from) x += 16;
        for (int k = 0; k < 4; ++k) {
          put_words(i + k, kBits == 8 ? some[k] ^ static_cast<int32_t>(kCentre<8> * 0x01010101u) : some[k] & 0x0f0f0f0f);
          if constexpr (kBits == 4) put_words(k + 4, some[k] >> 4 & 0x0f0f0f0f);
        }
      }
    float *factors = scale.data(), *offsets = zero.data();
    for (int64_t b = 0; b < m.blocks; ++b, factors += kLanes, offsets += kLanes) {
      Lanes factor;
      Words point;
      for (int r = 0; r < kLanes; ++r) factor[r] = scales[r][b], point[r] = zeros[r][b * kBits / 8];
      if constexpr (kBits == 4) point = point >> (b % 2 * 4) & 15;
      const Lanes offset = factor * __builtin_convertvector(point - kCentre<kBits>, Lanes);
      std::memcpy(factors, &factor, sizeof(factor));
      std::memcpy(offsets, &offset, sizeof(offset));
    }
  }

  // Multiplies the tile with T tokens; `out` is the result `[rows]` of the first one.
  template <int kBits, int T>
  void Multiply(const BlockMatrix& m, const RoundedInputs& in, int64_t token, int64_t rows, float* out) const {
    constexpr int64_t kBytes = kUnit * kParts<kBits>;  // of a unit's inputs
    const int64_t span = span_units<kBits>(m.block), stride = in.groups * kGroup, of_block = m.block / (span * kUnit);
    const int shift = of_block == 1 ? 0 : of_block == 2 ? 1 : 2;
    Lanes sums[T] = {};
    for (int64_t s = 0; s < m.blocks << shift; ++s) {
      const Lanes factor = lanes(scale, s >> shift), offset = lanes(zero, s >> shift);
      Words products[T] = {};
      for (int64_t u = s * span; u < (s + 1) * span; ++u)
        for (int t = 0; t < T; ++t) {
          const int32_t* words = &codes[u * (kUnit / 4) * kLanes];
          const int8_t* x = &in.narrow[((token + t) * stride + u) * kBytes];
          products[t] = add_tile_products<kBits>(products[t], words, x);
          if constexpr (kParts<kBits> == 2)
            products[t] = products[t] * 256 + add_tile_products<kBits>(Words{}, words, x + kUnit);
        }
      for (int t = 0; t < T; ++t) {
        const int64_t at = (token + t) * stride + s;
        sums[t] += __builtin_convertvector(products[t], Lanes) * (factor * in.scale[at]);
        sums[t] -= offset * in.sum[at];
      }
    }
    for (int t = 0; t < T; ++t)
      for (int64_t r = 0; r < rows; ++r) out[t * m.rows + r] = sums[t][r];
  }

  static Lanes lanes(const std::vector<float>& from, int64_t i) { return load_from<Lanes>(&from[i * kLanes]); }
};

template <int kBits>
void multiply_tiles(const BlockMatrix& m, const RoundedInputs& in, int64_t tokens, int64_t begin, int64_t end, float* out) {
  thread_local Tile tile;
  for (; begin < end; begin += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, end - begin);
    tile.Read<kBits>(m, begin);
    int64_t t = 0;
    for (; t + kTile <= tokens; t += kTile) tile.Multiply<kBits, kTile>(m, in, t, rows, out + t * m.rows + begin);
    for (; t < tokens; ++t) tile.Multiply<kBits, 1>(m, in, t, rows, out + t * m.rows + begin);
  }
}

}  // namespace liger

#endif
