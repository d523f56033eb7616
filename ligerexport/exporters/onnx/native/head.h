// What a KV head keeps and reads in one call: which tokens stay, the attention to them, and the new state.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "undo.h"

namespace liger {

constexpr int64_t kPart = 256;  // most candidates for a thread at a time

// One KV head of one sequence.
template <typename T>
class Head {
 public:
  using Space = Workspace<T>;

  Head(const Layer& layer, const Call<T>& call, int64_t b, int64_t h, Space& workspace)
      : l_(layer), c_(call), w_(workspace), size_(layer.heads[h]), b_(b), h_(h), start_(call.position[b]),
        at_(b * layer.slots + size_.first), score_(b * layer.scores + size_.score), n_(size_.slots),
        candidates_(n_ + call.length), pools_(size_.counts.size()), group_(layer.q_heads / layer.kv_heads) {}

  // Reads the slots and the new tokens.
  void Read() {
    w_.window.clear(), w_.sinks.clear(), w_.free.clear();
    w_.time.assign(candidates_, -1);
    w_.gone.assign(candidates_, c_.length);
    w_.score.assign(pools_ * candidates_, 0.0f);
    w_.rank.resize(candidates_);
    w_.in.resize(pools_);
    w_.key.resize(c_.length * l_.d_k), w_.value.resize(c_.length * l_.d_v);
    w_.key_scale.resize(c_.length), w_.value_scale.resize(c_.length);
    for (int64_t i = 0; i < n_; ++i) w_.time[i] = c_.past_position.get(at_ + i);
    for (size_t p = 0; p < pools_; ++p)
      std::copy_n(c_.past_score + score_ + p * l_.score_pool, n_, &w_.score[p * candidates_]);
    for (int64_t t = 0; t < c_.length; ++t) {
      const int64_t token = b_ * c_.length + t;
      w_.key_scale[t] = store(&w_.key[t * l_.d_k], c_.key + token * c_.key_row + h_ * l_.d_k, l_.d_k);
      w_.value_scale[t] = store(&w_.value[t * l_.d_v], c_.value + token * c_.value_row + h_ * l_.d_v, l_.d_v);
      for (size_t p = 0; p < pools_; ++p)
        if (!l_.pools[p].received) w_.score[p * candidates_ + n_ + t] = Arrival(t, token);
    }
    if (l_.evicts) {
      const int64_t bh = b_ * l_.kv_heads + h_, state = bh * l_.d_k * l_.d_v, mass = bh * l_.d_k;
      state_ = c_.new_state + state;
      mass_ = c_.new_mass + mass;
      if (c_.new_state != c_.past_state) std::copy_n(c_.past_state + state, l_.d_k * l_.d_v, state_);
      if (c_.new_mass != c_.past_mass) std::copy_n(c_.past_mass + mass, l_.d_k, mass_);
    }
    for (int64_t t = 0; t < c_.length; ++t) std::fill_n(Mixed(t, 0), group_ * l_.d_v, 0.0f);  // for padding
    if (!Sort()) *c_.damaged = true;
  }

  // Reads all new tokens, of which each attends before the next one comes.
  void Run() {
    w_.rotated.resize(candidates_ * l_.d_k);
    for (int64_t i = 0; i < n_; ++i) {
      if (w_.time[i] < 0) continue;
      Rotate(i, &w_.rotated[i * l_.d_k]);
      const char* row = reinterpret_cast<const char*>(Value(i));  // read out of order
      for (size_t line = 0; line < l_.d_v * sizeof(T); line += 64) __builtin_prefetch(row + line);
    }
    for (int64_t t = 0; t < c_.length; ++t) {
      if (start_ + t < 0) continue;
      Take(t);
      Rotate(n_ + t, &w_.rotated[(n_ + t) * l_.d_k]);
      Attend(t);
    }
    Store();
  }

