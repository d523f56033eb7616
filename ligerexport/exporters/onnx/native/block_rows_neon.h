// Products of four rows of a block-quantised matrix with one token on ARM; see `block_linear.h`.
//
// The rows are read as they are in the file, and share the loads of inputs. A vector has the sums of four spans of one row,
// so that scales and zero points lie in the order in which they are needed. Products of bytes need the instructions of
// `dotprod`; with those of `i8mm`, codes of 8 bits need not be centred first. Without both, they are added in 16 bits.
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

// Reads four words of each of four rows, as vectors that have one of each row.
template <typename Words>
inline void read_turned(const uint8_t* const* rows, Words* to) {
  const auto word = [&](int r) { return load_from<uint32x4_t>(rows[r]); };
  const auto wide = [](uint32x4_t x) { return vreinterpretq_u64_u32(x); };
  const uint32x4_t even[] = {vtrn1q_u32(word(0), word(1)), vtrn1q_u32(word(2), word(3))};
  const uint32x4_t odd[] = {vtrn2q_u32(word(0), word(1)), vtrn2q_u32(word(2), word(3))};
  to[0] = Words(vtrn1q_u64(wide(even[0]), wide(even[1]))), to[1] = Words(vtrn1q_u64(wide(odd[0]), wide(odd[1])));
  to[2] = Words(vtrn2q_u64(wide(even[0]), wide(even[1]))), to[3] = Words(vtrn2q_u64(wide(odd[0]), wide(odd[1])));
}

// Calls `work` with each of these constants.
template <typename Work, int... kEach>
inline void each_of(Work work, std::integer_sequence<int, kEach...>) {
  (work(std::integral_constant<int, kEach>{}), ...);
}

#else

// Adds products of 16 codes with 16 inputs, in fours. The sum of two products has 16 bits.
template <int kBits>
inline int32x4_t add_products(int32x4_t sums, uint8x16_t codes, int8x16_t inputs) {
  const int8x16_t some = vreinterpretq_s8_u8(codes);
  const int16x8_t low = vmull_s8(vget_low_s8(some), vget_low_s8(inputs));
  return vpadalq_s16(sums, vmlal_high_s8(low, some, inputs));
}

#endif

// Reads the codes of a unit in the order of its inputs.
template <int kBits>
inline void read_codes(const uint8_t* from, uint8x16_t& one, uint8x16_t& two) {
  one = vld1q_u8(from);
  if constexpr (kBits == 4) {
    two = vshrq_n_u8(one, 4), one = vandq_u8(one, vdupq_n_u8(15));
  } else {
    two = vld1q_u8(from + 16);
    if constexpr (kCentre<8> > 0) one = veorq_u8(one, vdupq_n_u8(128)), two = veorq_u8(two, vdupq_n_u8(128));
  }
}

