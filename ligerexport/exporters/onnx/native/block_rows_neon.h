// Products of four rows of a block-quantised matrix with one token on ARM; see `block_linear.h`.
//
// The rows are read as they are in the file. Their codes share the loads of inputs, and their sums the conversion to fp32.
// Products of bytes need the instructions of `dotprod`; with those of `i8mm`, codes of 8 bits need not be centred first.
// Without both, products of codes of 4 bits are added in 16 bits, and inputs of codes of 8 bits have 16 bits.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "rounded_inputs.h"

namespace liger {

// Adds the lanes of each of four vectors.
inline int32x4_t lane_totals(const int32x4_t* x) { return vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3])); }

#ifdef __ARM_FEATURE_DOTPROD

// Adds products of 16 codes with 16 inputs, in fours.
template <int kBits>
inline int32x4_t add_products(int32x4_t sums, uint8x16_t codes, int8x16_t inputs) {
#ifdef __ARM_FEATURE_MATMUL_INT8
  if constexpr (kBits == 8) return vusdotq_s32(sums, codes, inputs);
#endif
  return vdotq_s32(sums, vreinterpretq_s8_u8(codes), inputs);
}

// The same, with all rows' products of four inputs.
template <int kBits, int kFour>
inline int32x4_t add_lane_products(int32x4_t sums, uint8x16_t codes, int8x16_t inputs) {
#ifdef __ARM_FEATURE_MATMUL_INT8
  if constexpr (kBits == 8) return vusdotq_laneq_s32(sums, codes, inputs, kFour);
#endif
  return vdotq_laneq_s32(sums, vreinterpretq_s8_u8(codes), inputs, kFour);
}

// Calls `work` with each of these constants.
template <typename Work, int... kEach>
inline void each_of(Work work, std::integer_sequence<int, kEach...>) {
  (work(std::integral_constant<int, kEach>{}), ...);
}

// Products of units of four rows with the inputs. Sums run on from unit to unit, since their differences cost less than
// setting them to zero; they may wrap.
template <int kBits>
struct Products {
  static constexpr int kParts = kBits / 4;  // of inputs: one, or high and low bytes
  int32x4_t sums[kParts][4] = {}, last = vdupq_n_s32(0);

  int32x4_t Next(const uint8_t* const* rows, int64_t first, const int8_t* x) {
    int8x16_t inputs[2 * kParts];
    for (int i = 0; i < 2 * kParts; ++i) inputs[i] = vld1q_s8(x + 16 * i);
    for (int r = 0; r < 4; ++r) {
      uint8x16_t codes = vld1q_u8(rows[r] + first), more;
      if constexpr (kBits == 4) {
        more = vshrq_n_u8(codes, 4), codes = vandq_u8(codes, vdupq_n_u8(15));
      } else {
        more = vld1q_u8(rows[r] + first + 16);
        if constexpr (kCentre<8> > 0) codes = veorq_u8(codes, vdupq_n_u8(128)), more = veorq_u8(more, vdupq_n_u8(128));
      }
      for (int i = 0; i < kParts; ++i) {
        sums[i][r] = add_products<kBits>(sums[i][r], codes, inputs[2 * i]);
        sums[i][r] = add_products<kBits>(sums[i][r], more, inputs[2 * i + 1]);
      }
    }
    int32x4_t all = lane_totals(sums[0]);
    if constexpr (kParts == 2) all = vaddq_s32(vshlq_n_s32(all, 8), lane_totals(sums[1]));
    // A compiler that begins the next unit before these totals are made has to copy the sums.
    int32x4_t* const part = sums[0];
    asm("" : "+w"(all), "+w"(part[0]), "+w"(part[1]), "+w"(part[2]), "+w"(part[3]));
    const int32x4_t next = vsubq_s32(all, last);
    last = all;
    return next;
  }
};

#else

template <int kBits>
struct Products {
  int32x4_t sums[4] = {}, last = vdupq_n_s32(0);

  // For codes of 4 bits: no sum of the products in four lanes, at most 15 * 127 each, exceeds 16 bits.
  static int32x4_t Next(const uint8_t* const* rows, int64_t first, const int8_t* x) {
    const int8x16_t even = vld1q_s8(x), odd = vld1q_s8(x + 16);
    int16x8_t sums[4];
    for (int r = 0; r < 4; ++r) {
      const uint8x16_t codes = vld1q_u8(rows[r] + first);
      const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(15)));
      const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(codes, 4));
      sums[r] = vmlal_high_s8(vmull_s8(vget_low_s8(low), vget_low_s8(even)), low, even);
      sums[r] = vmlal_high_s8(vmlal_s8(sums[r], vget_low_s8(high), vget_low_s8(odd)), high, odd);
    }
    return vpaddlq_s16(vpaddq_s16(vpaddq_s16(sums[0], sums[1]), vpaddq_s16(sums[2], sums[3])));
  }

  int32x4_t Next(const uint8_t* const* rows, int64_t first, const int16_t* x) {
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < 2; ++i) {
        const uint8x16_t codes = vld1q_u8(rows[r] + first + 16 * i);
        const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
        const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(codes));
        const int16x8_t one = vld1q_s16(x + 16 * i), two = vld1q_s16(x + 16 * i + 8);
        sums[r] = vmlal_high_s16(vmlal_s16(sums[r], vget_low_s16(low), vget_low_s16(one)), low, one);
        sums[r] = vmlal_high_s16(vmlal_s16(sums[r], vget_low_s16(high), vget_low_s16(two)), high, two);
      }
    const int32x4_t all = lane_totals(sums), next = vsubq_s32(all, last);
    last = all;
    return next;
  }
};