  // Reads all new tokens without attention.
  void Choose() {
    if (*c_.damaged) return;
    for (int64_t t = 0; t < c_.length; ++t)
      if (start_ + t >= 0) Take(t);
  }

  int64_t parts() const { return (candidates_ + kPart - 1) / kPart; }
  int64_t partial_size() const { return c_.length * group_ * (l_.d_v + 2); }  // numbers of a part

  // Attends after `Choose` to one part of the candidates alone; for each query of each token it writes the largest logit,
  // the sum of the exponentials, and the weighted sum of values.
  void Part(int64_t part, float* partial, Space& w) const {
    const int64_t begin = candidates_ * part / parts(), end = candidates_ * (part + 1) / parts();
    if (c_.length > 1) return Together(begin, end, partial, w);
    const int64_t row = l_.d_v + 2, room = kPart;
    w.seen.clear(), w.rotated.resize(kTogether * l_.d_k);
    for (int64_t i = begin; start_ >= 0 && i < end; ++i)
      if (w_.time[i] >= 0 && w_.gone[i] > 0) w.seen.push_back(i);
    const int64_t count = w.seen.size();
    Logits(0, room, w, [&](int64_t i, int k) {
      Rotate(i, &w.rotated[k * l_.d_k]);
      return &w.rotated[k * l_.d_k];
    });
    for (int64_t g = 0; g < group_; ++g) {
      float *weight = &w.weight[g * room], *to = partial + g * row;
      to[0] = largest(weight, count);
      to[1] = exponentials(weight, count, to[0]);
      ScaleValues(weight, w.seen);
    }
    Mix(partial + 2, row, room, w);
  }

  // Combines the parts in their order, so that the result does not depend on the threads, and writes the new state.
  void Combine(const float* partial) {
    const int64_t row = l_.d_v + 2, size = partial_size();
    for (int64_t t = 0; t < c_.length; ++t) {
      for (int64_t g = 0; g < group_; ++g) {
        const float* first = partial + (t * group_ + g) * row;
        float top = kNever, sum = 0, *to = Mixed(t, g);
        for (int64_t p = 0; p < parts(); ++p) top = std::max(top, first[p * size]);
        for (int64_t p = 0; p < parts() && start_ + t >= 0; ++p) {
          const float *x = first + p * size, weight = std::exp(x[0] - top);
          sum += weight * x[1];
          add(to, x + 2, weight, l_.d_v);
        }
        for (int64_t v = 0; v < l_.d_v && sum > 0; ++v) to[v] /= sum;
      }
    }
    Store();
  }

 private:
  const T* Key(int64_t i) const { return i < n_ ? c_.past_key + (at_ + i) * l_.d_k : &w_.key[(i - n_) * l_.d_k]; }
  const T* Value(int64_t i) const { return i < n_ ? c_.past_value + (at_ + i) * l_.d_v : &w_.value[(i - n_) * l_.d_v]; }

  float KeyScale(int64_t i) const {
    if constexpr (!kScaled<T>) return 1.0f;
    return widen(i < n_ ? c_.past_key_scale[at_ + i] : w_.key_scale[i - n_]);
  }
  float ValueScale(int64_t i) const {
    if constexpr (!kScaled<T>) return 1.0f;
    return widen(i < n_ ? c_.past_value_scale[at_ + i] : w_.value_scale[i - n_]);
  }
  void ScaleValues(float* weight, const std::vector<int64_t>& which) const {
    if constexpr (kScaled<T>)
      for (size_t j = 0; j < which.size(); ++j) weight[j] *= ValueScale(which[j]);
  }

  // Writes the values of `w.seen` mixed for each query, whose results are `row` numbers apart.
  void Mix(float* to, int64_t row, int64_t room, Space& w) const {
    w.values.clear();
    for (int64_t i : w.seen) w.values.push_back(Value(i));
    mix(to, row, w.values, w.weight.data(), room, group_, l_.d_v);
  }