// Reads the zero points of a group as integers to subtract from codes. A block has kUnits units, and kOfBlock spans.
template <int kBits, int kUnits, int kOfBlock>
inline int16x8_t read_points(const uint8_t* from) {
  uint64_t bytes = 0;
  std::memcpy(&bytes, from, kGroup / kUnits * kBits / 8);
  if constexpr (kBits == 8) {
    uint8x8_t points = vcreate_u8(kCentre<8> > 0 ? bytes ^ 0x8080808080808080u : bytes);
    if constexpr (kOfBlock == 2) points = vzip1_u8(points, points);
    return kCentre<8> > 0 ? vmovl_s8(vreinterpret_s8_u8(points)) : vreinterpretq_s16_u16(vmovl_u8(points));
  } else {
    uint8_t places[16];  // of the byte of each span, beside one that reads as zero
    int16_t shifts[8];
    for (int i = 0; i < 8; ++i) {
      places[2 * i] = static_cast<uint8_t>(i / kUnits / 2), places[2 * i + 1] = 255;
      shifts[i] = i / kUnits % 2 * -4;
    }
    const uint8x16_t each = vqtbl1q_u8(vcombine_u8(vcreate_u8(bytes), vdup_n_u8(0)), vld1q_u8(places));
    return vandq_s16(vshlq_s16(vreinterpretq_s16_u8(each), vld1q_s16(shifts)), vdupq_n_s16(15));
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#define LIGER_IN_ORDER __attribute__((optimize("no-schedule-insns")))  // GCC would begin sums early, and then copy them
#else
#define LIGER_IN_ORDER
#endif

// Multiplies rows `begin` to `end` with a token. A block has kUnits units; a vector has the sums of four spans.
template <int kBits, int kUnits>
LIGER_IN_ORDER void multiply_run(
    const BlockMatrix& m, int64_t begin, int64_t end, const RoundedInputs& in, int64_t token, float* out) {
  constexpr int64_t kSpan = span_units<kBits>(kUnits * kUnit), kSpans = kGroup / kSpan, kOfBlock = kUnits / kSpan;
  constexpr int64_t kBlocks = kGroup / kUnits, kPoints = kBlocks * kBits / 8;  // of a group: blocks, bytes of zero points
  constexpr int64_t kBytes = kUnit * kBits / 8;
  constexpr int kPair = 2;  // rows that share the loads of inputs
  const int64_t at = token * in.groups * kGroup;
  for (int64_t row = begin; row < end; row += kPair) {
    const uint8_t *codes[kPair], *zeros[kPair];
    const float* scales[kPair];
    for (int64_t r = 0; r < kPair; ++r) {
      const int64_t which = std::min(row + r, end - 1);
      codes[r] = m.codes + which * m.code_row, zeros[r] = m.zero_point + which * m.zero_row;
      scales[r] = m.scale + which * m.blocks;
    }
    const int8_t* x = &in.narrow[at * kUnit];
    const float* step = &in.scale[at];
    const int16_t* count = &in.count[at];
    float32x4_t result[kPair] = {};
    int32x4_t sums[kPair][4] = {}, last[kPair] = {};  // sums run on, as differences cost less than zeros; they may wrap

    // Adds a group, of which `left` units exist.
    const auto add = [&](int64_t left) __attribute__((always_inline)) {
      int16x8_t points[kPair];
      for (int r = 0; r < kPair; ++r) points[r] = read_points<kBits, kUnits, kOfBlock>(zeros[r]);
      const int16x8_t counts = vld1q_s16(count);
#pragma GCC unroll 2
      for (int64_t s = 0; s < kSpans; s += 4) {
        if (s * kSpan >= left) break;
#pragma GCC unroll 8
        for (int64_t u = s * kSpan; u < (s + 4) * kSpan; ++u) {
          if (u >= left) break;
          const int8x16_t first = vld1q_s8(x + u * kUnit), second = vld1q_s8(x + u * kUnit + 16);
          for (int r = 0; r < kPair; ++r) {
            uint8x16_t one, two;
            read_codes<kBits>(codes[r] + u * kBytes, one, two);
            int32x4_t& to = sums[r][u / kSpan - s];
            to = add_products<kBits>(add_products<kBits>(to, one, first), two, second);
          }
        }
        const float32x4_t steps = vld1q_f32(step + s);
        for (int r = 0; r < kPair; ++r) {
          const int32x4_t all = lane_totals(sums[r]);
          int32x4_t total = vsubq_s32(all, last[r]);
          last[r] = all;
          total = s > 0 ? vmlsl_high_s16(total, points[r], counts)
                        : vmlsl_s16(total, vget_low_s16(points[r]), vget_low_s16(counts));
          const float* from = scales[r] + s / kOfBlock;
          float32x4_t scale;
          if constexpr (kOfBlock == 1)
            scale = vld1q_f32(from);
          else if constexpr (kOfBlock == 2)
            scale = vcombine_f32(vdup_n_f32(from[0]), vdup_n_f32(from[1]));
          else
            scale = vdupq_n_f32(from[0]);
          result[r] = vfmaq_f32(result[r], vcvtq_f32_s32(total), vmulq_f32(scale, steps));
        }
      }
    };
    int64_t left = m.blocks * kUnits;
    for (; left >= kGroup; left -= kGroup) {
      add(kGroup);
      x += kGroup * kUnit, step += kSpans, count += kSpans;
      for (int r = 0; r < kPair; ++r) codes[r] += kGroup * kBytes, zeros[r] += kPoints, scales[r] += kBlocks;
    }
    if (left > 0) {
      float some[kPair][kBlocks] = {};
      uint8_t few[kPair][kPoints] = {};
      if (row + kPair + kGroup > m.rows)  // in earlier rows, values of the next ones follow and meet inputs of scale 0
        for (int r = 0; r < kPair; ++r) {
          const int64_t blocks = left / kUnits;
          std::copy_n(scales[r], blocks, some[r]), scales[r] = some[r];
          std::copy_n(zeros[r], (blocks * kBits + 7) / 8, few[r]), zeros[r] = few[r];
        }
      add(left);
    }
    out[row] = vaddvq_f32(result[0]);
    if (row + 1 < end) out[row + 1] = vaddvq_f32(result[1]);
  }
}

template <int kBits>
void multiply_run(const BlockMatrix& m, int64_t begin, int64_t end, const RoundedInputs& in, int64_t token, float* out) {
  const auto multiply = m.block == kUnit       ? multiply_run<kBits, 1>
                        : m.block == 2 * kUnit ? multiply_run<kBits, 2>
                                               : multiply_run<kBits, 4>;
  multiply(m, begin, end, in, token, out);
}

}  // namespace liger
