// Products of four rows of a block-quantised matrix with one token on ARM; see `block_linear.h`.
//
// The rows are read as they are in the file. Their codes share the loads of inputs, and their sums the conversion to fp32.
// Products of bytes need the instructions of `dotprod`; with those of `i8mm`, codes of 8 bits need not be centred first.
// Without both, products of codes of 4 bits are added in 16 bits, and inputs of codes of 8 bits have 16 bits.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cstdint>
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

// Returns the products of a unit of four rows with its inputs.
template <int kBits>
inline int32x4_t unit_products(const uint8_t* const* rows, int64_t first, const int8_t* x) {
  int32x4_t sums[4];
  int8x16_t inputs[kBits / 2];
  for (int i = 0; i < kBits / 2; ++i) inputs[i] = vld1q_s8(x + 16 * i);
  for (int r = 0; r < 4; ++r) {
    const uint8x16_t codes = vld1q_u8(rows[r] + first);
    if constexpr (kBits == 4) {
      sums[r] = add_products<4>(vdupq_n_s32(0), vandq_u8(codes, vdupq_n_u8(15)), inputs[0]);
      sums[r] = add_products<4>(sums[r], vshrq_n_u8(codes, 4), inputs[1]);
    } else {
      const uint8x16_t centre = vdupq_n_u8(kCentre<8>), some = veorq_u8(codes, centre);
      const uint8x16_t more = veorq_u8(vld1q_u8(rows[r] + first + 16), centre);
      sums[r] = add_products<8>(add_products<8>(vdupq_n_s32(0), some, inputs[0]), more, inputs[1]);
      sums[r] = vshlq_n_s32(sums[r], 8);
      sums[r] = add_products<8>(add_products<8>(sums[r], some, inputs[2]), more, inputs[3]);
    }
  }
  return lane_totals(sums);
}

#else

// Codes of 4 bits: no sum of 32 products of at most 15 * 127 in two lanes exceeds 16 bits.
template <int kBits>
inline int32x4_t unit_products(const uint8_t* const* rows, int64_t first, const int8_t* x) {
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

template <int kBits>
inline int32x4_t unit_products(const uint8_t* const* rows, int64_t first, const int16_t* x) {
  int32x4_t sums[4];
  for (int r = 0; r < 4; ++r) {
    sums[r] = vdupq_n_s32(0);
    for (int i = 0; i < 2; ++i) {
      const uint8x16_t codes = vld1q_u8(rows[r] + first + 16 * i);
      const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
      const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(codes));
      const int16x8_t one = vld1q_s16(x + 16 * i), two = vld1q_s16(x + 16 * i + 8);
      sums[r] = vmlal_high_s16(vmlal_s16(sums[r], vget_low_s16(low), vget_low_s16(one)), low, one);
      sums[r] = vmlal_high_s16(vmlal_s16(sums[r], vget_low_s16(high), vget_low_s16(two)), high, two);
    }
  }
  return lane_totals(sums);
}

#endif

// Reads a byte of each row.
inline int32x4_t byte_of_rows(const uint8_t* const* rows, int64_t i) {
  uint8x16_t bytes = vdupq_n_u8(0);
  bytes = vld1q_lane_u8(rows[0] + i, bytes, 0), bytes = vld1q_lane_u8(rows[1] + i, bytes, 4);
  bytes = vld1q_lane_u8(rows[2] + i, bytes, 8), bytes = vld1q_lane_u8(rows[3] + i, bytes, 12);
  return vreinterpretq_s32_u8(bytes);
}

// Multiplies four rows from `row` on with a token; the last row stands for those beyond it. A block has kUnits units.
template <int kBits, int kUnits>
float32x4_t multiply_four(const BlockMatrix& m, int64_t row, const RoundedInputs& in, int64_t token) {
  constexpr int64_t kBytes = kUnit * kBits / 8, kLine = 64;
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
  const auto add = [&](int64_t b, float32x4_t scale, int32x4_t zero) {
    const float32x4_t point = vcvtq_f32_s32(zero);
    for (int64_t u = b * kUnits; u < (b + 1) * kUnits; ++u) {
      const auto* inputs = x + u * kUnit * (kRun<kBits> > 0 ? kBits / 4 : 1);
      float32x4_t some = vcvtq_f32_s32(unit_products<kBits>(codes, u * kBytes, inputs));
      some = vfmsq_n_f32(vmulq_n_f32(some, step[u]), point, sum[u]);
      result = vfmaq_f32(result, scale, some);
    }
  };
  const uint8_t* ahead = codes[0] + kAhead;  // four rows follow each other, so one pointer serves for all
  for (int64_t b = 0; b < m.blocks; b += 2) {
    const bool single = b + 1 == m.blocks;
    for (int64_t i = 0; i < 2 * 4 * kUnits * kBytes; i += kLine) __builtin_prefetch(ahead + i);
    ahead += 2 * 4 * kUnits * kBytes;
    float32x4_t pairs[2];  // two scales of a row each
    for (int i = 0; i < 2; ++i) {
      const float *one = scales[2 * i] + b, *two = scales[2 * i + 1] + b;
      pairs[i] = single ? vsetq_lane_f32(*two, vsetq_lane_f32(*one, vdupq_n_f32(0), 0), 2)
                        : vcombine_f32(vld1_f32(one), vld1_f32(two));
    }
    const int32x4_t zero = byte_of_rows(zeros, kBits == 4 ? b / 2 : b);
    add(b, vuzp1q_f32(pairs[0], pairs[1]), kBits == 4 ? vandq_s32(zero, vdupq_n_s32(15)) : vsubq_s32(zero, vdupq_n_s32(kCentre<kBits>)));
    if (single) break;
    const int32x4_t next = kBits == 4 ? vshrq_n_s32(zero, 4) : vsubq_s32(byte_of_rows(zeros, b + 1), vdupq_n_s32(kCentre<kBits>));
    add(b + 1, vuzp2q_f32(pairs[0], pairs[1]), next);
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