  // Does the same for many tokens.
  void Together(int64_t begin, int64_t end, float* partial, Space& w) const {
    w.seen.clear(), w.left.clear();  // those within the largest distance at some token, and those beyond it
    const auto beyond = [&](int64_t i) { return std::max<int64_t>(w_.time[i] + l_.max_distance + 1 - start_, 0); };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t since = std::max<int64_t>(i - n_, 0), until = w_.time[i] < 0 ? 0 : w_.gone[i];
      if (since < std::min(until, beyond(i))) w.seen.push_back(i);
      if (std::max(since, beyond(i)) < until) w.left.push_back(i);
    }
    Dense& d = w.dense;
    d.tokens = c_.length, d.group = group_, d.d_k = l_.d_k, d.d_v = l_.d_v;
    d.Reset(w.left.size(), w.seen.size());
    for (int64_t t = 0; t < c_.length; ++t) {
      const int64_t row = (l_.max_distance + t) * c_.half;
      for (int64_t g = 0; g < group_; ++g) {
        const int64_t to = (t * group_ + g) * l_.d_k;
        std::copy_n(Query(t, g), l_.d_k, &d.plain[to]);
        rotate(&d.turned[to], Query(t, g), c_.cos + row, c_.sin + row, 1.0f, c_.half, l_.d_k);
      }
    }
    w.rotated.resize(kVector * l_.d_k);
    const auto set = [&](const std::vector<int64_t>& which, int64_t first, bool far) {
      for (size_t j = 0; j < which.size(); j += kVector) {
        Vector scales{};
        for (size_t k = 0; k < std::min<size_t>(kVector, which.size() - j); ++k) {
          const int64_t i = which[j + k], column = first + j + k, until = w_.gone[i];
          Rotate(i, &w.rotated[k * l_.d_k], far);
          scales[k] = l_.scale * KeyScale(i);
          d.SetValue(column, Value(i), ValueScale(i));
          d.See(column, far ? std::max(i - n_, beyond(i)) : i - n_, far ? until : std::min(until, beyond(i)));
        }
        d.SetKeys(first + j, w.rotated.data(), scales);
      }
    };
    set(w.left, 0, true), set(w.seen, d.far, false);
    d.Attend(partial);
  }

  // Returns a row in fp32, without its scale.
  static const float* Plain(const T* row, int64_t n, Space& w) {
    if constexpr (std::is_same_v<T, float>) return row;
    w.plain.resize(n);
    read(w.plain.data(), row, n);
    return w.plain.data();
  }

  float* Mixed(int64_t t, int64_t g) const {
    return c_.mixed + ((b_ * c_.length + t) * l_.q_heads + h_ * group_ + g) * l_.d_v;
  }

  const float* Query(int64_t t, int64_t g) const {
    return c_.query + (b_ * c_.length + t) * c_.query_row + (h_ * group_ + g) * l_.d_k;
  }

