// Products of tiles of rows of a block-quantised matrix with several tokens on x86; see `block_linear.h`.
//
// The codes of a tile are rearranged as they are read, so that a vector has four codes of each row.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "rounded_inputs.h"

#define LIGER_TILES

namespace liger {

using Lanes = float __attribute__((vector_size(4 * kLanes)));
using Words = int32_t __attribute__((vector_size(4 * kLanes)));  // four codes of each row
constexpr int kWords = kUnit / 4;                                // of a unit

// Adds a unit's products in each row of a tile to `sums`, for T tokens whose inputs lie `apart` bytes from each other. All
// rows use the same four inputs at a time.
template <int kBits, int T>
inline __attribute__((always_inline)) void add_products(Words* sums, const Words* codes, const int8_t* x, int64_t apart) {
  const auto four = [=](int t, int i) { return load_from<int32_t>(x + t * apart + 4 * i); };
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#pragma GCC unroll 8
  for (int i = 0; i < kWords; ++i)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#if defined(__AVX512VNNI__)
      sums[t] = Words(_mm512_dpbusd_epi32(__m512i(sums[t]), __m512i(codes[i]), _mm512_set1_epi32(four(t, i))));
#else
      sums[t] = Words(_mm256_dpbusd_avx_epi32(__m256i(sums[t]), __m256i(codes[i]), _mm256_set1_epi32(four(t, i))));
#endif
#else
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    __m256i pairs = _mm256_setzero_si256();  // 16 bits hold 8 sums of two products of at most 15 * 127
#pragma GCC unroll 8
    for (int i = 0; i < kWords; ++i)
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(__m256i(codes[i]), _mm256_set1_epi32(four(t, i))));
    sums[t] += Words(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
#endif
}

// Reads 16 bytes of each row of a tile; `to[i]` has the i-th four of them of all rows.
inline void read_words(const void* first, int64_t row_bytes, Words* to) {
  const auto* from = static_cast<const uint8_t*>(first);
#if defined(__AVX512VNNI__)
  const auto part = [=](int row) { return load_from<__m128i>(from + row * row_bytes); };
  const auto some = [=](int i) {
    const __m512i two = _mm512_inserti32x4(_mm512_castsi128_si512(part(i)), part(i + 4), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(two, part(i + 8), 2), part(i + 12), 3);
  };
  const __m512i a = some(0), b = some(1), c = some(2), d = some(3);
  const __m512i low = _mm512_unpacklo_epi32(a, b), next = _mm512_unpacklo_epi32(c, d);
  const __m512i high = _mm512_unpackhi_epi32(a, b), last = _mm512_unpackhi_epi32(c, d);
  to[0] = Words(_mm512_unpacklo_epi64(low, next)), to[1] = Words(_mm512_unpackhi_epi64(low, next));
  to[2] = Words(_mm512_unpacklo_epi64(high, last)), to[3] = Words(_mm512_unpackhi_epi64(high, last));
#else
  const auto part = [=](int row) { return load_from<__m128i>(from + row * row_bytes); };
  const auto some = [=](int i) { return _mm256_inserti128_si256(_mm256_castsi128_si256(part(i)), part(i + 4), 1); };
  const __m256i a = some(0), b = some(1), c = some(2), d = some(3);
  const __m256i low = _mm256_unpacklo_epi32(a, b), next = _mm256_unpacklo_epi32(c, d);
  const __m256i high = _mm256_unpackhi_epi32(a, b), last = _mm256_unpackhi_epi32(c, d);
  to[0] = Words(_mm256_unpacklo_epi64(low, next)), to[1] = Words(_mm256_unpackhi_epi64(low, next));
  to[2] = Words(_mm256_unpacklo_epi64(high, last)), to[3] = Words(_mm256_unpackhi_epi64(high, last));
#endif
}

// Prefetches what `read_words` will read from the next tile; rows are too short for the hardware to do so.
inline void fetch_words(const void* first, int64_t row_bytes, int64_t at) {
  const auto* from = static_cast<const uint8_t*>(first) + kLanes * (row_bytes + at);
  for (int i = 0; i < kLanes * 16; i += 64) __builtin_prefetch(from + i);
}

// A tile of rows: codes as bytes, in the order of rounded inputs, and values of blocks.
struct Tile {
  std::vector<Words> codes;        // [units, kWords]
  std::vector<float> scale, zero;  // [blocks, kLanes], the zero point times the scale

  // Reads what the rows from `row` on have beside their codes.
  template <int kBits>
  void ReadValues(const BlockMatrix& m, int64_t row) {
    const uint8_t* zeros = m.zero_point + row * m.zero_row;
    const float* scales = m.scale + row * m.blocks;
    scale.resize(m.blocks * kLanes), zero.resize(m.blocks * kLanes);
    Words words[4];
    for (int64_t b = 0; b < m.blocks; b += 4) {  // the last four overlap those before
      const int64_t begin = std::min(b, m.blocks - 4);
      if (begin >= 0) {
        read_words(scales + begin, m.blocks * 4, words);
        fetch_words(scales, m.blocks * 4, b * 4);
        std::memcpy(&scale[begin * kLanes], words, sizeof(words));
      } else {
        for (int64_t i = 0; i < kLanes * m.blocks; ++i) scale[i] = scales[i % kLanes * m.blocks + i / kLanes];
      }
    }
    constexpr int kPoints = 32 / kBits;  // in four bytes
    for (int64_t b = 0; b < m.blocks; b += kPoints) {
      const int64_t at = b * kBits / 8, back = std::max<int64_t>(at + 4 - m.zero_row, 0);  // the last four overlap too
      for (int r = 0; r < kLanes; ++r) {
        const uint8_t* from = zeros + r * m.zero_row;
        if (m.zero_row >= 4) {
          words[0][r] = load_from<int32_t>(from + at - back) >> 8 * back;
        } else {
          uint8_t few[4] = {};
          std::copy_n(from, m.zero_row, few);
          words[0][r] = load_from<int32_t>(few);
        }
      }
      for (int64_t i = b; i < std::min(b + kPoints, m.blocks); ++i, words[0] >>= kBits) {
        const Words points = (words[0] & ((1 << kBits) - 1)) - kCentre<kBits>;
        const Lanes offset = __builtin_convertvector(points, Lanes) * lanes(scale, i);
        std::memcpy(&zero[i * kLanes], &offset, sizeof(offset));
      }
    }
  }

