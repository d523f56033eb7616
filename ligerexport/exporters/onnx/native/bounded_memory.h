// The bounded exact memory of one layer on the CPU: `ligerexport.kernels.memory_attention`, and with evicted tokens
// `ligerexport.kernels.evicted`, in C++.
//
// Tokens are read one after the other, so that a memory is a few lists and no sort over all candidates is needed. Keys
// are rotated once per call. If a new state shares the memory of the old one, only what changed is written.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

namespace liger {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kFaintest = 1e-30f;
constexpr int64_t kLongest = int64_t{1} << 62;  // tokens of a sequence

struct Pool {
  int64_t count, received, maximum, by_value, first_distance;  // see `Pool` in scores.py
  float horizon;                                               // 0 for no ageing
};

struct Layer {
  int64_t q_heads, kv_heads, d_k, d_v, slots, window, sinks, max_distance, evicts;
  float scale, recurrence_weight;
  std::vector<Pool> pools;
};

struct Call {  // pointers to the tensors of one call; past and present may be the same
  int64_t batch, length, half, query_row, key_row, value_row, width;  // *_row: numbers from a token to the next
  const float *query, *key, *value, *arrival, *cos, *sin, *turn;  // `turn`: cosine, sine, 1 if slow, `[3, R]`
  const float *hidden, *score_weight, *score_bias;                // of `width` channels, instead of `arrival`
  const int64_t* position;
  const float *past_key, *past_value, *past_score, *past_state, *past_mass;
  const int64_t* past_position;
  float *mixed, *new_key, *new_value, *new_score, *new_state, *new_mass;
  int64_t* new_position;
  std::atomic<bool>* damaged;  // set if no text can lead to the state
};

// The templates are compiled for heads of 64 and 128 channels, and with `W` = 0 for any width at run time. If the
// compiler knows the width, sums stay in registers.

template <int W>
float dot(const float* a, const float* b, int64_t width) {
  if constexpr (W == 0) {
    Vector sums{};
    int64_t i = 0;
    for (; i + kVector <= width; i += kVector) sums += at(a + i, 0) * at(b + i, 0);
    float sum = total(sums);
    for (; i < width; ++i) sum += a[i] * b[i];
    return sum;
  } else {
    Vector even = at(a, 0) * at(b, 0), odd = at(a, 1) * at(b, 1);
#pragma GCC unroll 8
    for (int i = 2; i < W / kVector; i += 2) {
      even += at(a, i) * at(b, i);
      odd += at(a, i + 1) * at(b, i + 1);
    }
    return total(even + odd);
  }
}

inline void add(float* to, const float* x, float weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += weight * x[i];
}

// Returns the weighted sum of rows.
template <int W>
void mix(float* to, const std::vector<const float*>& rows, const std::vector<int64_t>& which, const float* weight,
         int64_t width) {
  if constexpr (W == 0) {
    std::fill_n(to, width, 0.0f);
    for (size_t j = 0; j < which.size(); ++j) add(to, rows[which[j]], weight[j], width);
  } else {
    for (int begin = 0; begin < W; begin += 64) {  // 8 sums fit the registers
      Vector sum[8] = {};
      for (size_t j = 0; j < which.size(); ++j) {
        const float* row = rows[which[j]] + begin;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sum[i] += weight[j] * at(row, i);
      }
      std::memcpy(to + begin, sum, sizeof(sum));
    }
  }
}

// Rotates the halves of the first 2 R of `width` channels.
inline void rotate(float* to, const float* x, const float* cos, const float* sin, float sign, int64_t half, int64_t width) {
  for (int64_t i = 0; i < half; ++i) {
    const float s = sign * sin[i];
    to[i] = x[i] * cos[i] - x[half + i] * s;
    to[half + i] = x[half + i] * cos[i] + x[i] * s;
  }
  std::copy(x + 2 * half, x + width, to + 2 * half);
}

// Lists of one thread, which keep their memory from call to call.
struct Workspace {
  std::vector<int64_t> time, window, sinks, seen, left, arrived;  // `time`: position of each candidate, -1 for none
  std::vector<std::vector<int64_t>> in;
  std::vector<const float*> keys, values;
  std::vector<float> rotated, score, rank, weight, turned, far, received, features;
};

// One KV head of one sequence.
template <int W>
class Head {
 public:
  Head(const Layer& layer, const Call& call, int64_t b, int64_t h, Workspace& workspace)
      : l_(layer), c_(call), w_(workspace), b_(b), h_(h) {
    const int64_t bh = b * l_.kv_heads + h, n = l_.slots;
    start_ = c_.position[b];
    at_ = bh * n;
    candidates_ = n + c_.length;
    w_.window.clear(), w_.sinks.clear();
    w_.time.assign(candidates_, -1);
    w_.rotated.resize(candidates_ * l_.d_k);
    w_.keys.resize(candidates_);
    w_.values.resize(candidates_);
    w_.score.assign(l_.pools.size() * candidates_, 0.0f);
    w_.rank.resize(candidates_);
    w_.in.resize(l_.pools.size());
    for (int64_t i = 0; i < n; ++i) {
      w_.time[i] = c_.past_position[at_ + i];
      w_.keys[i] = c_.past_key + (at_ + i) * l_.d_k;
      w_.values[i] = c_.past_value + (at_ + i) * l_.d_v;
      for (int64_t line = 0; line < l_.d_v; line += 16) __builtin_prefetch(w_.values[i] + line);  // read out of order
      for (size_t p = 0; p < l_.pools.size(); ++p)
        w_.score[p * candidates_ + i] = c_.past_score[(bh * l_.pools.size() + p) * n + i];
    }
    for (int64_t t = 0; t < c_.length; ++t) {
      const int64_t token = b * c_.length + t, i = n + t;
      w_.keys[i] = c_.key + token * c_.key_row + h * l_.d_k;
      w_.values[i] = c_.value + token * c_.value_row + h * l_.d_v;
      for (size_t p = 0; p < l_.pools.size(); ++p)
        if (!l_.pools[p].received) w_.score[p * candidates_ + i] = Arrival(t, token);
    }
    if (l_.evicts) {
      const int64_t state = bh * l_.d_k * l_.d_v, mass = bh * l_.d_k;
      state_ = c_.new_state + state;
      mass_ = c_.new_mass + mass;
      if (c_.new_state != c_.past_state) std::copy_n(c_.past_state + state, l_.d_k * l_.d_v, state_);
      if (c_.new_mass != c_.past_mass) std::copy_n(c_.past_mass + mass, l_.d_k, mass_);
    }
    Sort();
  }