#endif

// Reads four bytes of each row, of which `left` exist.
inline uint32x4_t words_of_rows(const uint8_t* const* rows, int64_t first, int64_t left) {
  uint32_t words[4] = {};
  for (int r = 0; r < 4; ++r) std::memcpy(&words[r], rows[r] + first, left < 4 ? left : 4);
  return vld1q_u32(words);
}

// Multiplies four rows from `row` on with a token; the last row stands for those beyond it. A block has kUnits units.
template <int kBits, int kUnits>
float32x4_t multiply_four(const BlockMatrix& m, int64_t row, const RoundedInputs& in, int64_t token) {
  constexpr int64_t kBytes = kUnit * kBits / 8, kLine = 64;
  constexpr int64_t kTogether = 32 / kBits;  // blocks whose zero points have four bytes
  const uint8_t *codes[4], *zeros[4];
  const float* scales[4];
  for (int64_t r = 0; r < 4; ++r) {
    const int64_t at = std::min(row + r, m.rows - 1);
    codes[r] = m.codes + at * m.code_row, zeros[r] = m.zero_point + at * m.zero_row, scales[r] = m.scale + at * m.blocks;
  }
  const int64_t first = token * in.groups * kGroup;
  const float *step = &in.scale[first], *sum = &in.sum[first];
  const auto* x = [&] {
    if constexpr (kRun<kBits> > 0)
      return &in.narrow[first * kUnit * kBits / 4];
    else
      return &in.wide[first * kUnit];
  }();
  float32x4_t result = vdupq_n_f32(0);
  Products<kBits> products;
  uint32x4_t points;
  const auto add = [&](int64_t b, float32x4_t scale) __attribute__((always_inline)) {
    const int32x4_t code = vreinterpretq_s32_u32(vandq_u32(points, vdupq_n_u32((1 << kBits) - 1)));
    const float32x4_t point = vcvtq_f32_s32(vsubq_s32(code, vdupq_n_s32(kCentre<kBits>)));
    points = vshrq_n_u32(points, kBits);
    for (int64_t u = b * kUnits; u < (b + 1) * kUnits; ++u) {
      const auto* inputs = x + u * kUnit * (kRun<kBits> > 0 ? kBits / 4 : 1);
      const float32x4_t some = vmulq_n_f32(vcvtq_f32_s32(products.Next(codes, u * kBytes, inputs)), step[u]);
      result = vfmaq_f32(result, scale, vfmsq_n_f32(some, point, sum[u]));
    }
  };
  const uint8_t* ahead = codes[0] + kAhead;  // four rows follow each other, so one pointer serves for all
  for (int64_t g = 0; g < m.blocks; g += kTogether) {
    points = words_of_rows(zeros, g * kBits / 8, m.zero_row - g * kBits / 8);
    const int64_t end = std::min(g + kTogether, m.blocks);
    int64_t b = g;
    for (; b + 2 <= end; b += 2) {
      for (int64_t i = 0; i < 2 * 4 * kUnits * kBytes; i += kLine) __builtin_prefetch(ahead + i);
      ahead += 2 * 4 * kUnits * kBytes;
      const float32x4_t one = vcombine_f32(vld1_f32(scales[0] + b), vld1_f32(scales[1] + b));  // two scales of a row each
      const float32x4_t two = vcombine_f32(vld1_f32(scales[2] + b), vld1_f32(scales[3] + b));
      add(b, vuzp1q_f32(one, two)), add(b + 1, vuzp2q_f32(one, two));
    }
    if (b < end) {
      const float last[] = {scales[0][b], scales[1][b], scales[2][b], scales[3][b]};
      add(b, vld1q_f32(last));
    }
  }
  return result;
}

// Multiplies `rows` rows, at most four, with a token.
template <int kBits>
void multiply_some(const BlockMatrix& m, int64_t row, int64_t rows, const RoundedInputs& in, int64_t token, float* out) {
  const auto multiply = m.block == kUnit       ? multiply_four<kBits, 1>
                        : m.block == 2 * kUnit ? multiply_four<kBits, 2>
                                               : multiply_four<kBits, 4>;
  float sums[4];
  vst1q_f32(sums, multiply(m, row, in, token));
  std::copy_n(sums, rows, out);
}

}  // namespace liger
