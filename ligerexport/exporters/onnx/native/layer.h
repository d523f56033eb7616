// A layer with a bounded exact memory, one call of it, and the lists that a head needs meanwhile.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

#include "dense.h"
#include "stored.h"

namespace liger {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kFaintest = 1e-30f;
constexpr int64_t kLongest = int64_t{1} << 62;  // tokens of a sequence

struct Pool {
  int64_t received, maximum, by_value;  // see `Pool` in scores.py
  float horizon;                        // 0 for no ageing
};

struct Size {  // of the memory of one KV head
  int64_t window, slots, first, score;  // `first`, `score`: where its slots and scores begin in those of a sequence
  std::vector<int64_t> counts, first_distances;  // of each pool; empty for a head without scores
};

struct Layer {
  int64_t q_heads, kv_heads, d_k, d_v, sinks, max_distance, evicts;
  float scale, recurrence_weight;
  std::vector<Pool> pools;
  std::vector<Size> heads;
  int64_t slots, scores, score_pool;  // of a sequence; numbers from the scores of a pool to those of the next
};

struct Positions {
  void* data;
  bool narrow;  // int32 instead of int64

  int64_t get(int64_t i) const {
    return narrow ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  }
  void set(int64_t i, int64_t x) const {
    if (narrow)
      static_cast<int32_t*>(data)[i] = static_cast<int32_t>(x);
    else
      static_cast<int64_t*>(data)[i] = x;
  }
};

template <typename T>
struct Call {  // pointers to the tensors of one call; past and present may be the same
  int64_t batch, length, half, query_row, key_row, value_row, width;  // *_row: numbers from a token to the next
  const float *query, *key, *value, *arrival, *cos, *sin, *turn;  // `turn`: cosine, sine, 1 if slow, `[3, R]`
  const float *hidden, *score_weight, *score_bias;                // of `width` channels, instead of `arrival`
  const int64_t* position;
  const T *past_key, *past_value;
  const Scale<T> *past_key_scale, *past_value_scale;
  const float *past_score, *past_state, *past_mass;
  T *new_key, *new_value;
  Scale<T> *new_key_scale, *new_value_scale;
  float *mixed, *new_score, *new_state, *new_mass;
  float* forgotten;  // `[B, H_q]`: share of the last token's attention that fell on evicted tokens; or null
  Positions past_position, new_position;
  char* undo;         // records of all heads, `undo_head` bytes apart, or null; see `undo.h`
  int64_t undo_head;
  std::atomic<bool>* damaged;  // set if no text can lead to the state
};

// Lists of one head, which keep their memory from call to call.
template <typename T>
struct Workspace {
  std::vector<int64_t> time, gone;  // of each candidate: position, -1 for none; the token at which it loses its slot
  std::vector<int64_t> window, sinks, left, free;
  std::vector<std::vector<int64_t>> in;
  std::vector<float> score, rank, features, rotated;
  std::vector<T> key, value;  // of the new tokens
  std::vector<Scale<T>> key_scale, value_scale;
  // of the attention to some of the candidates
  std::vector<int64_t> seen;
  std::vector<const T*> values;
  std::vector<float> turned, far, weight, received, plain;
  Dense dense;
};

}  // namespace liger