  // Reads the codes of a unit.
  template <int kBits>
  static void ReadUnit(const BlockMatrix& m, int64_t row, int64_t unit, Words* to) {
    const uint8_t* rows = m.codes + row * m.code_row;
    int64_t at = unit * kUnit * kBits / 8;
    for (int i = 0; i < kBits / 4; ++i, at += 16) {
      read_words(rows + at, m.code_row, to + 4 * i);
      fetch_words(rows, m.code_row, at);
    }
    for (int i = 0; i < 4; ++i) {
      if constexpr (kBits == 4)
        to[i + 4] = to[i] >> 4 & 0x0f0f0f0f, to[i] &= 0x0f0f0f0f;
      else if constexpr (kCentre<8> != 0)
        to[i] ^= int32_t(kCentre<8> * 0x01010101u), to[i + 4] ^= int32_t(kCentre<8> * 0x01010101u);
    }
  }

  // Multiplies the tile with T tokens; writes the last `rows` results, for the first one to `out`. The first call reads the
  // codes, and keeps them if others follow.
  template <int kBits, int T, bool kFirst>
  void Multiply(const BlockMatrix& m, int64_t row, const RoundedInputs& in, int64_t token, int64_t rows, bool keep,
                float* out) {
    constexpr int64_t kBytes = kUnit * (kBits / 4);  // of a unit's inputs
    const int64_t units = m.blocks * (m.block / kUnit), stride = in.groups * kGroup;
    const int shift = m.block == kUnit ? 0 : m.block == 2 * kUnit ? 1 : 2;
    const int8_t* x = &in.narrow[token * stride * kBytes];
    const float *scales = &in.scale[token * stride], *totals = &in.sum[token * stride];
    Lanes sums[T] = {};
    for (int64_t u = 0; u < units; ++u, x += kBytes) {
      Words read[kWords], products[T] = {};
      const Words* const words = kFirst ? read : &codes[u * kWords];
      if constexpr (kFirst) ReadUnit<kBits>(m, row, u, read);
      if (kFirst && keep) std::copy_n(read, kWords, &codes[u * kWords]);
      add_products<kBits, T>(products, words, x, stride * kBytes);
      if constexpr (kBits == 8) {
        for (Words& product : products) product <<= 8;
        add_products<kBits, T>(products, words, x + kUnit, stride * kBytes);
      }
      const Lanes factor = lanes(scale, u >> shift), offset = lanes(zero, u >> shift);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        sums[t] += __builtin_convertvector(products[t], Lanes) * (factor * scales[t * stride + u]);
        sums[t] -= offset * totals[t * stride + u];
      }
    }
    for (int t = 0; t < T; ++t) {
      if (rows == kLanes) {
        std::memcpy(out + t * m.rows, &sums[t], sizeof(Lanes));
      } else {
        float last[kLanes];
        std::memcpy(last, &sums[t], sizeof(last));
        std::copy_n(last + kLanes - rows, rows, out + t * m.rows);
      }
    }
  }

  static Lanes lanes(const std::vector<float>& from, int64_t i) { return load_from<Lanes>(&from[i * kLanes]); }
};

template <int kBits>
void multiply_tiles(const BlockMatrix& m, const RoundedInputs& in, int64_t tokens, int64_t begin, int64_t end, float* out) {
  thread_local Tile tile;
  for (; begin < end; begin += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, end - begin);
    const int64_t row = begin + rows - kLanes;
    tile.ReadValues<kBits>(m, row);
    tile.codes.resize(m.blocks * m.block / 4);
    int64_t t = 0;
    const auto multiply = [&](auto count, auto first) {
      tile.Multiply<kBits, count, first>(m, row, in, t, rows, tokens > count, out + t * m.rows + begin);
      t += count;
    };
    const auto some = [&](auto first) {
      if constexpr (kLanes == 16)  // AVX-512 has registers for twice as many
        if (tokens - t >= 2 * kTile) return multiply(std::integral_constant<int, 2 * kTile>{}, first);
      if (tokens - t >= kTile)
        multiply(std::integral_constant<int, kTile>{}, first);
      else if (tokens - t == 3)
        multiply(std::integral_constant<int, 3>{}, first);
      else if (tokens - t == 2)
        multiply(std::integral_constant<int, 2>{}, first);
      else
        multiply(std::integral_constant<int, 1>{}, first);
    };
    some(std::true_type{});
    while (t < tokens) some(std::false_type{});
  }
}

}  // namespace liger