  float Arrival(int64_t t, int64_t token) const {
    if (c_.hidden == nullptr) return c_.arrival[(b_ * l_.kv_heads + h_) * c_.length + t];
    return dot(c_.hidden + token * c_.width, c_.score_weight + h_ * c_.width, c_.width) + c_.score_bias[h_];
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

  // Rotates a key to its distance, or to the largest.
  void Rotate(int64_t i, float* to, bool far = false) const {
    const int64_t offset = far ? 0 : std::max<int64_t>(w_.time[i] - start_, -l_.max_distance) + l_.max_distance;
    rotate(to, Key(i), c_.cos + offset * c_.half, c_.sin + offset * c_.half, 1.0f, c_.half, l_.d_k);
  }

  // Writes the logits of the candidates in `w.seen` for the queries of a token, `[G, room]` with room for a multiple of
  // four. `rotated(i, k)` returns a rotated key, which is used until the next one with the same k.
  template <typename Rotated>
  void Logits(int64_t t, int64_t room, Space& w, const Rotated& rotated) const {
    const int64_t now = start_ + t, row = l_.max_distance + t, count = w.seen.size();
    const bool far = t > 0 && now > l_.max_distance;  // for the first token, offsets are distances
    w.turned.resize(group_ * l_.d_k), w.far.resize(group_ * l_.d_k), w.weight.resize(group_ * room);
    for (int64_t g = 0; g < group_; ++g) {
      rotate(&w.turned[g * l_.d_k], Query(t, g), c_.cos + row * c_.half, c_.sin + row * c_.half, 1.0f, c_.half, l_.d_k);
      if (far) rotate(&w.far[g * l_.d_k], Query(t, g), c_.cos, c_.sin, -1.0f, c_.half, l_.d_k);
    }
    for (int64_t j = 0; j < count; j += kTogether) {
      const float* keys[kTogether];
      for (int k = 0; k < kTogether; ++k) keys[k] = j + k < count ? rotated(w.seen[j + k], k) : keys[k - 1];
      for (int64_t g = 0; g < group_; ++g) dots(&w.weight[g * room + j], &w.turned[g * l_.d_k], keys, l_.d_k);
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t i = w.seen[j];
      const float scale = l_.scale * KeyScale(i);
      if (far && now - w_.time[i] > l_.max_distance) {
        const float* key = Plain(Key(i), l_.d_k, w);
        for (int64_t g = 0; g < group_; ++g) w.weight[g * room + j] = dot(&w.far[g * l_.d_k], key, l_.d_k);
      }
      for (int64_t g = 0; g < group_; ++g) w.weight[g * room + j] *= scale;
    }
  }

  // Finds the pools of the slots from before this call. A state from an unknown source may have slots of the future or a
  // window with gaps, to which no text can lead; returns false for these.
  bool Sort() {
    std::vector<int64_t>& left = w_.left;
    left.clear();
    const int64_t longest = c_.past_position.narrow ? std::numeric_limits<int32_t>::max() - c_.length : kLongest;
    if (start_ > longest || start_ < -longest) return false;
    const int64_t oldest = std::max<int64_t>(start_ - size_.window, 0);
    w_.window.assign(std::max<int64_t>(start_ - oldest, 0), -1);
    for (int64_t i = 0; i < n_; ++i) {
      if (w_.time[i] >= start_ && w_.time[i] >= 0) return false;
      if (w_.time[i] < 0)
        w_.free.push_back(i);
      else if (w_.time[i] >= oldest)
        w_.window[w_.time[i] - oldest] = i;
      else if (w_.time[i] < l_.sinks)
        w_.sinks.push_back(i);
      else
        left.push_back(i);
    }
    if (std::count(w_.window.begin(), w_.window.end(), -1) > 0) return false;
    for (size_t p = 0; p < pools_; ++p) {
      const size_t kept = std::min<size_t>(size_.counts[p], left.size());
      for (int64_t i : left) w_.rank[i] = Rank(p, i);
      if (kept < left.size())
        std::nth_element(left.begin(), left.begin() + kept, left.end(),
                         [&](int64_t a, int64_t b) { return Better(a, b); });
      w_.in[p].assign(left.begin(), left.begin() + kept);
      left.erase(left.begin(), left.begin() + kept);
    }
    return true;
  }

  // Adds a token to the window; the token that leaves it competes for the pools.
  void Take(int64_t t) {
    const int64_t now = start_ + t, i = n_ + t;
    w_.time[i] = now;
    w_.window.push_back(i);
    if (now - w_.time[w_.window[first_]] < size_.window) return;
    int64_t item = w_.window[first_++];
    if (w_.time[item] < l_.sinks) {
      w_.sinks.push_back(item);
      return;
    }
    for (size_t p = 0; p < pools_; ++p) {
      std::vector<int64_t>& pool = w_.in[p];
      w_.rank[item] = Rank(p, item);
      if (static_cast<int64_t>(pool.size()) < size_.counts[p]) {
        pool.push_back(item);
        return;
      }
      const auto worst =
          std::min_element(pool.begin(), pool.end(), [&](int64_t a, int64_t b) { return Better(b, a); });
      if (Better(item, *worst)) std::swap(item, *worst);
    }
    if (l_.evicts) Evict(item);
    w_.gone[item] = t;
    if (item < n_) w_.free.push_back(item);
  }

  void Evict(int64_t i) {
    const float* slow = c_.turn + 2 * c_.half;
    w_.features.resize(l_.d_k);
    read(w_.features.data(), Key(i), l_.d_k);
    for (float& x : w_.features) x *= KeyScale(i);
    for (int64_t r = 0; r < c_.half; ++r) {
      w_.features[r] *= slow[r];
      w_.features[c_.half + r] *= slow[r];
    }
    w_.features[0] = 1;
    const float *value = Plain(Value(i), l_.d_v, w_), scale = ValueScale(i);
    for (int64_t c = 0; c < l_.d_k; ++c) {
      mass_[c] += w_.features[c];
      if (w_.features[c] != 0) add(state_ + c * l_.d_v, value, scale * w_.features[c], l_.d_v);
    }
  }

  void Attend(int64_t t) {
    const int64_t now = start_ + t;
    w_.seen.assign(w_.window.begin() + first_, w_.window.end());
    const size_t near = w_.seen.size();
    w_.seen.insert(w_.seen.end(), w_.sinks.begin(), w_.sinks.end());
    const size_t always = w_.seen.size();
    for (const auto& pool : w_.in) w_.seen.insert(w_.seen.end(), pool.begin(), pool.end());
    const size_t count = w_.seen.size();
    const int64_t room = (count + kTogether - 1) / kTogether * kTogether;
    w_.received.assign(pools_ * near, 0.0f);
    Logits(t, room, w_, [&](int64_t i, int) { return &w_.rotated[i * l_.d_k]; });
    std::vector<float> normaliser(group_);
    for (int64_t g = 0; g < group_; ++g) {
      float *weight = &w_.weight[g * room];
      const float local = largest(weight, always), top = std::max(local, largest(weight + always, count - always));
      float sum = exponentials(weight, always, local);
      Receive(now, near, weight, sum);
      const float faded = std::exp(local - top);
      for (size_t j = 0; j < always; ++j) weight[j] *= faded;
      sum = sum * faded + exponentials(weight + always, count - always, top);
      for (size_t j = 0; j < count; ++j) weight[j] /= sum;
      ScaleValues(weight, w_.seen);
      normaliser[g] = top + std::log(sum);
    }
    Mix(Mixed(t, 0), l_.d_v, room, w_);
    for (int64_t g = 0; g < group_ && l_.evicts && mass_[0] > 0; ++g) Expand(t, g, normaliser[g]);
    Score(now, near);
  }

  // Collects the attention that tokens in the window receive from one query, by softmax over window and sinks.
  void Receive(int64_t now, size_t near, const float* weight, float sum) {
    for (size_t p = 0; p < pools_; ++p) {
      const Pool& pool = l_.pools[p];
      if (!pool.received) continue;
      for (size_t j = 0; j < near; ++j) {
        if (now - w_.time[w_.seen[j]] < size_.first_distances[p]) break;  // the oldest come first
        float* to = &w_.received[p * near + j];
        *to = pool.maximum ? std::max(*to, weight[j] / sum) : *to + weight[j] / sum;
      }
    }
  }

  void Score(int64_t now, size_t near) {
    for (size_t p = 0; p < pools_; ++p) {
      const Pool& pool = l_.pools[p];
      if (!pool.received) continue;
      for (size_t j = 0; j < near; ++j) {
        const int64_t i = w_.seen[j];
        if (now - w_.time[i] < size_.first_distances[p]) break;
        float got = w_.received[p * near + j];
        if (pool.by_value) {
          const float* value = Plain(Value(i), l_.d_v, w_);
          got *= ValueScale(i) * std::sqrt(dot(value, value, l_.d_v));
        }
        float& score = w_.score[p * candidates_ + i];
        score = pool.maximum ? std::max(score, got) : score + got;
      }
    }
  }

  // Shares the softmax's denominator with the evicted tokens; see `ligerexport.kernels.evicted`.
  void Expand(int64_t t, int64_t g, float normaliser) {
    float *mixed = Mixed(t, g), count = mass_[0];
    std::vector<float>& turned = w_.plain;
    turned.resize(l_.d_k);
    rotate(turned.data(), Query(t, g), c_.turn, c_.turn + c_.half, 1.0f, c_.half, l_.d_k);
    for (float& x : turned) x *= l_.scale;
    const float mean = dot(turned.data(), mass_, l_.d_k) / count;
    turned[0] = 1 - mean;
    w_.features.assign(l_.d_v, 0.0f);
    for (int64_t c = 0; c < l_.d_k; ++c)
      if (turned[c] != 0) add(w_.features.data(), state_ + c * l_.d_v, turned[c] / count, l_.d_v);
    const float share = 1 / (1 + std::exp(normaliser - mean - std::log(l_.recurrence_weight * count)));
    if (c_.forgotten != nullptr) c_.forgotten[b_ * l_.q_heads + h_ * group_ + g] = share;
    for (int64_t v = 0; v < l_.d_v; ++v) mixed[v] += share * (w_.features[v] - mixed[v]);
  }

  // Slots that stay keep their places, and new tokens go to those that are free.
  void Store() {
    Keep(c_.new_key, c_.past_key, l_.d_k), Keep(c_.new_value, c_.past_value, l_.d_v);
    Keep(c_.new_key_scale, c_.past_key_scale, 1), Keep(c_.new_value_scale, c_.past_value_scale, 1);
    for (int64_t i = 0; i < n_ && c_.new_position.data != c_.past_position.data; ++i)
      c_.new_position.set(at_ + i, w_.time[i]);
    for (size_t p = 0; p < pools_; ++p)
      if (c_.new_score != c_.past_score || l_.pools[p].received)
        std::copy_n(&w_.score[p * candidates_], n_, c_.new_score + score_ + p * l_.score_pool);
    if (c_.undo != nullptr) remember(l_, c_, w_, b_, h_);
    int64_t t = 0;
    for (int64_t i : w_.free) {
      while (t < c_.length && (start_ + t < 0 || w_.gone[n_ + t] < c_.length)) ++t;
      const bool filled = t < c_.length;
      c_.new_position.set(at_ + i, filled ? start_ + t : -1);
      for (size_t p = 0; p < pools_; ++p)
        c_.new_score[score_ + p * l_.score_pool + i] = filled ? w_.score[p * candidates_ + n_ + t] : 0.0f;
      if (!filled) continue;  // what an empty slot holds does not matter
      std::copy_n(&w_.key[t * l_.d_k], l_.d_k, c_.new_key + (at_ + i) * l_.d_k);
      std::copy_n(&w_.value[t * l_.d_v], l_.d_v, c_.new_value + (at_ + i) * l_.d_v);
      if (kScaled<T>) c_.new_key_scale[at_ + i] = w_.key_scale[t], c_.new_value_scale[at_ + i] = w_.value_scale[t];
      ++t;
    }
  }

  template <typename X>
  void Keep(X* to, const X* from, int64_t n) const {
    if (to != from) std::copy_n(from + at_ * n, n_ * n, to + at_ * n);
  }

  const Layer& l_;
  const Call<T>& c_;
  Space& w_;
  const Size& size_;
  const int64_t b_, h_, start_, at_, score_, n_, candidates_;
  const size_t pools_;
  const int64_t group_;
  size_t first_ = 0;  // of the window
  float *state_ = nullptr, *mass_ = nullptr;
};

}  // namespace liger
