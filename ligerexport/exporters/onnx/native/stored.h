// Keys and values in the types in which slots are kept: fp32, fp16, or codes of 8 bits with a scale for each row;
// `ligerexport.kernels.ragged` in C++. Rows are read as they are stored, and numbers widen to fp32 in registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace liger {

struct Half {
  uint16_t bits;
};

struct Exact {  // a code that is not rounded, as verification needs it
  float value;
};

template <typename T>
constexpr bool kScaled = std::is_same_v<T, int8_t> || std::is_same_v<T, Exact>;
template <typename T>
using Scale = std::conditional_t<std::is_same_v<T, Exact>, float, Half>;
constexpr float kMostHalf = 65504.0f, kLeastHalf = 6.103515625e-05f;  // 2^-14, the smallest normal number
constexpr float kMostCode = 127.0f;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(Exact x) { return x.value; }

// A normal number is moved to the exponents of fp32, and a smaller one is added to 0.5 and comes out by subtraction.
inline float widen(Half x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  return load_from<__fp16>(&x);
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = static_cast<uint32_t>(x.bits & 0x7fffu);
  const float normal = of_bits((rest << 13) + (0xe0u << 23)) * 0x1.0p-112f;
  const float small = of_bits(rest | (126u << 23)) - 0.5f;
  return of_bits(sign | bits_of(rest < 0x400u ? small : normal));
#endif
}

// Rounds to the nearest, ties to even: the sum with a power of two has the last bit of fp16 as its own last bit.
inline Half narrow(float x) {
  const uint32_t twice = bits_of(x) << 1, sign = bits_of(x) >> 16 & 0x8000u;
  if (twice > 0xff000000u) return {static_cast<uint16_t>(sign | 0x7e00u)};  // NaN
  const uint32_t bias = std::max(twice & 0xff000000u, 0x71000000u);
  const float sum = of_bits((bias >> 1) + 0x07800000u) + (std::fabs(x) * 0x1.0p+112f) * 0x1.0p-110f;
  const uint32_t bits = bits_of(sum);
  return {static_cast<uint16_t>(sign | ((bits >> 13 & 0x7c00u) + (bits & 0xfffu)))};
}

inline Vector load(const float* x) { return at(x, 0); }
inline Vector load(const Exact* x) { return at(&x->value, 0); }

inline Vector load(const Half* x) {
#if defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#elif defined(__aarch64__)
  return vcvt_f32_f16(load_from<float16x4_t>(x));
#else
  Vector y;
  for (int i = 0; i < kVector; ++i) y[i] = widen(x[i]);
  return y;
#endif
}

inline Vector load(const int8_t* x) {
#if defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
#elif defined(__aarch64__)
  const int16x8_t codes = vmovl_s8(vcreate_s8(load_from<uint32_t>(x)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(codes)));
#else
  Integers y;
  for (int i = 0; i < kVector; ++i) y[i] = x[i];
  return __builtin_convertvector(y, Vector);
#endif
}

// Rounds a row of n numbers as it arrives, and returns the scale of its codes.
template <typename T>
Scale<T> store(T* to, const float* x, int64_t n) {
  if constexpr (kScaled<T>) {
    float most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, std::fabs(x[i]));
    most = std::min(std::max(most / kMostCode, kLeastHalf), kMostHalf);
    if constexpr (std::is_same_v<T, Exact>) {
      for (int64_t i = 0; i < n; ++i) to[i] = {x[i] / most};
      return most;
    } else {
      const Half scale = narrow(most);
      const float step = widen(scale);
      for (int64_t i = 0; i < n; ++i)  // NaN becomes the lowest code
        to[i] = static_cast<int8_t>(std::min(std::max(-kMostCode, std::nearbyint(x[i] / step)), kMostCode));
      return scale;
    }
  } else if constexpr (std::is_same_v<T, Half>) {
    for (int64_t i = 0; i < n; ++i) to[i] = narrow(std::min(std::max(x[i], -kMostHalf), kMostHalf));
  } else {
    std::copy_n(x, n, to);
  }
  return Scale<T>{};
}

// Reads a row of n numbers without its scale.
template <typename T>
void read(float* to, const T* x, int64_t n) {
  int64_t i = 0;
  for (; i + kVector <= n; i += kVector) put(to + i, load(x + i));
  for (; i < n; ++i) to[i] = widen(x[i]);
}

