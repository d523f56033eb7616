// A matrix of block-quantised weights, and the inputs of a product with it, rounded to integers; see `block_linear.h`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace liger {

constexpr int64_t kUnit = 32;   // least number of codes that share a scale
constexpr int64_t kTile = 4;    // tokens that use a row's codes while they are in registers
constexpr int64_t kRows = 16;   // rows that stay in the cache from tile to tile
constexpr int64_t kAhead = 2048;  // bytes of codes to prefetch: one row is too short for the hardware to do so

#if defined(__AVX512VNNI__)
constexpr int kLanes = 16;      // rows of a tile
constexpr int64_t kGroup = 16;  // units of a row that are processed together
template <int kBits>
constexpr int64_t kRun = 16 / kBits;  // units of a row in one register
#else
#if defined(__AVX2__)
constexpr int kLanes = 8;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 0;
#endif
constexpr int64_t kGroup = 8;
template <int kBits>
#ifdef __ARM_NEON
constexpr int64_t kRun = 1;
#else
constexpr int64_t kRun = kBits == 4 ? 2 : 0;  // 0: inputs are of 16 bits
#endif
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kFourProducts = true;  // one instruction adds four products of bytes
#else
constexpr bool kFourProducts = false;
#endif

template <int kBits>
#if defined(__ARM_NEON) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kCentre = kBits == 8 ? 128 : 0;  // what is subtracted from codes, for products of signed bytes only
#else
constexpr int kCentre = 0;
#endif

template <int kBits>
#ifdef __ARM_NEON
constexpr int kParts = 1;  // bytes of an input
#else
constexpr int kParts = kBits / 4;
#endif
template <int kBits>
constexpr float kMost = kParts<kBits> == 1 ? 127.0f : 32639.0f;  // of an input: 127 * 256 + 127

// Returns how many units of inputs share a scale, for a block of this size.
template <int kBits>
constexpr int64_t span_units([[maybe_unused]] int64_t block) {
#ifdef __ARM_NEON
  if (kBits == 8 && block > kUnit) return 2;
#endif
  return 1;
}

#if defined(__AVX512VNNI__)
constexpr const char* kLevel = "avx512vnni";
#elif defined(__AVXVNNI__)
constexpr const char* kLevel = "avxvnni";
#elif defined(__AVX2__)
constexpr const char* kLevel = "avx2";
#elif defined(__ARM_FEATURE_MATMUL_INT8)
constexpr const char* kLevel = "i8mm";
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr const char* kLevel = "dotprod";
#elif defined(__ARM_NEON)
constexpr const char* kLevel = "neon";
#else
constexpr const char* kLevel = "plain";
#endif

struct BlockMatrix {
  int64_t rows, width, bits, block, blocks, code_row, zero_row;
  const uint8_t* codes;       // [rows, blocks, block * bits / 8], the first of two codes in the low half of a byte
  const float* scale;         // [rows, blocks]
  const uint8_t* zero_point;  // [rows, ceil(blocks * bits / 8)], packed alike

  BlockMatrix(int64_t rows, int64_t width, int64_t bits, int64_t block)
      : rows(rows), width(width), bits(bits), block(block), blocks((width + block - 1) / block),
        code_row(blocks * block * bits / 8), zero_row((blocks * bits + 7) / 8) {}
};

// Whether codes with this number of bits have tiles; for 8 bits, sums of 32 products need a special instruction.
template <int kBits>
constexpr bool kTiles = kLanes > 0 && (kBits == 4 || kFourProducts);

#ifdef __AVX2__
constexpr int64_t kTiled = 2;  // fewest tokens that are worth a tile
#else
constexpr int64_t kTiled = 2 * kTile;
#endif

// Inputs of one call as integers.
struct RoundedInputs {
  int64_t groups;
  bool tiled;
  std::vector<float> scale, sum;  // of each span, [tokens, groups * kGroup]; beyond the width 0
  std::vector<int16_t> count;     // the sum of a span's integers, for rows on ARM
  std::vector<int8_t> narrow;     // [tokens, groups * kGroup, kUnit * kParts<kBits>], or instead
  std::vector<int16_t> wide;      // [tokens, groups * kGroup, kUnit]