  void Run() {
    if (damaged_) {
      *c_.damaged = true;
      return;
    }
    for (int64_t t = 0; t < c_.length; ++t) {
      if (start_ + t < 0) {
        const int64_t token = b_ * c_.length + t, group = l_.q_heads / l_.kv_heads;
        std::fill_n(c_.mixed + (token * l_.q_heads + h_ * group) * l_.d_v, group * l_.d_v, 0.0f);
        continue;
      }
      Take(t);
      Attend(t);
    }
    Store();
  }

 private:
  float Arrival(int64_t t, int64_t token) const {
    if (c_.hidden == nullptr) return c_.arrival[(b_ * l_.kv_heads + h_) * c_.length + t];
    return dot<0>(c_.hidden + token * c_.width, c_.score_weight + h_ * c_.width, c_.width) + c_.score_bias[h_];
  }

  float Rank(size_t pool, int64_t i) const {
    const float score = w_.score[pool * candidates_ + i], horizon = l_.pools[pool].horizon;
    if (std::isnan(score)) return kNever;  // NaN cannot be sorted
    if (horizon == 0) return score;
    return std::log(std::max(score, kFaintest)) + static_cast<float>(w_.time[i] - start_) / horizon;  // small numbers
  }

  // Whether a ranks before b in a pool; `w_.rank` has the ranks.
  bool Better(int64_t a, int64_t b) const {
    return w_.rank[a] > w_.rank[b] || (w_.rank[a] == w_.rank[b] && w_.time[a] < w_.time[b]);
  }

  void Rotate(int64_t i) {
    const int64_t offset = std::max<int64_t>(w_.time[i] - start_, -l_.max_distance) + l_.max_distance;
    rotate(&w_.rotated[i * l_.d_k], w_.keys[i], c_.cos + offset * c_.half, c_.sin + offset * c_.half, 1.0f, c_.half,
           l_.d_k);
  }

  // Finds the pools of the slots from before this call. A state from an unknown source may have slots of the future or a
  // window with gaps, to which no text can lead.
  void Sort() {
    std::vector<int64_t>& left = w_.left;
    left.clear();
    const int64_t oldest = std::max<int64_t>(start_ - l_.window, 0);
    w_.window.assign(std::max<int64_t>(start_ - oldest, 0), -1);
    for (int64_t i = 0; i < l_.slots; ++i) {
      if (w_.time[i] < 0) continue;
      if (w_.time[i] >= start_) {
        damaged_ = true;
        return;
      }
      Rotate(i);
      if (w_.time[i] >= oldest)
        w_.window[w_.time[i] - oldest] = i;
      else if (w_.time[i] < l_.sinks)
        w_.sinks.push_back(i);
      else
        left.push_back(i);
    }
    damaged_ = std::count(w_.window.begin(), w_.window.end(), -1) > 0 || start_ > kLongest || start_ < -kLongest;
    if (damaged_) return;
    for (size_t p = 0; p < l_.pools.size(); ++p) {
      const size_t kept = std::min<size_t>(l_.pools[p].count, left.size());
      for (int64_t i : left) w_.rank[i] = Rank(p, i);
      if (kept < left.size())
        std::nth_element(left.begin(), left.begin() + kept, left.end(),
                         [&](int64_t a, int64_t b) { return Better(a, b); });
      w_.in[p].assign(left.begin(), left.begin() + kept);
      left.erase(left.begin(), left.begin() + kept);
    }
  }