// Rotates the halves of the first 2 R of `width` channels.
template <typename T>
void rotate(float* to, const T* x, const float* cos, const float* sin, float sign, int64_t half, int64_t width) {
  int64_t i = 0;
  for (; i + kVector <= half; i += kVector) {
    const Vector a = load(x + i), b = load(x + half + i), c = at(cos + i, 0), s = sign * at(sin + i, 0);
    put(to + i, a * c - b * s);
    put(to + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = widen(x[i]), b = widen(x[half + i]), s = sign * sin[i];
    to[i] = a * cos[i] - b * s;
    to[half + i] = b * cos[i] + a * s;
  }
  read(to + 2 * half, x + 2 * half, width - 2 * half);
}

inline float dot(const float* a, const float* b, int64_t width) {
  Vector even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kVector <= width; i += 2 * kVector) {
    even += at(a + i, 0) * at(b + i, 0);
    odd += at(a + i, 1) * at(b + i, 1);
  }
  float sum = total(even + odd);
  for (; i < width; ++i) sum += a[i] * b[i];
  return sum;
}

constexpr int kTogether = 4;  // keys that share the loads of a query

// Writes the products of a query with four keys. If the compiler knows the width W, sums stay in registers.
template <int W>
void dots(float* to, const float* query, const float* const* key, int64_t width) {
  Vector sum[kTogether] = {};
  const int64_t whole = W > 0 ? W : width / kVector * kVector;
#pragma GCC unroll 16
  for (int64_t i = 0; i < whole; i += kVector)
#pragma GCC unroll 4
    for (int k = 0; k < kTogether; ++k) sum[k] += at(query + i, 0) * at(key[k] + i, 0);
  totals(to, sum);
  for (int64_t i = whole; W == 0 && i < width; ++i)
    for (int k = 0; k < kTogether; ++k) to[k] += query[i] * key[k][i];
}

[[gnu::noinline]] inline void dots(float* to, const float* query, const float* const* key, int64_t width) {
  if (width == 64) return dots<64>(to, query, key, width);
  if (width == 128) return dots<128>(to, query, key, width);
  dots<0>(to, query, key, width);
}

inline void add(float* to, const float* x, float weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += weight * x[i];
}

// Weighted sums of the same rows, for Q queries and V vectors of channels from `begin` on, which fit the registers.
template <int Q, int V, typename T>
void mix_block(float* to, int64_t to_row, const std::vector<const T*>& rows, int64_t begin, const float* weight,
               int64_t weight_row) {
  Vector sum[Q][V] = {};
  for (size_t j = 0; j < rows.size(); ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vector part = load(rows[j] + begin + v * kVector);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) sum[q][v] += weight[q * weight_row + j] * part;
    }
  }
  for (int q = 0; q < Q; ++q) std::memcpy(to + q * to_row + begin, sum[q], sizeof(sum[q]));
}

template <int Q, typename T>
void mix_queries(float* to, int64_t to_row, const std::vector<const T*>& rows, const float* weight, int64_t weight_row,
                 int64_t width) {
  constexpr int kWide = Q == 1 ? 8 : 4;
  int64_t c = 0;
  for (; c + kWide * kVector <= width; c += kWide * kVector) mix_block<Q, kWide>(to, to_row, rows, c, weight, weight_row);
  for (; c + kVector <= width; c += kVector) mix_block<Q, 1>(to, to_row, rows, c, weight, weight_row);
  for (; c < width; ++c)
    for (int q = 0; q < Q; ++q) {
      float sum = 0;
      for (size_t j = 0; j < rows.size(); ++j) sum += weight[q * weight_row + j] * widen(rows[j][c]);
      to[q * to_row + c] = sum;
    }
}

// Writes the weighted sums of rows for each query, whose weights are `[queries, weight_row]`.
template <typename T>
void mix(float* to, int64_t to_row, const std::vector<const T*>& rows, const float* weight, int64_t weight_row,
         int64_t queries, int64_t width) {
  for (int64_t q = 0; q < queries;) {
    const int64_t left = queries - q, now = left == 4 ? 2 : std::min<int64_t>(left, 3);
    const auto some = now == 3 ? mix_queries<3, T> : now == 2 ? mix_queries<2, T> : mix_queries<1, T>;
    some(to + q * to_row, to_row, rows, weight + q * weight_row, weight_row, width);
    q += now;
  }
}

}  // namespace liger
