// Compares the kernels of the lowering `native` with plain arithmetic in fp64; prints the level and the number of cases.
//
// Products: codes of 4 and 8 bits, all sizes of blocks, widths that end within a unit, rows and tokens that leave a rest,
// and data that lies at odd addresses at the end of its memory. The memory: slots of all types in a window that holds all
// tokens, so that the result is causal attention.

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>

#include "block_linear.h"
#include "bounded_memory.h"
#include "gated_unit.h"

namespace {

std::mt19937 random_bits(1);
int cases = 0;

float normal(float size = 1) { return std::normal_distribution<float>(0, size)(random_bits); }

void check(double found, double expected, double most, const char* what, int64_t a, int64_t b, int64_t c) {
  ++cases;
  if (std::fabs(found - expected) <= most) return;
  std::printf("%s %lld %lld %lld: %.9g instead of %.9g\n", what, (long long)a, (long long)b, (long long)c, found, expected);
  std::exit(1);
}

// Numbers whose last byte is the last one of their memory, at an odd address if they are bytes.
template <typename T>
struct Data {
  size_t offset = sizeof(T) == 1 ? 1 : sizeof(T);
  std::unique_ptr<uint8_t[]> bytes;
  T* first;

  explicit Data(size_t n) : bytes(new uint8_t[offset + n * sizeof(T)]()), first(reinterpret_cast<T*>(&bytes[0] + offset)) {}
  T& operator[](size_t i) { return first[i]; }
};

void serial(int64_t n, const std::function<void(int64_t)>& work) {
  for (int64_t i = 0; i < n; ++i) work(i);
}

void products(int64_t rows, int64_t width, int64_t bits, int64_t block) {
  liger::BlockMatrix m(rows, width, bits, block);
  Data<uint8_t> codes(rows * m.code_row), zeros(rows * m.zero_row);
  Data<float> scale(rows * m.blocks), bias(rows);
  for (int64_t i = 0; i < rows * m.code_row; ++i) codes[i] = random_bits();
  for (int64_t i = 0; i < rows * m.zero_row; ++i) zeros[i] = random_bits();
  for (int64_t i = 0; i < rows * m.blocks; ++i) scale[i] = std::fabs(normal()) + 1e-3f;
  for (int64_t i = 0; i < rows; ++i) bias[i] = normal();
  if (rows > 1)  // the largest and smallest products that there are
    for (int64_t i = 0; i < m.code_row; ++i) codes[i] = 255, codes[m.code_row + i] = 0;
  m.codes = codes.first, m.zero_point = zeros.first, m.scale = scale.first;
  const float most = bits == 4 ? liger::kMost<4> : liger::kMost<8>;
  const int64_t span = 32 * (bits == 4 ? liger::span_units<4>(block) : liger::span_units<8>(block));
  std::vector<float> row(m.blocks * block);
  for (int64_t tokens : {1, 5, 15}) {
    Data<float> x(tokens * width), out(tokens * rows);
    for (int64_t i = 0; i < tokens * width; ++i) x[i] = i / width == 1 ? (i % 2 ? -1.0f : 1.0f) : normal();
    std::vector<double> rounded(tokens * width);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t u = 0; u < width; u += span) {
        float given[64] = {};
        int32_t whole[64], sum;
        std::copy_n(&x[t * width + u], std::min(span, width - u), given);
        const double step = liger::RoundedInputs::RoundSpan(given, span, most, whole, &sum);
        for (int64_t i = 0; i < std::min(span, width - u); ++i) {
          rounded[t * width + u + i] = whole[i] * step;
          check(whole[i] * step, given[i], (0.5 + most * 1e-6) * step, "input", width, t, u + i);
        }
      }
    for (bool exact : {false, true}) {
      liger::block_linear(m, x.first, bias.first, tokens, exact, out.first, serial);
      for (int64_t r = 0; r < rows; ++r) {
        liger::dequantise_row(m, r, row.data());
        for (int64_t t = 0; t < tokens; ++t) {
          double sum = bias[r], size = std::fabs(bias[r]);
          for (int64_t i = 0; i < width; ++i) {
            const double given = exact ? x[t * width + i] : rounded[t * width + i];
            sum += given * row[i];  // codes and zero points are multiplied apart, up to 2^bits each
            size += std::fabs(given) * (exact ? std::fabs(row[i]) : scale[r * m.blocks + i / block] * (1 << bits));
          }
          check(out[t * rows + r], sum, size * 4e-7, bits == 4 ? "product of 4 bits" : "product of 8 bits", width, block,
                tokens);
        }
      }
    }
  }
}

float plain(float x) { return x; }
float plain(liger::Half x) { return liger::widen(x); }
float plain(int8_t x) { return x; }