  // Adds a token to the window; the token that leaves it competes for the pools.
  void Take(int64_t t) {
    const int64_t now = start_ + t, i = l_.slots + t;
    w_.time[i] = now;
    Rotate(i);
    w_.window.push_back(i);
    if (now - w_.time[w_.window[first_]] < l_.window) return;
    int64_t item = w_.window[first_++];
    if (w_.time[item] < l_.sinks) {
      w_.sinks.push_back(item);
      return;
    }
    for (size_t p = 0; p < l_.pools.size(); ++p) {
      std::vector<int64_t>& pool = w_.in[p];
      w_.rank[item] = Rank(p, item);
      if (static_cast<int64_t>(pool.size()) < l_.pools[p].count) {
        pool.push_back(item);
        return;
      }
      const auto worst =
          std::min_element(pool.begin(), pool.end(), [&](int64_t a, int64_t b) { return Better(b, a); });
      if (Better(item, *worst)) std::swap(item, *worst);
    }
    if (l_.evicts) Evict(item);
    w_.time[item] = -1;
  }

  void Evict(int64_t i) {
    const float* slow = c_.turn + 2 * c_.half;
    w_.features.assign(w_.keys[i], w_.keys[i] + l_.d_k);
    for (int64_t r = 0; r < c_.half; ++r) {
      w_.features[r] *= slow[r];
      w_.features[c_.half + r] *= slow[r];
    }
    w_.features[0] = 1;
    for (int64_t c = 0; c < l_.d_k; ++c) {
      mass_[c] += w_.features[c];
      if (w_.features[c] != 0) add(state_ + c * l_.d_v, w_.values[i], w_.features[c], l_.d_v);
    }
  }

  void Attend(int64_t t) {
    const int64_t now = start_ + t, token = b_ * c_.length + t, group = l_.q_heads / l_.kv_heads;
    w_.seen.assign(w_.window.begin() + first_, w_.window.end());
    const size_t near = w_.seen.size();
    w_.seen.insert(w_.seen.end(), w_.sinks.begin(), w_.sinks.end());
    const size_t always = w_.seen.size();
    for (const auto& pool : w_.in) w_.seen.insert(w_.seen.end(), pool.begin(), pool.end());
    const size_t count = w_.seen.size();
    w_.weight.resize(count);
    w_.turned.resize(l_.d_k);
    w_.far.resize(l_.d_k);
    w_.received.assign(l_.pools.size() * near, 0.0f);

    for (int64_t g = 0; g < group; ++g) {
      const float* q = c_.query + token * c_.query_row + (h_ * group + g) * l_.d_k;
      float* mixed = c_.mixed + (token * l_.q_heads + h_ * group + g) * l_.d_v;
      const int64_t row = l_.max_distance + t;
      rotate(w_.turned.data(), q, c_.cos + row * c_.half, c_.sin + row * c_.half, 1.0f, c_.half, l_.d_k);
      if (now > l_.max_distance) rotate(w_.far.data(), q, c_.cos, c_.sin, -1.0f, c_.half, l_.d_k);
      float local = kNever;
      for (size_t j = 0; j < count; ++j)
        w_.weight[j] = l_.scale * dot<W>(w_.turned.data(), &w_.rotated[w_.seen[j] * l_.d_k], l_.d_k);
      if (now > l_.max_distance)
        for (size_t j = 0; j < count; ++j)
          if (now - w_.time[w_.seen[j]] > l_.max_distance)
            w_.weight[j] = l_.scale * dot<W>(w_.far.data(), w_.keys[w_.seen[j]], l_.d_k);
      for (size_t j = 0; j < always; ++j) local = std::max(local, w_.weight[j]);
      float top = local;
      for (size_t j = always; j < count; ++j) top = std::max(top, w_.weight[j]);
      float sum = exponentials(w_.weight.data(), always, local);
      Receive(now, near, sum);
      const float faded = std::exp(local - top);
      for (size_t j = 0; j < always; ++j) w_.weight[j] *= faded;
      sum = sum * faded + exponentials(w_.weight.data() + always, count - always, top);
      for (float& weight : w_.weight) weight /= sum;
      mix<W>(mixed, w_.values, w_.seen, w_.weight.data(), l_.d_v);
      if (l_.evicts && mass_[0] > 0) Expand(q, mixed, top + std::log(sum));
    }
    Score(now, near);
  }

