// Arithmetic on several numbers at a time: eight if the processor has registers for them, else four.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE3__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace liger {

#ifdef __AVX__
constexpr int kVector = 8;
#else
constexpr int kVector = 4;  // a compiler for SVE splits longer vectors into single numbers
#endif
using Vector = float __attribute__((vector_size(4 * kVector)));  // GCC and Clang, any processor
using Integers = int32_t __attribute__((vector_size(4 * kVector)));
using Quarters = float __attribute__((vector_size(16)));

// Reads a vector from any address. A pointer to vectors would claim an alignment that tensors do not have.
template <typename V>
V load_from(const void* x) {
  V y;
  std::memcpy(&y, x, sizeof(y));
  return y;
}

inline Vector at(const float* x, int64_t i) { return load_from<Vector>(x + i * kVector); }
inline void put(float* x, Vector y) { std::memcpy(x, &y, sizeof(y)); }

inline Quarters halved(Vector x) {
  Quarters half[kVector / 4];
  std::memcpy(half, &x, sizeof(x));
  return kVector == 4 ? half[0] : half[0] + half[kVector / 4 - 1];
}

inline float total(Vector x) {
  const Quarters y = halved(x);
  return (y[0] + y[1]) + (y[2] + y[3]);
}

// Writes the totals of four vectors.
inline void totals(float* to, const Vector* x) {
#if defined(__SSE3__)
  const __m128 low = _mm_hadd_ps(halved(x[0]), halved(x[1])), high = _mm_hadd_ps(halved(x[2]), halved(x[3]));
  _mm_storeu_ps(to, _mm_hadd_ps(low, high));
#elif defined(__ARM_NEON)
  vst1q_f32(to, vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])));
#else
  for (int i = 0; i < 4; ++i) to[i] = total(x[i]);
#endif
}

// Swaps rows and columns of a square of numbers.
inline void transpose(Vector* x) {
#if defined(__AVX__)
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2)
    pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      const __m256d low = _mm256_castps_pd(pairs[i + k]), high = _mm256_castps_pd(pairs[i + 2 + k]);
      fours[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      fours[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
#else
  for (int i = 0; i < kVector; ++i)
    for (int k = 0; k < i; ++k) {
      const float swapped = x[i][k];
      x[i][k] = x[k][i], x[k][i] = swapped;
    }
#endif
}

// Returns the largest number that is not NaN, or minus infinity.
inline float largest(const float* x, int64_t n) {
  Vector most = Vector{} - HUGE_VALF;
  int64_t i = 0;
  for (; i + kVector <= n; i += kVector) most = at(x + i, 0) > most ? at(x + i, 0) : most;
  float top = most[0];
  for (int k = 1; k < kVector; ++k) top = std::max(top, most[k]);
  for (; i < n; ++i) top = std::max(top, x[i]);
  return top;
}

// Returns e^x to about one unit in the last place; below -87 the smallest normal number, above 88 a number near the
// largest. n is the nearest integer to x / ln 2; the rest, at most half of ln 2, goes through a polynomial (Cephes).
inline Vector exponential(Vector x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -87.0f ? Vector{} - 87.0f : x;
  x = x > 88.0f ? Vector{} + 88.0f : x;
  const Vector n = (x * 1.44269504f + kRound) - kRound;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return p * load_from<Vector>(&power);
}

// Replaces each x by e^(x - top) and returns the sum.
inline float exponentials(float* x, int64_t n, float top) {
  Vector sums{};
  int64_t i = 0;
  for (; i + kVector <= n; i += kVector) {
    const Vector e = exponential(at(x + i, 0) - top);
    put(x + i, e);
    sums += e;
  }
  float sum = total(sums);
  for (; i < n; ++i) sum += x[i] = std::exp(x[i] - top);
  return sum;
}

}  // namespace liger