// Causal attention over `length` tokens in three calls.
template <typename T>
void memory(int64_t d, int64_t group) {
  constexpr int64_t kLength = 45, kHeads = 2, kDistance = 100;
  const int64_t heads = kHeads * group, half = d / 4;
  liger::Layer layer{heads, kHeads, d, d, 4, kDistance, 0, 0.125f, 1.0f, {}, {}, 0, 0, 0};
  for (int64_t h = 0; h < kHeads; ++h) {
    layer.heads.push_back({200, 204, layer.slots, 0, {}, {}});
    layer.slots += 204;
  }
  Data<float> query(kLength * heads * d), key(kLength * kHeads * d), value(kLength * kHeads * d);
  Data<float> cos((kDistance + kLength) * half), sin((kDistance + kLength) * half), mixed(kLength * heads * d);
  for (auto* x : {&query, &key, &value})
    for (int64_t i = 0; i < kLength * (x == &query ? heads : kHeads) * d; ++i) (*x)[i] = normal();
  for (int64_t i = 0; i < kDistance + kLength; ++i)
    for (int64_t c = 0; c < half; ++c) {
      const double angle = (i - kDistance) / (1.0 + 7 * c);
      cos[i * half + c] = std::cos(angle), sin[i * half + c] = std::sin(angle);
    }
  Data<T> keys(layer.slots * d), values(layer.slots * d);
  Data<liger::Scale<T>> key_scales(layer.slots), value_scales(layer.slots);
  Data<int32_t> positions(layer.slots);
  for (int64_t i = 0; i < layer.slots; ++i) positions[i] = -1;
  std::atomic<bool> damaged{false};
  int64_t start = 0;
  for (int64_t length : {30, 1, 14}) {
    liger::Call<T> call{};
    call.batch = 1, call.length = length, call.half = half, call.query_row = heads * d;
    call.key_row = call.value_row = kHeads * d;
    call.query = query.first + start * heads * d, call.key = key.first + start * kHeads * d;
    call.value = value.first + start * kHeads * d, call.cos = cos.first, call.sin = sin.first, call.position = &start;
    call.past_key = call.new_key = keys.first, call.past_value = call.new_value = values.first;
    call.past_key_scale = call.new_key_scale = key_scales.first;
    call.past_value_scale = call.new_value_scale = value_scales.first;
    call.past_position = call.new_position = {positions.first, true};
    call.mixed = mixed.first + start * heads * d, call.damaged = &damaged;
    liger::run(layer, call, serial);
    start += length;
  }
  const auto stored = [&](float* from, double* to) {
    std::vector<T> codes(d);
    const liger::Scale<T> scale = liger::store(codes.data(), from, d);
    for (int64_t i = 0; i < d; ++i) to[i] = plain(codes[i]) * (liger::kScaled<T> ? liger::widen(scale) : 1.0f);
  };
  const auto turn = [&](double* to, const double* from, int64_t offset) {
    std::copy_n(from, d, to);
    const float *real = &cos[(offset + kDistance) * half], *imaginary = &sin[(offset + kDistance) * half];
    for (int64_t c = 0; c < half; ++c) {
      const double a = from[c], b = from[half + c];
      to[c] = a * real[c] - b * imaginary[c], to[half + c] = b * real[c] + a * imaginary[c];
    }
  };
  std::vector<double> k(d), v(d), q(d), turned(d), sum(d);
  for (int64_t t = 0; t < kLength; ++t)
    for (int64_t h = 0; h < heads; ++h) {
      std::fill(sum.begin(), sum.end(), 0.0);
      std::copy_n(&query[(t * heads + h) * d], d, q.begin());
      double weights = 0;
      for (int64_t i = 0; i <= t; ++i) {
        stored(&key[(i * kHeads + h / group) * d], k.data()), stored(&value[(i * kHeads + h / group) * d], v.data());
        turn(turned.data(), k.data(), i - t);
        double logit = 0;
        for (int64_t c = 0; c < d; ++c) logit += q[c] * turned[c];
        const double weight = std::exp(logit * layer.scale);
        weights += weight;
        for (int64_t c = 0; c < d; ++c) sum[c] += weight * v[c];
      }
      for (int64_t c = 0; c < d; ++c) check(mixed[(t * heads + h) * d + c], sum[c] / weights, 2e-5, "memory", d, t, h);
    }
}

void gates() {
  Data<float> gate(37), up(37), out(37);
  for (int64_t i = 0; i < 37; ++i) gate[i] = normal(3), up[i] = normal();
  for (auto kind : {liger::Activation::kSilu, liger::Activation::kGelu}) {
    liger::gated_unit(kind, out.first, gate.first, up.first, 37);
    for (int64_t i = 0; i < 37; ++i) {
      const double x = gate[i], slope = kind == liger::Activation::kSilu ? x : 1.5957691216 * (x + 0.044715 * x * x * x);
      check(out[i], x / (1 + std::exp(-slope)) * up[i], 1e-5, "gate", i, 0, 0);
    }
  }
}

}  // namespace

int main() {
  for (int64_t bits : {4, 8})
    for (int64_t block : {32, 64, 128})
      for (int64_t width : {20, 96, 160, 576})
        for (int64_t rows : {1, 19}) products(rows, width, bits, block);
  for (int64_t d : {20, 64, 128})
    for (int64_t group : {1, 2, 3, 4}) memory<float>(d, group), memory<liger::Half>(d, group), memory<int8_t>(d, group);
  gates();
  std::printf("%s: %d\n", liger::kLevel, cases);
}