  // Collects the attention that tokens in the window receive from one query, by softmax over window and sinks.
  void Receive(int64_t now, size_t near, float sum) {
    for (size_t p = 0; p < l_.pools.size(); ++p) {
      const Pool& pool = l_.pools[p];
      if (!pool.received) continue;
      for (size_t j = 0; j < near; ++j) {
        if (now - w_.time[w_.seen[j]] < pool.first_distance) break;  // the oldest come first
        float* to = &w_.received[p * near + j];
        *to = pool.maximum ? std::max(*to, w_.weight[j] / sum) : *to + w_.weight[j] / sum;
      }
    }
  }

  void Score(int64_t now, size_t near) {
    for (size_t p = 0; p < l_.pools.size(); ++p) {
      const Pool& pool = l_.pools[p];
      if (!pool.received) continue;
      for (size_t j = 0; j < near; ++j) {
        const int64_t i = w_.seen[j];
        if (now - w_.time[i] < pool.first_distance) break;
        float got = w_.received[p * near + j];
        if (pool.by_value) got *= std::sqrt(dot<W>(w_.values[i], w_.values[i], l_.d_v));
        float& score = w_.score[p * candidates_ + i];
        score = pool.maximum ? std::max(score, got) : score + got;
      }
    }
  }

  // Shares the softmax's denominator with the evicted tokens; see `ligerexport.kernels.evicted`.
  void Expand(const float* q, float* mixed, float normaliser) {
    const float count = mass_[0];
    rotate(w_.turned.data(), q, c_.turn, c_.turn + c_.half, 1.0f, c_.half, l_.d_k);
    for (float& x : w_.turned) x *= l_.scale;
    const float mean = dot<W>(w_.turned.data(), mass_, l_.d_k) / count;
    w_.turned[0] = 1 - mean;
    w_.features.assign(l_.d_v, 0.0f);
    for (int64_t c = 0; c < l_.d_k; ++c)
      if (w_.turned[c] != 0) add(w_.features.data(), state_ + c * l_.d_v, w_.turned[c] / count, l_.d_v);
    const float share = 1 / (1 + std::exp(normaliser - mean - std::log(l_.recurrence_weight * count)));
    for (int64_t v = 0; v < l_.d_v; ++v) mixed[v] += share * (w_.features[v] - mixed[v]);
  }

  void Store() {
    const int64_t n = l_.slots, pools = l_.pools.size(), bh = at_ / n;
    std::vector<int64_t>& arrived = w_.arrived;
    arrived.clear();
    for (int64_t i = n; i < candidates_; ++i)
      if (w_.time[i] >= 0) arrived.push_back(i);
    size_t next = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t source = w_.time[i] >= 0 ? i : next < arrived.size() ? arrived[next++] : -1;
      c_.new_position[at_ + i] = source < 0 ? -1 : w_.time[source];
      for (int64_t p = 0; p < pools; ++p)
        c_.new_score[(bh * pools + p) * n + i] = source < 0 ? 0.0f : w_.score[p * candidates_ + source];
      Copy(c_.new_key + (at_ + i) * l_.d_k, source < 0 ? nullptr : w_.keys[source], l_.d_k);
      Copy(c_.new_value + (at_ + i) * l_.d_v, source < 0 ? nullptr : w_.values[source], l_.d_v);
    }
  }

  static void Copy(float* to, const float* from, int64_t n) {
    if (from == nullptr)
      std::fill_n(to, n, 0.0f);
    else if (from != to)
      std::copy_n(from, n, to);
  }

  const Layer& l_;
  const Call& c_;
  Workspace& w_;
  int64_t b_, h_, start_, at_, candidates_;
  size_t first_ = 0;  // of the window
  bool damaged_ = false;
  float *state_ = nullptr, *mass_ = nullptr;
};

template <int W, typename Parallel>
void run_heads(const Layer& layer, const Call& call, const Parallel& parallel) {
  parallel(call.batch * layer.kv_heads, [&](int64_t i) {
    thread_local Workspace workspace;
    Head<W>(layer, call, i / layer.kv_heads, i % layer.kv_heads, workspace).Run();
  });
}

// `parallel(n, work)` calls work(0) to work(n - 1) on any number of threads.
template <typename Parallel>
void run(const Layer& layer, const Call& call, const Parallel& parallel) {
  if (layer.d_k == layer.d_v && layer.d_k == 64) return run_heads<64>(layer, call, parallel);
  if (layer.d_k == layer.d_v && layer.d_k == 128) return run_heads<128>(layer, call, parallel);
  run_heads<0>(layer, call, parallel);
}

}  // namespace liger
