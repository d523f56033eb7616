#include "sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace {

constexpr uint64_t kMultiplierHigh = 2549297995355413924, kMultiplierLow = 4865540595714422341;

uint64_t high_product(uint64_t a, uint64_t b) {
  const uint64_t a0 = a & 0xffffffff, a1 = a >> 32, b0 = b & 0xffffffff, b1 = b >> 32;
  const uint64_t middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (middle & 0xffffffff);
  return a1 * b1 + (middle >> 32) + (other >> 32);
}

// numpy's SeedSequence of one number: the state and the increment of PCG64.
std::array<uint64_t, 4> spread(uint64_t seed) {
  const uint32_t words[4] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0, 0};
  uint32_t pool[4], constant = 0x43b0d7e5;
  const auto hash = [&constant](uint32_t value, uint32_t factor) {
    value ^= constant;
    constant *= factor;
    value *= constant;
    return value ^ value >> 16;
  };
  for (int i = 0; i < 4; ++i) pool[i] = hash(words[i], 0x931e8875);
  for (int from = 0; from < 4; ++from)
    for (int to = 0; to < 4; ++to) {
      if (from == to) continue;
      const uint32_t mixed = 0xca01f9dd * pool[to] - 0x4973f715 * hash(pool[from], 0x931e8875);
      pool[to] = mixed ^ mixed >> 16;
    }
  constant = 0x8b51f9dd;
  std::array<uint64_t, 4> made{};
  for (int i = 0; i < 8; ++i) made[i / 2] |= uint64_t{hash(pool[i % 4], 0x58f38ded)} << 32 * (i % 2);
  return made;
}

}  // namespace

Sampler::Sampler(const Sampling& sampling) : sampling_(sampling) {
  const auto words = spread(sampling.seed);
  add_high_ = words[2] << 1 | words[3] >> 63;
  add_low_ = words[3] << 1 | 1;
  random();
  low_ += words[1];
  high_ += words[0] + (low_ < words[1]);
  random();
}

double Sampler::random() {
  const uint64_t product = low_ * kMultiplierLow;
  high_ = high_product(low_, kMultiplierLow) + high_ * kMultiplierLow + low_ * kMultiplierHigh + add_high_;
  low_ = product + add_low_;
  high_ += low_ < product;
  const uint64_t mixed = high_ ^ low_, turn = high_ >> 58;
  return ((mixed >> turn | mixed << (-turn & 63)) >> 11) * 0x1p-53;
}

int64_t Sampler::operator()(const std::vector<float>& logits) {
  const auto best = std::max_element(logits.begin(), logits.end());
  if (!std::isfinite(*best)) throw std::runtime_error("the model returned no numbers");
  if (sampling_.temperature == 0) return best - logits.begin();
  std::vector<int64_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), int64_t{0});
  if (sampling_.top_k > 0 && sampling_.top_k < ids.size()) {
    std::vector<float> sorted = logits;
    std::nth_element(sorted.begin(), sorted.begin() + sampling_.top_k - 1, sorted.end(), std::greater<>());
    const float least = sorted[sampling_.top_k - 1];
    ids.erase(std::remove_if(ids.begin(), ids.end(), [&](int64_t id) { return logits[id] < least; }), ids.end());
  }
  std::vector<float> weights(logits.size());
  double total = 0;
  for (const int64_t id : ids)
    total += weights[id] = std::exp((logits[id] - *best) / static_cast<float>(sampling_.temperature));
  const double least = std::max(sampling_.min_p, (1 - sampling_.top_p) / ids.size() * total);
  ids.erase(std::remove_if(ids.begin(), ids.end(), [&](int64_t id) { return weights[id] < least; }), ids.end());
  if (sampling_.top_p < 1) {
    std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) { return weights[a] > weights[b]; });
    double sum = 0;
    const auto enough = [&](int64_t id) { return (sum += weights[id]) >= sampling_.top_p * total; };
    const auto last = std::find_if(ids.begin(), ids.end(), enough);
    if (last != ids.end()) ids.erase(last + 1, ids.end());
  }
  double kept = 0, sum = 0;
  for (const int64_t id : ids) kept += weights[id];
  const double drawn = random() * kept;
  for (const int64_t id : ids)
    if ((sum += weights[id]) > drawn) return id;
  return ids.back();
}

StopStrings::StopStrings(std::vector<std::string> stops, const Tokenizer& tokenizer) : stops_(std::move(stops)) {
  for (const auto& stop : stops_)
    for (size_t size = 1; size <= stop.size(); ++size)
      for (const int64_t id : tokenizer.added(stop.substr(0, size)))
        if (tokenizer.bytes(id).empty()) ids_.insert(id);
}

bool StopStrings::push(const std::string& bytes, std::string& out) {
  held_ += bytes;
  size_t first = std::string::npos, keep = 0;
  for (const auto& stop : stops_) {
    first = std::min(first, held_.find(stop));
    size_t size = std::min(held_.size(), stop.size() - 1);
    while (held_.compare(held_.size() - size, size, stop, 0, size) != 0) --size;
    keep = std::max(keep, size);
  }
  const bool found = first != std::string::npos;
  const size_t cut = found ? first : held_.size() - keep;
  out += held_.substr(0, cut);
  held_.erase(0, found ? held_.size() : cut);
  return found;
}