  // A unit has two parts: even and odd elements for codes of 4 bits; beside codes of 8 bits, both halves, or high and low
  // bytes, both signed. For tiles, units follow each other; for rows, the first parts of a run of units come before their
  // second parts.
  template <int kBits, typename Parallel>
  void Round(const BlockMatrix& matrix, const float* x, int64_t tokens, const Parallel& parallel) {
    constexpr int64_t kFew = 1 << 14;  // numbers that one thread rounds faster than several
    constexpr int64_t kPart = kUnit * kParts<kBits> / 2;
    groups = (matrix.blocks * matrix.block + kGroup * kUnit - 1) / (kGroup * kUnit);
    tiled = kTiles<kBits> && tokens >= kTiled && matrix.rows >= kLanes;
    const int64_t units = groups * kGroup, run = tiled ? 1 : kRun<kBits>;
    scale.assign(tokens * units, 0.0f);
    sum.assign(tokens * units, 0.0f);
#ifdef __ARM_NEON
    count.assign(tokens * units, 0);
#endif
    narrow.assign(run > 0 ? tokens * units * 2 * kPart : 0, 0);
    wide.assign(run > 0 ? 0 : tokens * units * kUnit, 0);
    const auto round = [&](int64_t t) { RoundToken<kBits, kPart>(matrix, x + t * matrix.width, t * units, run); };
    if (tokens > 1 && tokens * matrix.width > kFew)
      parallel(tokens, round);
    else
      for (int64_t t = 0; t < tokens; ++t) round(t);
  }

  // Rounds the inputs of a token, whose units begin at `first`.
  template <int kBits, int64_t kPart>
  void RoundToken(const BlockMatrix& matrix, const float* x, int64_t first, int64_t run) {
    constexpr int64_t kMostUnits = 2;
    const int64_t span = span_units<kBits>(matrix.block), size = span * kUnit;
    for (int64_t s = 0; s * size < matrix.width; ++s) {
      const int64_t at = first + s, left = matrix.width - s * size;
      const float* from = x + s * size;
      float padded[kMostUnits * kUnit] = {};
      if (left < size) {
        std::copy_n(from, left, padded);
        from = padded;
      }
      int32_t codes[kMostUnits * kUnit], whole;
      scale[at] = RoundSpan(from, size, kMost<kBits>, codes, &whole);
      sum[at] = scale[at] * static_cast<float>(whole);
      if (!count.empty()) count[at] = static_cast<int16_t>(whole);
      for (int64_t u = s * span; u < (s + 1) * span; ++u)
        Put<kBits, kPart>(codes + (u - s * span) * kUnit, first + u, u % std::max<int64_t>(run, 1), run);
    }
  }

  // Writes the integers of a unit, which is the `nth` one of its run.
  template <int kBits, int64_t kPart>
  void Put(const int32_t* codes, int64_t unit, int64_t nth, int64_t run) {
    if (run == 0) {
      std::copy_n(codes, kUnit, &wide[unit * kUnit]);
      return;
    }
    int8_t* first = &narrow[(2 * unit - nth) * kPart];
    int8_t* second = first + run * kPart;
    for (int64_t i = 0; i < kPart; ++i) {
      if constexpr (kBits == 4)
        first[i] = static_cast<int8_t>(codes[2 * i]), second[i] = static_cast<int8_t>(codes[2 * i + 1]);
      else if constexpr (kParts<kBits> == 1)
        first[i] = static_cast<int8_t>(codes[i]), second[i] = static_cast<int8_t>(codes[kPart + i]);
      else
        first[i] = static_cast<int8_t>((codes[i] + 128) >> 8), second[i] = static_cast<int8_t>(codes[i]);
    }
  }

  // Returns the scale at which the largest of n inputs becomes `most`; writes the integers and their sum.
  static float RoundSpan(const float* x, int64_t n, float most, int32_t* codes, int32_t* sum) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    Vector top{}, all{};
    for (int64_t i = 0; i < n / kVector; ++i) {
      const Vector value = at(x, i), size = value < 0 ? -value : value;
      top = size > top ? size : top;
      all += size;
    }
    float largest = 0;
    for (int i = 0; i < kVector; ++i) largest = std::max(largest, top[i]);
    if (!std::isfinite(total(all))) largest = std::numeric_limits<float>::quiet_NaN();  // as in fp32
    const float inverse = largest > 0 ? most / largest : 0.0f;
    Integers sums{};
    for (int64_t i = 0; i < n / kVector; ++i) {
      const Vector nearest = inverse > 0 ? (at(x, i) * inverse + kRound) - kRound : Vector{};
      const Integers whole = __builtin_convertvector(nearest, Integers);
      std::memcpy(codes + i * kVector, &whole, sizeof(whole));
      sums += whole;
    }
    *sum = 0;
    for (int i = 0; i < kVector; ++i) *sum += sums[i];
    return largest / most;
  }
};

}  // namespace liger
